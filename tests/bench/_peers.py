"""The programs that are measured, and how to run them."""

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PYTHON = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else "python3"
JUPYTER = "jupyter-server-proxy==4.6.*"

libc = ctypes.CDLL(None)


class Failed(Exception):
    pass


# Processes


def die_with_us():
    libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def lead_a_group():
    # Not a session: Linux may schedule each session as a group of its own.
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
    raise Failed(f"{process.args[0]} does not listen on {port}")


def family(pid):
    """A process and its descendants: pid -> name."""
    names, parents = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, fields = stat.read_text().rsplit(")", 1)
        except OSError:  # it has ended
            continue
        names[int(stat.parent.name)] = head.split("(", 1)[1]
        parents[int(stat.parent.name)] = int(fields.split()[1])
    found = {pid}
    while True:
        more = {p for p, parent in parents.items() if parent in found} - found
        if not more:
            return {p: names[p] for p in found if p in names}
        found |= more


def pin_to(processors):
    """Restricts us and everything that we run to these processors, now."""
    for pid in family(os.getpid()):
        for task in Path(f"/proc/{pid}/task").glob("[0-9]*"):
            try:
                os.sched_setaffinity(int(task.name), processors)
            except OSError:  # it has ended
                pass


def first_line(*command):
    """What a program prints first, or None where it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True,
                              timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[0] if lines else None


class Running:
    """A program in the background, and what it costs."""

    everything = []
    TARGETS = ("target", "user-server")
    NOT_COUNTED = (*TARGETS, "lambda")

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
                pass
        try:  # whatever of its process group is left
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        if self in Running.everything:
            Running.everything.remove(self)

    def pids(self):
        """Its processes, without the target and without our own tools."""
        return [pid for pid, name in family(self.process.pid).items()
                if name not in Running.NOT_COUNTED]

    def targets(self):
        return [pid for pid, name in family(self.process.pid).items()
                if name in Running.TARGETS and pid != self.process.pid]

    def cpu(self):
        """Seconds of processor time so far, user and kernel."""
        ticks = 0
        for pid in self.pids():
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1]
            ticks += sum(map(int, fields.split()[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def rss(self):
        """Resident bytes; pages that its processes share are counted once."""
        total = 0
        pids = sorted(self.pids())
        for pid in pids:
            sizes = Path(f"/proc/{pid}/smaps_rollup").read_text()
            names = ("Rss",) if pid == pids[0] else \
                ("Private_Clean", "Private_Dirty")
            for name in names:
                kb = re.search(rf"^{name}:\s+(\d+)", sizes, re.M)[1]
                total += int(kb) * 1024
        return total


# Peers


class Peer:
    spawns = False  # starts a target of its own
    from_exec = False  # starts it without a request: cold starts begin at exec
    prefix = ""  # in front of every path
    slowness = 1  # gets this much less to do
    rounds = sys.maxsize  # takes part in no more than these
    streams = 100  # event streams opened in a row
    warm = True  # takes part in the warm rows
    clients_reach_it = True  # no program of ours accepts its connections
    start_timeout = 60  # seconds that a target may take, where that can be set

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
        """Command, port and environment of a new process."""
        port = self.pick_port()
        target_port = target_port or free_port()
        env = {**os.environ, **self.env(port, target_port), **extra}
        return self.command(port, target_port), port, env

    def pick_port(self):
        return free_port()

    def version(self):
        return None

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

    from_exec = True

    def command(self, port, target_port):
        return [str(self.bench.target)]


class Warmproxy(Peer):
    spawns = True

    def __init__(self, bench, name, binary):
        super().__init__(bench, name)
        self.binary = Path(binary).resolve()

    def version(self):
        line = first_line(str(self.binary), "--version")
        return line if self.name == "warmproxy" else f"{self.name}: {line}"

    def command(self, port, target_port):
        return [str(self.binary)]

    def env(self, port, target_port):
        return {
            "PORT": str(port),
            "HOST": "127.0.0.1",
            "WARMPROXY_BINARY": str(self.bench.target),
            "WARMPROXY_ARGS": "",
            "WARMPROXY_TARGET_PORT": str(target_port),
            "WARMPROXY_STARTUP_TIMEOUT": f"{self.start_timeout}s",
        }


class Nginx(Peer):
    def __init__(self, bench, name, workers):
        super().__init__(bench, name)
        self.workers = workers

    def version(self):
        return first_line("nginx", "-v")

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
    def version(self):
        line = first_line("haproxy", "-v")
        return line and " ".join(line.split()[:3])

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
    """Vercel's proxy for Go servers: runs the program beside it."""

    spawns = True
    from_exec = True
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


