#!/usr/bin/env python3
"""Measures warmproxy and its peers: same machine, same target, in turns.

`make bench` installs what this needs and runs it. It prints Markdown: one table
with the ratios and their spread, what the goals are and which were missed, and
the conditions. It also draws a picture of the cold starts. Nothing is asserted.

Environment:
  BENCH_ROUNDS    interleaved rounds (5)
  BENCH_SECONDS   length of one wrk run (2)
  IPC_PROXY       Vercel's ipc-proxy, an executable: bin/proxy-linux-amd64 of
                  the npm package @vercel/go. It always listens on port 3000.
  LLAMA_SWAP      llama-swap, an executable
  LAMBDA_ADAPTER  AWS Lambda Web Adapter, an executable
A peer that is not there is named in the output.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys

sys.dont_write_bytecode = True  # no __pycache__ in the checkout

from _measure import Measure  # noqa: E402
from _peers import (HERE, PYTHON, Direct, Failed, Haproxy,  # noqa: E402
                    IpcProxy, JupyterServerProxy, LambdaAdapter, LlamaSwap,
                    Nginx, Original, Running, Warmproxy)
from _report import Report  # noqa: E402

ROOT = HERE.parent.parent
GB = 1_000_000_000
PAGE = HERE / "README.md"
FIGURES = re.compile(
    r"(?s)(<!-- figures -->\n).*(<!-- end of figures -->\n)")


def wants_peer(measure, name):
    wanted = measure.options.peers
    return not wanted or name in wanted.split(",")


def given_peer(measure, kind, name, path, variable):
    """A peer whose executable the user has."""
    if not wants_peer(measure, name):
        return
    if path and os.access(path, os.X_OK):
        measure.peers.append(kind(measure, name, path))
    else:
        measure.note(f"{name} left out: {variable} names no executable")


def add_peers(measure):
    options = measure.options
    peers = measure.peers
    peers.append(Warmproxy(measure, "warmproxy", options.warmproxy))
    for text in options.compare:
        name, path = text.split("=", 1) if "=" in text else ("before", text)
        peers.append(Warmproxy(measure, name, path))
    if options.static and os.access(options.static, os.X_OK):
        # What a function has. Once it runs, it is the same program.
        peers.append(Warmproxy(measure, "static", options.static))
        peers[-1].warm = False
    peers.append(Direct(measure, "direct"))
    if shutil.which("nginx"):
        peers += [Nginx(measure, "nginx-1", "1"),
                  Nginx(measure, "nginx-auto", "auto")]
    else:
        measure.note("nginx left out: not installed")
    if shutil.which("haproxy"):
        peers.append(Haproxy(measure, "haproxy"))
    else:
        measure.note("haproxy left out: not installed")
    given_peer(measure, IpcProxy, "ipc-proxy", options.ipc_proxy, "IPC_PROXY")
    given_peer(measure, LambdaAdapter, "lambda-adapter", options.lambda_adapter,
               "LAMBDA_ADAPTER")
    given_peer(measure, LlamaSwap, "llama-swap", options.llama_swap,
               "LLAMA_SWAP")
    add_python_peers(measure)
    measure.peers = [p for p in peers if wants_peer(measure, p.name)]


def add_python_peers(measure):
    name = "jupyter-server-proxy"
    if wants_peer(measure, name):  # it may have to be installed first
        try:
            measure.peers.append(JupyterServerProxy(measure, name))
        except Failed as e:
            measure.note(f"{name} left out: {e}")
    if subprocess.run([PYTHON, "-c", "import fastapi, httpx, uvicorn"],
                      capture_output=True).returncode == 0:
        measure.peers.append(Original(measure, "original"))
    else:
        measure.note("original left out: no fastapi, httpx or uvicorn")


def parse_options():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0],
        epilog=__doc__.split("\n\n", 2)[2],
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cold-starts", type=int, metavar="N", default=0,
                        help="of every kind (20, 15, 5 and 3, by boot time)")
    parser.add_argument("--rounds", type=int,
                        default=int(os.environ.get("BENCH_ROUNDS", 5)))
    parser.add_argument("--seconds", type=int,
                        default=int(os.environ.get("BENCH_SECONDS", 2)))
    parser.add_argument("--bytes", type=int, default=GB,
                        help="of an upload and a download (1 GB)")
    parser.add_argument("--warmproxy", default=ROOT / "build/warmproxy")
    parser.add_argument("--static", metavar="PATH",
                        help="the static executable: its cold starts, start, "
                        "memory and size")
    parser.add_argument("--compare", metavar="[NAME=]PATH", action="append",
                        default=[], help="another build of warmproxy as one "
                        "more peer (named \"before\")")
    parser.add_argument("--ipc-proxy", metavar="PATH",
                        default=os.environ.get("IPC_PROXY"))
    parser.add_argument("--lambda-adapter", metavar="PATH",
                        default=os.environ.get("LAMBDA_ADAPTER"))
    parser.add_argument("--llama-swap", metavar="PATH",
                        default=os.environ.get("LLAMA_SWAP"))
    parser.add_argument("--peers", help="only these, separated by commas")
    parser.add_argument("--rows", help="only these: cold, hard, start, crash, "
                        "memory, size, processor, p50, req/s, post, event, "
                        "down, up")
    parser.add_argument("--limit", type=float, metavar="SECONDS",
                        default=float("inf"), help="begin nothing after that")
    parser.add_argument("--dir", default=ROOT / "build/bench",
                        help="for executables, logs, figures.json and the "
                        "picture")
    parser.add_argument("--publish", action="store_true",
                        help="put the table into tests/bench/README.md and the "
                        "picture beside it")
    parser.add_argument("--verbose", action="store_true")
    return parser.parse_args()


def check_tools(options):
    for tool in ("wrk", os.environ.get("CXX", "g++")):
        if not shutil.which(tool):
            sys.exit(f"bench: {tool} is not installed; `make bench` does that")
    for path in (options.warmproxy,
                 *(text.split("=", 1)[-1] for text in options.compare)):
        if not os.access(path, os.X_OK):
            sys.exit(f"bench: {path} is not an executable")
    if options.publish and not FIGURES.search(PAGE.read_text()):
        sys.exit(f"bench: no place for the figures in {PAGE}")


def draw(measure, figures, picture):
    done = subprocess.run([PYTHON, HERE / "_picture.py", figures, picture],
                          capture_output=True, text=True)
    if done.returncode != 0:
        measure.note("no picture: " + done.stderr.strip().splitlines()[-1])


def publish(markdown):
    """Replaces what is between the two comments in README.md."""
    PAGE.write_text(FIGURES.sub(lambda m: f"{m[1]}{markdown}\n{m[2]}",
                                PAGE.read_text()))


def main():
    options = parse_options()
    os.environ["PATH"] += ":/usr/sbin"  # nginx and haproxy, for ordinary users
    check_tools(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    load_before = os.getloadavg()[0]
    measure = Measure(options)
    add_peers(measure)
    try:
        measure.run()
    except KeyboardInterrupt:
        measure.note("interrupted")
    finally:
        for running in list(Running.everything):
            running.stop()
    figures = measure.dir / "figures.json"
    figures.write_text(json.dumps(
        [{"row": row, "peer": peer, "values": values}
         for (row, peer), values in measure.values.items()], indent=1))
    draw(measure, figures,
         (HERE if options.publish else measure.dir) / "cold-start.svg")
    markdown = Report(measure).markdown(load_before)
    print(markdown)
    if options.publish:
        publish(markdown)


if __name__ == "__main__":
    main()
