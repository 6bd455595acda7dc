"""The table, the goals and the conditions, as Markdown."""

import os
import platform
import re
import statistics
import time
from pathlib import Path

from _peers import Warmproxy, first_line

TITLES = {
    "static": "warmproxy, static",
    "direct": "target alone",
    "nginx-1": "nginx, 1 worker",
    "nginx-auto": "nginx, 1 worker per CPU",
    "haproxy": "HAProxy",
    "lambda-adapter": "Lambda Web Adapter",
    "original": "the original",
}

NO_START = "does not start it"

# (start of a row's name, peer) -> what its source or documentation says.
READ = {
    ("cold", "nginx-1"): NO_START, ("cold", "nginx-auto"): NO_START,
    ("cold", "haproxy"): NO_START,
    ("hard", "nginx-1"): NO_START, ("hard", "nginx-auto"): NO_START,
    ("hard", "haproxy"): NO_START,
    ("crash", "nginx-1"): "502 until somebody restarts it",
    ("crash", "nginx-auto"): "502 until somebody restarts it",
    ("crash", "haproxy"): "503 until somebody restarts it",
    ("crash", "lambda-adapter"):
        "the invocation fails, Lambda starts a new instance",
    ("up", "lambda-adapter"): "Lambda takes 6 MB per request",
}


def ms(ns):
    return f"{ns / 1e6:,.{1 if abs(ns) < 1e9 else 0}f} ms"


def duration(ns):
    if abs(ns) < 1e6:
        return f"{ns / 1e3:.1f} µs"
    if abs(ns) < 1e9:
        return f"{ns / 1e6:.1f} ms"
    return f"{ns / 1e9:.2f} s"


def number(n):
    return f"{n:,.0f}"


def mb_per_second(n):
    return f"{n:,.0f} MB/s"


def kb(n):
    return f"{n / 1024:,.1f} KB"


def mb(n):
    return f"{n / 1e6:,.1f} MB"


def times(ratio):
    if ratio < 0.001:
        return "< 0.001 ×"
    digits = 0 if ratio >= 100 else 1 if ratio >= 10 else \
        2 if ratio >= 0.1 else 3
    return f"{ratio:,.{digits}f} ×"


# name, label, unit, kind: "added" is what is above the target alone, "ratio"
# comes with warmproxy's value divided by the peer's.
ROWS = (
    *((f"cold {b}", f"cold start, boot {b / 1000:g} s: above the target alone",
       ms, "added") for b in (0, 200, 1000, 5000)),
    ("exec 0", "cold start from the proxy's own exec, boot 0 s", ms, "added"),
    ("hard page", "one thread, `/` takes 3 s: first response of another page",
     ms, "hard"),
    ("hard burst", "200 first requests at once, boot 0.2 s: last response", ms,
     "hard"),
    ("hard 503", "503 for the first 2 s: first response", ms, "hard"),
    ("hard thaw", "boot 1.5 s, frozen for 5 s in the middle: first response, "
     "freeze not counted", ms, "hard"),
    ("start", "exec to listening", ms, "ratio"),
    ("req/s 16", "requests/s, 16 connections", number, "ratio"),
    ("req/s 64", "requests/s, 64 connections", number, "ratio"),
    ("post", "POSTs of 100 bytes/s, 16 connections", number, "ratio"),
    ("p50 on one", "p50, 1 connection, all on one processor", duration,
     "ratio"),
    ("p50", "p50, 1 connection", duration, "ratio"),
    ("p99", "p99, 1 connection", duration, "ratio"),
    ("cpu 16", "processor time per request, 16 connections", duration, "ratio"),
    ("cpu 64", "processor time per request, 64 connections", duration, "ratio"),
    ("load 1", "processor time per request, 1 connection", duration,
     "plain"),
    ("load 1000", "the same with 1,000 connections", duration, "plain"),
    ("instructions 1", "instructions per request, user space", number,
     "plain"),
    ("instructions 1000", "the same with 1,000 connections", number,
     "plain"),
    ("event", "first byte of an event stream", duration, "ratio"),
    ("down", "download", mb_per_second, "ratio"),
    ("up", "upload", mb_per_second, "ratio"),
    ("rest", "memory at rest", mb, "plain"),
    ("idle", "memory per idle connection", kb, "plain"),
    ("busy", "memory per busy stream", kb, "plain"),
    ("size", "executable", mb, "plain"),
    ("crash GET", "target killed, 16 connections: GETs not answered with 200; "
     "longest time without a 200", ms, "crash"),
    ("crash POST", "the same with POSTs", ms, "crash"),
)