class LambdaAdapter(Peer):
    """AWS Lambda Web Adapter, behind a small Lambda of our own.

    It streams its results, and takes as many invocations at once as an
    instance of Lambda Managed Instances may.
    """

    spawns = True
    from_exec = True
    slowness = 10
    streams = 50
    clients_reach_it = False
    invocations = 64

    def __init__(self, bench, name, binary):
        super().__init__(bench, name)
        self.binary = Path(binary).resolve()
        self.api = bench.compile("lambda")

    def command(self, port, target_port):
        return [str(self.api), str(port), str(target_port), str(self.binary),
                str(self.bench.target)]

    def env(self, port, target_port):
        return {
            "AWS_LWA_INVOKE_MODE": "response_stream",
            "AWS_LAMBDA_MAX_CONCURRENCY": str(self.invocations),
        }


class LlamaSwap(Peer):
    spawns = True
    prefix = "/upstream/target"
    slowness = 4

    def __init__(self, bench, name, binary):
        super().__init__(bench, name)
        self.binary = Path(binary).resolve()

    def version(self):
        line = first_line(str(self.binary), "--version")
        return line and "llama-swap " + line.replace("version: ", "")

    def command(self, port, target_port):
        conf = self.bench.dir / "llama-swap.yaml"
        # Its default limit of 10 requests at once is lifted.
        conf.write_text(f"""
healthCheckTimeout: {max(15, self.start_timeout)}
logLevel: error
models:
  target:
    cmd: {self.bench.target}
    proxy: http://127.0.0.1:{target_port}
    env: ["PORT={target_port}"]
    checkEndpoint: /
    concurrencyLimit: 8192
""")
        return [str(self.binary), "--config", str(conf),
                "--listen", f"127.0.0.1:{port}"]


class JupyterServerProxy(Peer):
    spawns = True
    prefix = "/target"
    slowness = 50
    rounds = 3

    def __init__(self, bench, name):
        super().__init__(bench, name)
        self.venv = bench.dir / "jupyter"
        self.server = self.venv / "bin/jupyter-server"
        if not self.server.exists():
            self.install()

    def install(self):
        print(f"bench: installing {JUPYTER} from PyPI in {self.venv}",
              file=sys.stderr, flush=True)
        try:
            subprocess.run([PYTHON, "-m", "venv", self.venv], check=True,
                           capture_output=True, text=True)
            subprocess.run(
                [self.venv / "bin/pip", "install", "--quiet",
                 "--disable-pip-version-check", JUPYTER],
                check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as e:
            shutil.rmtree(self.venv, ignore_errors=True)
            lines = (e.stderr + e.stdout).strip().splitlines()
            raise Failed("cannot be installed: "
                         + (lines[-1] if lines else str(e)))

    def version(self):
        return first_line(
            self.venv / "bin/python", "-c",
            "from importlib.metadata import version; print(', '.join("
            "f'{n} {version(n)}' for n in ('jupyter-server-proxy', "
            "'jupyter-server', 'tornado')))")

    def command(self, port, target_port):
        conf = self.venv / "jupyter_server_config.py"
        conf.write_text(f"""
c.ServerApp.ip = "127.0.0.1"
c.ServerApp.port = {port}
c.ServerApp.port_retries = 0
c.ServerApp.open_browser = False
c.ServerApp.allow_root = True
c.ServerApp.terminals_enabled = False
c.ServerApp.root_dir = {str(self.bench.dir)!r}
c.Application.log_level = "ERROR"
c.IdentityProvider.token = ""
c.ServerProxy.servers = {{
    "target": {{
        "command": [{str(self.bench.target)!r}],
        "environment": {{"PORT": "{{port}}"}},
        "timeout": {self.start_timeout},
    }}
}}
""")
        return [str(self.server), f"--config={conf}"]

    def env(self, port, target_port):
        return {name: str(self.venv / "var") for name in (
            "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}


class Original(Peer):
    """The script that the idea began as: see _original.py."""

    spawns = True
    slowness = 100
    rounds = 2

    def version(self):
        return first_line(
            PYTHON, "-c", "import sys, fastapi, httpx, uvicorn as u; "
            "print(f'Python {sys.version.split()[0]}, FastAPI "
            "{fastapi.__version__}, httpx {httpx.__version__}, uvicorn "
            "{u.__version__}')")

    def command(self, port, target_port):
        return [PYTHON, str(HERE / "_original.py")]

    def env(self, port, target_port):
        return {
            "PORT": str(port),
            "BINARY": str(self.bench.target),
            "TARGET_PORT": str(target_port),
        }
