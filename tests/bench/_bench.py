#!/usr/bin/env python3
"""Warmproxy beside its peers: same machine, same target, in turns.

`make bench` installs what this needs and calls it. It prints Markdown: a table
of ratios (median and spread over the rounds), one of plain figures, and what
they were taken on. Nothing is asserted: a figure that misses its goal says so.

  BENCH_ROUNDS   interleaved rounds (5)
  BENCH_SECONDS  length of one wrk run (2)
  IPC_PROXY      Vercel's ipc-proxy, an executable; left out where there is none.
                 It ships in the npm package @vercel/go, as
                 bin/proxy-linux-amd64. It always listens on port 3000.
"""

import argparse
import ctypes
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PYTHON = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else "python3"
GB = 1_000_000_000

libc = ctypes.CDLL(None)


# Running things


def die_with_us():
    libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def lead_a_group():
    # Not a session, each of which Linux may schedule as a group of its own.
    os.setpgrp()
    die_with_us()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def is_free(port):
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def wait_for_listener(port, process):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.005)
    raise RuntimeError(f"{process.args[0]} does not listen on {port}")


def family(pid, without=()):
    """A process and all below it, but for those whose name ends so."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, fields = stat.read_text().rsplit(")", 1)
        except OSError:
            continue
        if not without or not name.endswith(without):
            parents[int(stat.parent.name)] = int(fields.split()[1])
    mine = {pid}
    while True:
        more = {p for p, parent in parents.items() if parent in mine} - mine
        if not more:
            return mine
        mine |= more


def keep_to(processors):
    """Puts us and all that we run on these, now."""
    for pid in family(os.getpid()):
        for task in Path(f"/proc/{pid}/task").glob("[0-9]*"):
            try:
                os.sched_setaffinity(int(task.name), processors)
            except OSError:  # it has ended
                pass


class Running:
    """A program in the background, and what it costs."""

    everything = []

    def __init__(self, command, port, env, cwd, log):
        self.process = subprocess.Popen(
            command, env=env, cwd=cwd, stdin=subprocess.DEVNULL,
            stdout=log, stderr=log, preexec_fn=lead_a_group)
        Running.everything.append(self)
        wait_for_listener(port, self.process)

    def stop(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        if self in Running.everything:
            Running.everything.remove(self)

    def pids(self):
        """It and its children, but not a target that it started."""
        return family(self.process.pid, ("(target", "(user-server"))

    def cpu(self):
        """Seconds of processor time so far, user and kernel."""
        ticks = 0
        for pid in self.pids():
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1]
            ticks += sum(map(int, fields.split()[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def rss(self):
        """Resident bytes, what its processes share counted once."""
        total = 0
        for pid in self.pids():
            sizes = Path(f"/proc/{pid}/smaps_rollup").read_text()
            names = ("Rss",) if pid == self.process.pid else \
                ("Private_Clean", "Private_Dirty")
            for name in names:
                kb = re.search(rf"^{name}:\s+(\d+)", sizes, re.M)[1]
                total += int(kb) * 1024
        return total


class Failed(Exception):
    pass


# The peers


class Peer:
    spawns = False  # starts a target of its own
    eager = False  # listens only once its target does
    holds_bodies = False  # passes nothing on before it has it all
    slowness = 1  # gets that much less to do
    rounds = sys.maxsize  # takes part in no more than these
    warm = True  # takes part in them at all

    def __init__(self, bench, name):
        self.bench, self.name = bench, name
        self.port = None
        self.running = None

    def command(self, port, target_port):
        raise NotImplementedError

    def env(self, port, target_port):
        return {"PORT": str(port)}

    def cwd(self):
        return self.bench.dir

    def prepare(self, target_port=None, **extra):
        """What to run, where it will listen."""
        port = self.pick_port()
        target_port = target_port or free_port()
        env = {**os.environ, **self.env(port, target_port), **extra}
        return self.command(port, target_port), port, env

    def pick_port(self):
        return free_port()

    def start(self, target_port=None, **extra):
        command, self.port, env = self.prepare(target_port, **extra)
        self.running = Running(command, self.port, env, self.cwd(),
                               self.bench.log)

    def stop(self):
        if self.running:
            self.running.stop()
            self.running = None


class Direct(Peer):
    """No proxy: the target itself."""

    def command(self, port, target_port):
        return [str(self.bench.target)]


class Warmproxy(Peer):
    spawns = True

    def __init__(self, bench, name, binary):
        super().__init__(bench, name)
        self.binary = binary

    def command(self, port, target_port):
        return [str(self.binary)]

    def env(self, port, target_port):
        return {
            "PORT": str(port),
            "HOST": "127.0.0.1",
            "WARMPROXY_BINARY": str(self.bench.target),
            "WARMPROXY_ARGS": "",
            "WARMPROXY_TARGET_PORT": str(target_port),
        }


class Nginx(Peer):
    def __init__(self, bench, name, workers):
        super().__init__(bench, name)
        self.workers = workers

    def command(self, port, target_port):
        home = self.bench.dir / self.name
        home.mkdir(exist_ok=True)
        temporary = "\n".join(
            f"  {kind}_temp_path {home}/{kind};"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        (home / "conf").write_text(f"""