def spread(values, show):
    """Median, and the extremes where there are more values than one."""
    texts = [show(v) for v in
             (statistics.median(values), min(values), max(values))]
    if len(values) < 2:
        return texts[0]
    units = {text.partition(" ")[2] for text in texts}
    if len(units) == 1:  # said once
        texts[1:] = (text.partition(" ")[0] for text in texts[1:])
    return f"{texts[0]} ({texts[1]} .. {texts[2]})"


class Report:
    def __init__(self, measured):
        self.measured = measured
        self.get = measured.get
        self.peers = measured.peers
        self.names = [p.name for p in self.peers]
        self.base = "warmproxy"

    def ratios(self, row, name, other):
        return [a / b for a, b in zip(self.get(row, name),
                                      self.get(row, other)) if b]

    def added(self, row, name):
        alone = self.get(row.replace("exec", "cold"), "direct")
        if not alone:
            return []
        return [v - statistics.median(alone) for v in self.get(row, name)]

    # The table

    def cell(self, row, name, show, kind):
        values = self.get(row, name)
        if not values:
            return self.read(row, name)
        if kind == "added":
            if name == "direct":
                return f"{spread(values, show)} in all"
            return spread(self.added(row, name), show)
        if kind == "hard":
            return self.hard_cell(row, name, show)
        if kind == "crash":
            return self.crash_cell(row, name, show)
        text = show(statistics.median(values))
        if kind == "ratio" and name != self.base:
            ratios = self.ratios(row, self.base, name)
            if ratios:
                text += f"<br>{spread(ratios, times)}"
        return text

    def read(self, row, name):
        for (start, peer), text in READ.items():
            if row.startswith(start) and peer == name:
                return f"*{text}*"
        return "–"

    def hard_cell(self, row, name, show):
        text = spread(self.get(row, name), show)
        statuses = {"no response" if s <= 1 else f"{s:.0f}"
                    for s in self.get(f"{row} status", name)}
        if not statuses:
            return text
        ok = statistics.median(self.get(f"{row} ok", name))
        count = 200 if row == "hard burst" else 1
        return f"{text}<br>**{ok:.0f} of {count}** got 200, others " \
            + ", ".join(sorted(statuses))

    def crash_cell(self, row, name, show):
        failed = sum(self.get(f"{row} failed", name))
        total = failed + sum(self.get(f"{row} ok", name))
        if self.get(f"{row} exit", name):
            return f"the proxy exits<br>{failed:,} of {total:,} failed"
        return f"{failed:,} of {total:,}<br>" \
            + spread(self.get(row, name), show)

    def table(self):
        names = self.names
        lines = ["| | " + " | ".join(TITLES.get(n, n) for n in names) + " |",
                 "|---|" + "---|" * len(names)]
        for row, label, show, kind in ROWS:
            if not any(self.get(row, n) for n in names):
                continue
            cells = [self.cell(row, n, show, kind) for n in names]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n\n" \
            "Median, with the extremes in parentheses. A second line with × " \
            "is warmproxy's figure divided by this one's, round by round. " \
            "*Italics* were read in the source or the documentation; all " \
            "else was measured in this run."

    # The goals

    def goals(self):
        """(what, goal, values, unit, whether they reach it) for each."""
        for name in [p.name for p in self.peers if isinstance(p, Warmproxy)]:
            suffix = "" if name == self.base else f", {name}"
            for what, *rest in self.goals_of(name):
                if rest[1]:
                    yield (what + suffix, *rest)

    def goals_of(self, name):
        def at_most(limit):
            return lambda values: statistics.median(values) <= limit

        def at_least(limit):
            return lambda values: statistics.median(values) >= limit

        for boot in (0, 200, 1000, 5000):
            yield (f"cold start, boot {boot / 1000:g} s: added",
                   "median ≤ 3 ms, worst ≤ 15 ms",
                   self.added(f"cold {boot}", name), ms,
                   lambda v: statistics.median(v) <= 3e6 and max(v) <= 15e6)
        for row, what, limit in (
                ("hard page", "one thread, `/` takes 3 s", 3100),
                ("hard burst", "200 first requests at once", 400),
                ("hard 503", "503 for the first 2 s", 2250),
                ("hard thaw", "frozen in the middle of a start", 1600)):
            failed = self.get(f"{row} status", name)
            yield (what, f"200 for all, within {limit} ms",
                   self.get(row, name), ms,
                   lambda v, failed=failed, limit=limit:
                   not failed and statistics.median(v) <= limit * 1e6)
        for row, other, limit in (
                ("req/s 16", "nginx-1", 1), ("req/s 16", "nginx-auto", 1),
                ("req/s 16", "ipc-proxy", 4), ("req/s 64", "nginx-1", 1),
                ("req/s 64", "nginx-auto", 1), ("req/s 64", "ipc-proxy", 4),
                ("down", "nginx-1", 1), ("down", "nginx-auto", 1),
                ("up", "nginx-1", 1), ("up", "nginx-auto", 1)):
            yield (f"{row} against {other}", f"≥ {limit} ×",
                   self.ratios(row, name, other), times, at_least(limit))
        for row in ("p50", "p50 on one"):
            yield (f"{row} against nginx-1", "≤ 1 ×",
                   self.ratios(row, name, "nginx-1"), times, at_most(1))
        yield ("first byte of an event stream, added", "≤ 0.2 ms",
               [a - b for a, b in zip(self.get("event", name),
                                      self.get("event", "direct"))],
               duration, at_most(0.2e6))
        yield ("a crash: GETs that failed", "0",
               self.get("crash GET failed", name), number, at_most(0))
        rows = [("idle", "memory per idle connection", kb, 24 * 1024),
                ("busy", "memory per busy stream", kb, 64 * 1024)]
        if name == "static" or "static" not in self.names:
            rows += [("start", "exec to listening", ms, 5e6),
                     ("rest", "memory at rest", mb, 4e6),
                     ("size", "executable", mb, 2e6)]
        for row, what, show, limit in rows:
            yield (what, f"≤ {show(limit)}", self.get(row, name), show,
                   at_most(limit))

    def goal_lines(self):
        reached, missed = 0, []
        for what, goal, values, show, holds in self.goals():
            if holds(values):
                reached += 1
            else:
                missed.append(f"- missed: {what}: {goal}: "
                              f"{spread(values, show)}")
        if not reached and not missed:
            return ""
        return "\n".join([f"Goals: {reached} of {reached + len(missed)} "
                          "reached.", "", *missed]).strip()

    # The conditions

    def conditions(self, load_before):
        measured, options = self.measured, self.measured.options
        found = re.search(r"model name\s*:\s*(.+)",
                          Path("/proc/cpuinfo").read_text())
        model = found[1] if found else platform.machine()
        minutes = (time.monotonic() - measured.began) / 60
        return (f"{time.strftime('%Y-%m-%d')}, Linux {platform.release()}, "
                f"{os.cpu_count()} × {model}; {options.rounds} "
                f"round{'s' if options.rounds > 1 else ''}, "
                f"{options.seconds} s a run, {minutes:.0f} minutes in all; "
                f"load before {load_before:.2f}. "
                + "; ".join(v for v in self.versions() if v) + "."
                + "".join(f"\n- {note}" for note in measured.notes))

    def versions(self):
        yield from dict.fromkeys(p.version() for p in self.peers)
        wrk = first_line("wrk", "-v")
        yield wrk and " ".join(wrk.split()[:2])
        yield first_line(os.environ.get("CXX", "g++"), "--version")

    def markdown(self, load_before):
        return "\n\n".join(part for part in (
            self.table(), self.goal_lines(), self.conditions(load_before))
            if part)
