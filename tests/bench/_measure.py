"""The rows of the benchmark: what is done with each peer, and measured."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from _peers import (HERE, Direct, Failed, Running, Warmproxy,
                    die_with_us, family, pin_to)

BOOTS = ((0, 20), (200, 15), (1000, 5), (5000, 3))  # ms, number of cold starts

# Cold starts of targets that make it hard: environment of the target, number
# of requests at once, their path.
HARD = {
    "page": ({"BENCH_PAGE_MS": "3000"}, 1, "/other"),
    "burst": ({"BENCH_BOOT_MS": "200"}, 200, "/"),
    "503": ({"BENCH_503_MS": "2000"}, 1, "/"),
    "thaw": ({"BENCH_BOOT_MS": "1500"}, 1, "/"),
}
FREEZE_AFTER, FREEZE_FOR = 0.5, 5  # seconds, of "thaw"
FROZEN_START_TIMEOUT = 3  # in which the boot fits, but not with the freeze


class Measure:
    def __init__(self, options):
        self.options = options
        self.began = time.monotonic()
        self.dir = Path(options.dir)
        self.dir.mkdir(parents=True, exist_ok=True)
        self.dir = self.dir.resolve()
        self.log = open(self.dir / "log", "w")
        self.target = self.compile("target")
        self.client = self.compile("client")
        self.values = {}  # (row, peer's name) -> one number a round
        self.notes = []
        self.peers = []

    def compile(self, name):
        source, binary = HERE / f"{name}.cpp", self.dir / name
        if (not binary.exists()
                or binary.stat().st_mtime < source.stat().st_mtime):
            subprocess.run([os.environ.get("CXX", "g++"), "-std=c++17", "-O2",
                            "-pthread", source, "-o", binary], check=True)
        return binary

    def report_progress(self, text):
        if sys.stderr.isatty() or self.options.verbose:
            seconds = time.monotonic() - self.began
            print(f"{seconds:6.1f} s  {text}", file=sys.stderr, flush=True)

    def note(self, text):
        if text not in self.notes:
            self.notes.append(text)
            self.report_progress(text)

    def record(self, row, peer, value):
        self.values.setdefault((row, peer.name), []).append(value)

    def attempt(self, row, peer, function, *arguments):
        """Measures one row of one peer; where that fails, it is noted."""
        if time.monotonic() - self.began > self.options.limit:
            self.note("stopped at the time limit: some rows have fewer rounds")
            return
        try:
            self.report_progress(f"{row}: {peer.name}")
            function(peer, *arguments)
        except (Failed, subprocess.SubprocessError, OSError) as e:
            self.note(f"{peer.name}, {row}: {str(e).strip()[:200]}")

    def run_client(self, peer, *arguments, **keywords):
        """Starts our client, with its requests below the peer's prefix."""
        env = {**(keywords.pop("env", None) or os.environ),
               "BENCH_PREFIX": peer.prefix}
        return subprocess.Popen(
            [str(self.client), *map(str, arguments)], text=True, env=env,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=die_with_us, **keywords)

    def read_client(self, client, timeout=130):
        """The numbers that our client prints at its end."""
        try:
            out, errors = client.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            client.kill()
            client.communicate()
            raise
        if client.returncode != 0:
            lines = errors.strip().splitlines()
            raise Failed(lines[-1] if lines else f"{client.args[1]} failed")
        return [int(n) for n in out.split()]

    def ask(self, peer, *arguments, **keywords):
        return self.read_client(self.run_client(peer, *arguments, **keywords))

    # Cold starts

    def cold_client(self, peer, mode, *arguments, from_exec=False, **extra):
        """Starts a client whose first request starts the target."""
        if from_exec or peer.from_exec:
            command, port, env = peer.prepare(**extra)
            return self.run_client(peer, mode, port, *arguments, *command,
                                   env=env, cwd=peer.cwd())
        peer.start(**extra)
        return self.run_client(peer, mode, peer.port, *arguments)

    def cold_once(self, peer, row, boot):
        try:
            ns, = self.read_client(self.cold_client(
                peer, "cold", from_exec=row.startswith("exec"),
                BENCH_BOOT_MS=str(boot)))
        finally:
            peer.stop()
        self.record(row, peer, ns)

    def starters(self):
        return [p for p in self.peers if p.spawns or isinstance(p, Direct)]

    def cold(self):
        for boot, count in BOOTS:
            for i in range(self.options.cold_starts or count):
                for peer in self.starters():
                    if peer.slowness >= 50 and i >= max(2, count // 5):
                        continue
                    self.attempt(f"cold {boot}", peer, self.cold_once,
                                 f"cold {boot}", boot)
                    if isinstance(peer, Warmproxy) and boot == 0:
                        self.attempt(f"exec {boot}", peer, self.cold_once,
                                     f"exec {boot}", boot)

    def hard_once(self, peer, name):
        extra, count, path = HARD[name]
        if name == "thaw":
            peer.start_timeout = FROZEN_START_TIMEOUT
        frozen = 0
        try:
            client = self.cold_client(peer, "burst", count, path, **extra)
            if name == "thaw":
                frozen = self.freeze(peer, client)
            first, last, ok, status = self.read_client(client)
        finally:
            peer.start_timeout = type(peer).start_timeout
            peer.stop()
        self.record(f"hard {name}", peer, last - frozen)
        self.record(f"hard {name} ok", peer, ok)
        if ok < count:
            self.record(f"hard {name} status", peer, status)

    def freeze(self, peer, client):
        """Stops the peer and its target for a while, as a platform does."""
        time.sleep(FREEZE_AFTER)
        root = peer.running.process if peer.running else client
        pids = [pid for pid in family(root.pid) if pid != client.pid]
        start = time.monotonic_ns()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(FREEZE_FOR)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        return time.monotonic_ns() - start

    def hard(self):
        for name in HARD:
            for i in range(min(self.options.rounds, 3)):
                for peer in self.starters():
                    if i < peer.rounds and peer.warm:
                        self.attempt(f"hard {name}", peer, self.hard_once, name)

    def start_once(self, peer):
        command, port, env = peer.prepare(BENCH_BOOT_MS="0")
        ns, = self.ask(peer, "start", port, *command, env=env, cwd=peer.cwd())
        self.record("start", peer, ns)

    def start(self):
        for i in range(20):
            for peer in self.peers:
                if i < 20 / peer.slowness and peer.clients_reach_it:
                    self.attempt("start", peer, self.start_once)

    # Crashes

    def crash_once(self, peer, method):
        """The target is killed while 16 connections are at work."""
        peer.start(BENCH_BOOT_MS="200")
        try:
            self.ask(peer, "cold", peer.port)
            client = self.run_client(peer, "crash", peer.port, 16, 3, method)
            time.sleep(1)
            for pid in peer.running.targets():
                os.kill(pid, signal.SIGKILL)
            ok, failed, gap = self.read_client(client)
            if peer.running.process.poll() is not None:
                self.record(f"crash {method} exit", peer, 1)
        finally:
            peer.stop()
        self.record(f"crash {method} ok", peer, ok)
        self.record(f"crash {method} failed", peer, failed)
        self.record(f"crash {method}", peer, gap)

    def crash(self):
        for method in ("GET", "POST"):
            for i in range(min(self.options.rounds, 3)):
                for peer in self.peers:
                    # Behind the adapter it is Lambda that would restart it.
                    if (peer.spawns and i < peer.rounds and peer.warm
                            and peer.clients_reach_it):
                        self.attempt(f"crash {method}", peer, self.crash_once,
                                     method)

    # Requests after the first

    def latency(self, peer):
        count = int(3000 * min(self.options.seconds, 2) / peer.slowness)
        p50, p99, _ = self.ask(peer, "latency", peer.port, count)
        self.record("p50", peer, p50)
        self.record("p99", peer, p99)
        # With one request at a time, client, proxy and target either share a
        # processor or wake each other across two, which takes ten times as
        # long. The scheduler's choice outweighs everything that they do.
        processors = os.sched_getaffinity(0)
        pin_to({min(processors)})
        try:
            p50, _, _ = self.ask(peer, "latency", peer.port, count)
        finally:
            pin_to(processors)
        self.record("p50 on one", peer, p50)

    def throughput(self, peer, connections, path="/", script=None):
        cpu = peer.running.cpu()
        done = subprocess.run(
            ["wrk", "-t1", f"-c{connections}", f"-d{self.options.seconds}s",
             *(["-s", str(script)] if script else []),
             f"http://127.0.0.1:{peer.port}{peer.prefix}{path}"],
            capture_output=True, text=True, timeout=self.options.seconds + 30,
            preexec_fn=die_with_us)
        cpu = peer.running.cpu() - cpu
        requests = int(re.search(r"(\d+) requests in", done.stdout)[1])
        for bad in re.findall(r"(?:Socket errors|Non-2xx).*", done.stdout):
            self.note(f"{peer.name}, {connections} connections: {bad}")
        rate = float(re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)[1])
        return rate, cpu / max(requests, 1) * 1e9

    def gets(self, peer, connections):
        rate, cpu = self.throughput(peer, connections)
        self.record(f"req/s {connections}", peer, rate)
        if not isinstance(peer, Direct):
            self.record(f"cpu {connections}", peer, cpu)

    def posts(self, peer):
        script = self.dir / "post.lua"
        script.write_text('wrk.method = "POST"\n'
                          'wrk.body = string.rep("x", 100)\n')
        rate, _ = self.throughput(peer, 16, "/upload", script)
        self.record("post", peer, rate)

    def first_event(self, peer):
        p50, _, _ = self.ask(peer, "event", peer.port,
                             max(3, peer.streams // peer.slowness)
                             if peer.slowness >= 50 else peer.streams)
        self.record("event", peer, p50)

    def bulk(self, peer, direction):
        if direction == "up" and not peer.clients_reach_it:
            return  # Lambda takes 6 MB
        size = self.options.bytes
        if peer.slowness >= 10:
            size //= 20
        ns, = self.ask(peer, direction, peer.port, size)
        self.record(direction, peer, size / ns * 1e3)  # MB/s

    def warm_rows(self):
        rows = (
            ("p50", self.latency, ()),
            ("req/s 16", self.gets, (16,)),
            ("req/s 64", self.gets, (64,)),
            ("post", self.posts, ()),
            ("event", self.first_event, ()),
            ("down", self.bulk, ("down",)),
            ("up", self.bulk, ("up",)),
        )
        return [r for r in rows if self.wants(r[0])]

    def warm(self):
        target = next((p for p in self.peers if isinstance(p, Direct)),
                      Direct(self, "direct"))
        target.start()
        started = []
        for peer in filter(lambda p: p.warm, self.peers):
            if peer is not target:
                self.attempt("running", peer, lambda p: p.start(
                    None if p.spawns else target.port))
            if peer.running:
                self.attempt("first request", peer,
                             lambda p: self.ask(p, "cold", p.port))
                started.append(peer)
        rows = self.warm_rows()
        for i in range(self.options.rounds):
            for row, function, arguments in rows:
                # In any order: a peer that always followed the same one would
                # be measured while that one still winds down.
                for peer in random.sample(started, len(started)):
                    if i < peer.rounds:
                        self.attempt(row, peer, function, *arguments)
        for peer in started:
            peer.stop()
        target.stop()

    # What it costs

    def bytes_each(self, mode, peer, count):
        """Resident bytes that each of so many connections adds."""
        self.ask(peer, "load", peer.port, 1, 100)
        time.sleep(0.2)
        before = peer.running.rss()
        client = self.run_client(peer, mode, peer.port, count,
                                 stdin=subprocess.PIPE)
        try:
            if client.stdout.readline() != "ready\n":
                raise Failed("does not hold so many connections")
            return (peer.running.rss() - before) / count
        finally:
            client.stdin.close()
            client.wait(30)
            client.stdout.close()
            client.stderr.close()

    def memory_once(self, peer, target_port):
        for row, count in (("idle", 900), ("busy", 200)):
            peer.start(None if peer.spawns else target_port)
            try:
                if row == "idle":
                    if peer.from_exec:
                        self.ask(peer, "cold", peer.port)
                    self.record("rest", peer, peer.running.rss())
                if peer.clients_reach_it and peer.slowness < 50:
                    self.record(row, peer, self.bytes_each(row, peer, count))
            finally:
                peer.stop()

    def memory(self):
        target = Direct(self, "target")
        target.start()
        for peer in self.peers:
            if not isinstance(peer, Direct):
                self.attempt("memory", peer, self.memory_once, target.port)
        target.stop()

    def size(self):
        for peer in self.peers:
            if hasattr(peer, "binary") and (peer.name == "static"
                                            or not isinstance(peer, Warmproxy)):
                self.record("size", peer, os.path.getsize(peer.binary))

    def cpu_growth(self, peer, target_port):
        """Processor time per request, with 1 and with 1,000 connections."""
        for connections in (1, 1000):
            peer.start(None if peer.spawns else target_port)
            try:
                self.ask(peer, "load", peer.port, connections, 1000)
                count = int(20000 / peer.slowness)
                before = peer.running.cpu()
                self.ask(peer, "load", peer.port, connections, count)
                self.record(f"load {connections}", peer,
                            (peer.running.cpu() - before) / count * 1e9)
            finally:
                peer.stop()

    def instructions_once(self, peer, target_port, counter):
        for connections in (1, 1000):
            totals = []
            for count in (2000, 6000):
                report = self.dir / "instructions"
                command, peer.port, env = peer.prepare(target_port)
                if counter == "perf":
                    wrapped = ["perf", "stat", "-x,", "-e", "instructions:u",
                               "-o", str(report), *command]
                else:
                    wrapped = ["valgrind", "--tool=callgrind",
                               "--max-threads=2048",
                               f"--callgrind-out-file={report}", *command]
                running = Running(wrapped, peer.port, env, peer.cwd(), self.log)
                try:
                    self.ask(peer, "load", peer.port, connections, count)
                finally:
                    running.stop()
                text = report.read_text()
                found = (re.search(r"^(\d+),.*instructions", text, re.M)
                         if counter == "perf" else
                         re.search(r"^(?:totals|summary): (\d+)", text, re.M))
                if not found:
                    raise Failed(f"{counter} counted nothing")
                totals.append(int(found[1]))
            self.record(f"instructions {connections}", peer,
                        (totals[1] - totals[0]) / 4000)

    def processor(self):
        target = Direct(self, "target")
        target.start()
        for peer in self.peers:
            if (peer.warm and peer.slowness < 50
                    and not isinstance(peer, Direct)):
                self.attempt("processor time", peer, self.cpu_growth,
                             target.port)
        counter = self.counter()
        if counter:
            for peer in self.peers:
                # A target of its own would be counted too, so it uses ours.
                if isinstance(peer, Warmproxy) and peer.warm:
                    self.attempt("instructions", peer, self.instructions_once,
                                 target.port, counter)
        target.stop()

    def counter(self):
        if shutil.which("perf"):
            tried = subprocess.run(
                ["perf", "stat", "-e", "instructions:u", "true"],
                capture_output=True, text=True)
            if tried.returncode == 0 and "not supported" not in tried.stderr:
                return "perf"
        if shutil.which("valgrind"):
            return "callgrind"
        self.note("no instructions counted: neither perf nor valgrind")
        return None

    # All of it

    def wants(self, row):
        return (not self.options.rows
                or any(row.startswith(r) for r in self.options.rows.split(",")))

    def run(self):
        for name in ("cold", "hard", "start", "crash", "memory", "size",
                     "processor"):
            if self.wants(name):
                getattr(self, name)()
        if any(map(self.wants, ("p50", "req/s", "post", "event", "down",
                                "up"))):
            self.warm()

    def get(self, row, name):
        return self.values.get((row, name), [])