daemon off;
{"user root;" if os.geteuid() == 0 else ""}
worker_processes {self.workers};
pid {home}/pid;
error_log {home}/errors;
events {{ worker_connections 8192; }}
http {{
{temporary}
  access_log off;
  keepalive_requests 1000000000;
  upstream target {{
    server 127.0.0.1:{target_port};
    keepalive 2048;
    keepalive_requests 1000000000;
  }}
  server {{
    listen 127.0.0.1:{port};
    client_max_body_size 0;
    location / {{
      proxy_pass http://target;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_request_buffering off;
    }}
  }}
}}
""")
        return ["nginx", "-p", str(home), "-e", f"{home}/errors",
                "-c", f"{home}/conf"]


class Haproxy(Peer):
    def command(self, port, target_port):
        conf = self.bench.dir / "haproxy.conf"
        conf.write_text(f"""
global
  maxconn 8192
defaults
  mode http
  option http-no-delay
  timeout connect 5s
  timeout client 1h
  timeout server 1h
  http-reuse always
frontend front
  bind 127.0.0.1:{port}
  default_backend back
backend back
  server target 127.0.0.1:{target_port}
""")
        return ["haproxy", "-db", "-f", str(conf)]


class IpcProxy(Peer):
    spawns = True
    eager = True
    slowness = 2

    def __init__(self, bench, name, binary):
        super().__init__(bench, name)
        self.binary = Path(binary).resolve()
        shutil.copy(bench.target, bench.dir / "user-server")

    def command(self, port, target_port):
        return [str(self.binary)]

    def pick_port(self):
        for _ in range(100):
            if is_free(3000):
                return 3000
            time.sleep(0.05)
        raise Failed("port 3000, the only one it takes, is in use")


class Original(Peer):
    spawns = True
    holds_bodies = True
    slowness = 100
    rounds = 2

    def command(self, port, target_port):
        return [PYTHON, str(HERE / "_original.py")]

    def env(self, port, target_port):
        return {
            "PORT": str(port),
            "BINARY": str(self.bench.target),
            "TARGET_PORT": str(target_port),
        }


# Measuring


class Bench:
    def __init__(self, options):
        self.options = options
        self.began = time.monotonic()
        self.dir = Path(options.dir)
        self.dir.mkdir(parents=True, exist_ok=True)
        self.dir = self.dir.resolve()
        self.log = open(self.dir / "log", "w")
        self.target = self.compile("target")
        self.client = self.compile("client")
        self.values = {}  # (what, peer) -> one number a round
        self.notes = []

        warm = Path(options.warmproxy).resolve()
        peers = [Direct(self, "direct"), Warmproxy(self, "warmproxy", warm)]
        if options.static and os.access(options.static, os.X_OK):
            # As a function has it; once it runs, it is the same program.
            peers.append(Warmproxy(self, "static",
                                   Path(options.static).resolve()))
            peers[-1].warm = False
        for also in options.also:
            name, binary = also.split("=", 1)
            peers.append(Warmproxy(self, name, Path(binary).resolve()))
        if shutil.which("nginx"):
            peers += [Nginx(self, "nginx-1", "1"),
                      Nginx(self, "nginx-auto", "auto")]
        if shutil.which("haproxy"):
            peers.append(Haproxy(self, "haproxy"))
        if options.ipc_proxy and os.access(options.ipc_proxy, os.X_OK):
            peers.append(IpcProxy(self, "ipc-proxy", options.ipc_proxy))
        else:
            self.notes.append("ipc-proxy left out: IPC_PROXY names no executable")
        if subprocess.run([PYTHON, "-c", "import fastapi, httpx, uvicorn"],
                          capture_output=True).returncode == 0:
            peers.append(Original(self, "original"))
        else:
            self.notes.append("original left out: no fastapi, httpx or uvicorn")
        if options.peers:
            wanted = options.peers.split(",")
            peers = [p for p in peers if p.name in wanted]
        self.peers = peers

    def compile(self, name):
        source, binary = HERE / f"{name}.cpp", self.dir / name
        if (not binary.exists()
                or binary.stat().st_mtime < source.stat().st_mtime):
            subprocess.run([os.environ.get("CXX", "g++"), "-std=c++17", "-O2",
                            "-pthread", source, "-o", binary], check=True)
        return binary

    def say(self, text):
        if sys.stderr.isatty() or self.options.verbose:
            seconds = time.monotonic() - self.began
            print(f"{seconds:6.1f} s  {text}", file=sys.stderr, flush=True)

    def out_of_time(self):
        return time.monotonic() - self.began > self.options.limit

    def record(self, what, peer, value):
        self.values.setdefault((what, peer.name), []).append(value)

    def try_to(self, what, peer, function, *arguments):
        """A peer that fails at one thing is not measured at it: noted."""
        if self.out_of_time():
            note = "stopped at the time limit: some figures have fewer rounds"
        else:
            try:
                self.say(f"{what}: {peer.name}")
                function(peer, *arguments)
                return
            except (Failed, RuntimeError, subprocess.SubprocessError,
                    OSError) as e:
                note = f"{peer.name}, {what}: {str(e).strip()[:200]}"
        if note not in self.notes:
            self.notes.append(note)
            self.say(note)

    def ask(self, *arguments, env=None, cwd=None, timeout=120):
        """Runs our client, returns the numbers that it prints."""
        command = [str(self.client), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True,
                              timeout=timeout, env=env, cwd=cwd,
                              preexec_fn=die_with_us)
        if done.returncode != 0:
            raise Failed(done.stderr.strip().splitlines()[-1]
                         if done.stderr.strip() else f"{arguments[0]} failed")
        return [int(n) for n in done.stdout.split()]

    # The first request

    def cold_once(self, peer, what, boot):
        extra = {"BENCH_BOOT_MS": str(boot)}
        if isinstance(peer, Direct) or peer.eager or what.startswith("exec"):
            command, port, env = peer.prepare(**extra)
            ns, = self.ask("cold", port, *command, env=env, cwd=peer.cwd())
        else:
            peer.start(**extra)
            try:
                ns, = self.ask("cold", peer.port)
            finally:
                peer.stop()
        self.record(what, peer, ns)

    def cold(self):
        peers = [p for p in self.peers if p.spawns or isinstance(p, Direct)]
        for boot, count in ((0, 20), (200, 15), (1000, 5), (5000, 3)):
            for i in range(self.options.full or count):
                for peer in peers:
                    slow = isinstance(peer, Original)
                    if slow and i >= max(2, count // 5):
                        continue
                    self.try_to(f"cold {boot}", peer, self.cold_once,
                                f"cold {boot}", boot)
                    if isinstance(peer, Warmproxy) and boot == 0:
                        self.try_to(f"exec {boot}", peer, self.cold_once,
                                    f"exec {boot}", boot)

    def start_once(self, peer):
        command, port, env = peer.prepare(BENCH_BOOT_MS="0")
        ns, = self.ask("start", port, *command, env=env, cwd=peer.cwd())
        self.record("start", peer, ns)

    def start(self):
        for i in range(20):
            for peer in self.peers:
                if isinstance(peer, Original) and i >= 3:
                    continue
                self.try_to("start", peer, self.start_once)

    # The requests after it

    def latency(self, peer):
        count = int(3000 * min(self.options.seconds, 2) / peer.slowness)
        p50, p99, _ = self.ask("latency", peer.port, count)
        self.record("p50", peer, p50)
        self.record("p99", peer, p99)
        # One after the other, client, proxy and target either share a processor
        # or wake each other across two, which takes ten times as long: where
        # they run is the scheduler's mood, and more than all that they do.
        processors = os.sched_getaffinity(0)
        keep_to({min(processors)})
        try:
            p50, _, _ = self.ask("latency", peer.port, count)
        finally:
            keep_to(processors)
        self.record("p50 on one", peer, p50)

    def throughput(self, peer, connections):
        cpu = peer.running.cpu()
        done = subprocess.run(
            ["wrk", "-t1", f"-c{connections}", f"-d{self.options.seconds}s",
             f"http://127.0.0.1:{peer.port}/"],
            capture_output=True, text=True, timeout=self.options.seconds + 30,
            preexec_fn=die_with_us)
        cpu = peer.running.cpu() - cpu
        text = done.stdout
        requests = int(re.search(r"(\d+) requests in", text)[1])
        for bad in re.findall(r"(?:Socket errors|Non-2xx).*", text):
            note = f"{peer.name}, {connections} connections: {bad}"
            if note not in self.notes:
                self.notes.append(note)
        rate = float(re.search(r"Requests/sec:\s+([\d.]+)", text)[1])
        self.record(f"req/s {connections}", peer, rate)
        self.record(f"cpu {connections}", peer, cpu / max(requests, 1) * 1e9)

    def first_event(self, peer):
        if peer.holds_bodies:
            raise Failed("holds an answer until its end, which a stream has not")
        p50, _, _ = self.ask("event", peer.port, 100)
        self.record("event", peer, p50)

    def bulk(self, peer, direction):
        size = self.options.bytes
        if peer.holds_bodies:
            size //= 8
        ns, = self.ask(direction, peer.port, size)
        self.record(direction, peer, size / ns * 1e3)  # MB/s

    def warm(self):
        target = next((p for p in self.peers if isinstance(p, Direct)),
                      Direct(self, "direct"))
        target.start()
        started = []
        for peer in filter(lambda p: p.warm, self.peers):
            if peer is not target:
                self.try_to("running", peer, lambda p: p.start(
                    None if p.spawns else target.port))
            if peer.running:
                self.try_to("first request", peer,
                            lambda p: self.ask("cold", p.port))
                started.append(peer)
        rows = [
            ("p50", self.latency, ()),
            ("req/s 16", self.throughput, (16,)),
            ("req/s 64", self.throughput, (64,)),
            ("event", self.first_event, ()),
            ("down", self.bulk, ("down",)),
            ("up", self.bulk, ("up",)),
        ]
        rows = [r for r in rows if self.wants(r[0])]
        for i in range(self.options.rounds):
            # Another one begins each time: no peer always runs after another.
            order = started[i % len(started):] + started[:i % len(started)]
            for what, function, arguments in rows:
                for peer in order:
                    if i >= peer.rounds:
                        continue
                    self.try_to(what, peer, function, *arguments)
        for peer in started:
            peer.stop()
        target.stop()

    # What it costs

    def hold(self, mode, peer, count):
        """Resident bytes that each of so many connections adds."""
        self.ask("load", peer.port, 1, 100)
        time.sleep(0.2)
        before = peer.running.rss()
        client = subprocess.Popen(
            [self.client, mode, str(peer.port), str(count)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            preexec_fn=die_with_us)
        try:
            if client.stdout.readline() != "ready\n":
                raise Failed("does not hold so many connections")
            return (peer.running.rss() - before) / count
        finally:
            client.stdin.close()
            client.wait(30)
            client.stdout.close()

    def memory_once(self, peer, target_port):
        for what, mode, count in (("idle", "idle", 900), ("busy", "busy", 200)):
            peer.start(None if peer.spawns else target_port)
            try:
                if what == "idle":
                    self.record("rest", peer, peer.running.rss())
                self.record(what, peer, self.hold(mode, peer, count))
            finally:
                peer.stop()

    def memory(self):
        target = Direct(self, "target")
        target.start()
        for peer in self.peers:
            if not isinstance(peer, Direct) and not peer.holds_bodies:
                self.try_to("memory", peer, self.memory_once, target.port)
        target.stop()

    def size(self):
        for peer in self.peers:
            if peer.name in ("static", "ipc-proxy"):
                self.record("size", peer, os.path.getsize(peer.binary))

    # Processor

    def cpu_growth(self, peer, target_port):
        """Processor time a request, with 1 and with 1,000 connections."""
        for connections in (1, 1000):
            peer.start(None if peer.spawns else target_port)
            try:
                self.ask("load", peer.port, connections, 1000)
                count = int(20000 / peer.slowness)
                before = peer.running.cpu()
                self.ask("load", peer.port, connections, count)
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
                    self.ask("load", peer.port, connections, count)
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
            if isinstance(peer, (Direct, Original)) or not peer.warm:
                continue
            self.try_to("processor time", peer, self.cpu_growth, target.port)
        counter = self.counter()
        if counter:
            for peer in self.peers:
                # The target is attached to, or it would be counted too.
                if isinstance(peer, Warmproxy) and peer.warm:
                    self.try_to("instructions", peer, self.instructions_once,
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
        self.notes.append("no instructions counted: neither perf nor valgrind")
        return None

    # What comes out

    def wants(self, row):
        return (not self.options.rows
                or any(row.startswith(r) for r in self.options.rows.split(",")))

    def run(self):
        if self.wants("cold"):
            self.cold()
        if self.wants("start"):
            self.start()
        if self.wants("memory"):
            self.memory()
        if self.wants("size"):
            self.size()
        if self.wants("processor"):
            self.processor()
        if any(map(self.wants, ("p50", "req/s", "event", "down", "up"))):
            self.warm()

    def get(self, what, name):
        return self.values.get((what, name), [])

    def ratios(self, what, name, other):
        return [a / b for a, b in zip(self.get(what, name),
                                      self.get(what, other)) if b]

    def print_goals(self):
        rows = []

        def row(what, goal, values, show, holds):
            if not values:
                return
            middle = statistics.median(values)
            spread = f" ({show(min(values))} .. {show(max(values))})" \
                if len(values) > 1 else ""
            verdict = "" if holds is None else \
                ("yes" if holds(middle, max(values)) else "no")
            rows.append(f"| {what} | {goal} | {show(middle)}{spread} | "
                        f"{verdict} |")

        def ms(ns):
            return f"{ns / 1e6:.2f} ms"

        def times(ratio):
            return f"{ratio:.2f} ×"

        for name in [p.name for p in self.peers if isinstance(p, Warmproxy)]:
            suffix = "" if name == "warmproxy" else f", {name}"
            for boot in (0, 200, 1000, 5000):
                alone = self.get(f"cold {boot}", "direct")
                if not alone:
                    continue
                alone = statistics.median(alone)
                row(f"cold, target boots {boot / 1000:g} s: added to the first "
                    f"answer{suffix}", "median ≤ 3 ms, worst ≤ 15 ms",
                    [v - alone for v in self.get(f"cold {boot}", name)], ms,
                    lambda m, worst: m <= 3e6 and worst <= 15e6)
                row(f"the same from our own exec{suffix}", "–",
                    [v - alone for v in self.get(f"exec {boot}", name)], ms,
                    None)
            for other in ("nginx-1", "haproxy"):
                row(f"warm, 1 connection: p50 against {other}{suffix}",
                    "≤ 1.00 ×" if other == "nginx-1" else "–",
                    self.ratios("p50", name, other), times,
                    (lambda m, _: m <= 1) if other == "nginx-1" else None)
            for other in ("nginx-1", "haproxy"):
                row("the same, all on one processor: p50 against "
                    f"{other}{suffix}",
                    "≤ 1.00 ×" if other == "nginx-1" else "–",
                    self.ratios("p50 on one", name, other), times,
                    (lambda m, _: m <= 1) if other == "nginx-1" else None)
            for connections in (16, 64):
                for other, goal in (("nginx-1", 1), ("nginx-auto", 1),
                                    ("haproxy", 0), ("ipc-proxy", 4),
                                    ("original", 0)):
                    row(f"warm, {connections} connections: req/s against "
                        f"{other}{suffix}",
                        f"≥ {goal:.2f} ×" if goal else "–",
                        self.ratios(f"req/s {connections}", name, other), times,
                        (lambda m, _, goal=goal: m >= goal) if goal else None)
            for direction in ("down", "up"):
                for other in ("nginx-1", "nginx-auto"):
                    row(f"{self.options.bytes / GB:g} GB {direction}: rate "
                        f"against {other}{suffix}", "≥ 1.00 ×",
                        self.ratios(direction, name, other), times,
                        lambda m, _: m >= 1)
            row(f"first byte of an event stream, added{suffix}", "≤ 0.2 ms",
                [a - b for a, b in zip(self.get("event", name),
                                       self.get("event", "direct"))],
                ms, lambda m, _: m <= 0.2e6)
            row(f"our own start: exec to listening{suffix}", "≤ 5 ms",
                self.get("start", name), ms, lambda m, _: m <= 5e6)
            row(f"memory at rest{suffix}", "≤ 4 MB", self.get("rest", name),
                lambda b: f"{b / 1e6:.1f} MB", lambda m, _: m <= 4e6)
            row(f"memory, each idle connection{suffix}", "≤ 24 KB",
                self.get("idle", name), lambda b: f"{b / 1024:.1f} KB",
                lambda m, _: m <= 24 * 1024)
            row(f"memory, each busy stream{suffix}", "≤ 64 KB",
                self.get("busy", name), lambda b: f"{b / 1024:.1f} KB",
                lambda m, _: m <= 64 * 1024)
            row(f"static executable, stripped{suffix}", "≤ 2 MB",
                self.get("size", name), lambda b: f"{b / 1e6:.2f} MB",
                lambda m, _: m <= 2e6)
            one, many = (self.get(f"instructions {n}", name) for n in (1, 1000))
            row(f"instructions a request, user{suffix}", "stated", one,
                lambda n: f"{n:,.0f}", None)
            row(f"the same with 1,000 connections{suffix}", "stated", many,
                lambda n: f"{n:,.0f}", None)
            row(f"processor time a request, 1 connection{suffix}", "stated",
                self.get("load 1", name), lambda ns: f"{ns / 1e3:.1f} µs", None)
            row(f"the same with 1,000 connections{suffix}", "stated",
                self.get("load 1000", name), lambda ns: f"{ns / 1e3:.1f} µs",
                None)
        if rows:
            print("| what | to reach | median (min .. max) | reached |")
            print("|---|---|---|---|")
            print("\n".join(rows), end="\n\n")

    def print_figures(self):
        def us(ns):
            return f"{ns / 1e3:.1f}"

        def ms(ns):
            return f"{ns / 1e6:.1f}"

        def plain(n):
            return f"{n:,.0f}"

        def kb(n):
            return f"{n / 1024:,.1f}"

        rows = [(f"cold {b}", f"first answer, boot {b / 1000:g} s, ms", ms)
                for b in (0, 200, 1000, 5000)]
        rows += [
            ("exec 0", "first answer from our exec, boot 0 s, ms", ms),
            ("start", "exec to listening, ms", ms),
            ("p50", "p50, 1 connection, µs", us),
            ("p99", "p99, 1 connection, µs", us),
            ("p50 on one", "p50, 1 connection, all on one processor, µs", us),
            ("req/s 16", "req/s, 16 connections", plain),
            ("req/s 64", "req/s, 64 connections", plain),
            ("cpu 16", "processor time a request, 16 connections, µs", us),
            ("cpu 64", "processor time a request, 64 connections, µs", us),
            ("load 1", "processor time a request, 1 connection, µs", us),
            ("load 1000", "processor time a request, 1,000 connections, µs",
             us),
            ("event", "first byte of an event stream, µs", us),
            ("down", "download, MB/s", plain),
            ("up", "upload, MB/s", plain),
            ("rest", "memory at rest, KB", kb),
            ("idle", "memory, each idle connection, KB", kb),
            ("busy", "memory, each busy stream, KB", kb),
            ("size", "executable, KB", kb),
        ]
        names = [p.name for p in self.peers]
        print("| median | " + " | ".join(names) + " |")
        print("|---|" + "---:|" * len(names))
        for what, label, show in rows:
            cells = [show(statistics.median(v)) if v else ""
                     for v in (self.get(what, n) for n in names)]
            if any(cells):
                print(f"| {label} | " + " | ".join(cells) + " |")
        print()

    def print_conditions(self):
        def version(*command):
            try:
                done = subprocess.run(command, capture_output=True, text=True,
                                      timeout=10)
            except OSError:
                return None
            lines = (done.stdout + done.stderr).strip().splitlines()
            return lines[0] if lines else None

        model = re.search(r"model name\s*:\s*(.+)",
                          Path("/proc/cpuinfo").read_text())
        libraries = version(PYTHON, "-c",
                            "import sys, fastapi, httpx, uvicorn as u; print("
                            "f'Python {sys.version.split()[0]}, FastAPI "
                            "{fastapi.__version__}, httpx {httpx.__version__}, "
                            "uvicorn {u.__version__}')")
        if libraries and not libraries.startswith("Python"):
            libraries = None
        wrk = version("wrk", "-v")
        haproxy = version("haproxy", "-v")
        versions = [
            version("nginx", "-v"),
            haproxy and " ".join(haproxy.split()[:3]),
            wrk and " ".join(wrk.split()[:2]),
            libraries,
            version(os.environ.get("CXX", "g++"), "--version"),
        ]
        print(f"{time.strftime('%Y-%m-%d')}, Linux {platform.release()}, "
              f"{os.cpu_count()} × {model[1] if model else platform.machine()}"
              f"; {self.options.rounds} rounds, {self.options.seconds} s a "
              f"run, {(time.monotonic() - self.began) / 60:.0f} minutes in all; "
              f"load before {self.load_before:.2f}. "
              + "; ".join(v for v in versions if v) + ".")
        for note in self.notes:
            print(f"- {note}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0],
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", type=int, metavar="N", default=0,
                        help="N cold starts of every kind (50: an hour)")
    parser.add_argument("--rounds", type=int,
                        default=int(os.environ.get("BENCH_ROUNDS", 5)))
    parser.add_argument("--seconds", type=int,
                        default=int(os.environ.get("BENCH_SECONDS", 2)))
    parser.add_argument("--bytes", type=int, default=GB,
                        help="of an upload and a download (1 GB)")
    parser.add_argument("--warmproxy", default=ROOT / "build/warmproxy")
    parser.add_argument("--static", metavar="PATH",
                        help="the static executable: its size, start and memory")
    parser.add_argument("--also", metavar="NAME=PATH", action="append",
                        default=[], help="another build to set beside it")
    parser.add_argument("--ipc-proxy", default=os.environ.get("IPC_PROXY"))
    parser.add_argument("--peers", help="only these, comma separated")
    parser.add_argument("--rows", help="only these: cold, start, memory, size, "
                        "p50, req/s, event, down, up, processor")
    parser.add_argument("--limit", type=float, metavar="SECONDS",
                        help="begin nothing new after that (540; with --full, "
                        "no limit)")
    parser.add_argument("--dir", default=ROOT / "build/bench",
                        help="where to build and to keep logs")
    parser.add_argument("--json", metavar="PATH", help="every figure taken")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    if options.limit is None:
        options.limit = float("inf") if options.full else 540
    for tool in ("wrk", os.environ.get("CXX", "g++")):
        if not shutil.which(tool):
            sys.exit(f"bench: {tool} is not installed; `make bench` does that")
    if not os.access(options.warmproxy, os.X_OK):
        sys.exit(f"bench: {options.warmproxy} is not built; run `make`")

    os.environ["PATH"] += ":/usr/sbin"  # nginx and haproxy, for who is not root
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    bench = Bench(options)
    bench.load_before = os.getloadavg()[0]
    try:
        bench.run()
    except KeyboardInterrupt:
        bench.notes.append("interrupted")
    finally:
        for running in list(Running.everything):
            running.stop()
    bench.print_goals()
    bench.print_figures()
    bench.print_conditions()
    if options.json:
        Path(options.json).write_text(json.dumps(
            [{"what": what, "peer": peer, "values": values}
             for (what, peer), values in bench.values.items()], indent=1))


if __name__ == "__main__":
    main()
