"""Draws the cold starts, readable in light and dark mode.

  _picture.py FIGURES.json COLD-START.svg

A program of its own, since matplotlib may be there for Debian's Python only.
"""

import json
import math
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402, the backend comes first

from _measure import BOOTS
from _report import TITLES

# What is drawn -> CSS variable, its value in light and in dark mode. The
# drawing has a background of its own, since a page's theme need not be the
# one that the browser reports to a picture.
COLOURS = {
    "#fefefe": ("background", "#ffffff", "#0d1117"),
    "#1f2329": ("ink", "#1f2328", "#e6edf3"),
    "#d8dee5": ("grid", "#d8dee4", "#30363d"),
    "#c2410d": ("own", "#c2410c", "#fb923c"),
    "#6b7281": ("c1", "#6b7280", "#9ca3af"),
    "#2563ec": ("c2", "#2563eb", "#60a5fa"),
    "#7c3aee": ("c3", "#7c3aed", "#a78bfa"),
    "#0f766f": ("c4", "#0f766e", "#2dd4bf"),
    "#be185e": ("c5", "#be185d", "#f472b6"),
    "#a16208": ("c6", "#a16207", "#facc15"),
}
BACKGROUND, INK, GRID, OWN, *OTHERS = COLOURS
MARKERS = "so^Dv<"
FLOOR = 0.1  # ms; a logarithmic axis has no zero


def series(figures):
    """(name, one (median, min, max) in ms for each boot time), fastest first"""
    values = {(f["row"], f["peer"]): f["values"] for f in figures}
    names = dict.fromkeys(f["peer"] for f in figures
                          if f["row"].startswith("cold"))
    found = []
    for name in names:
        if name in ("direct", "static"):
            continue
        points = []
        for boot, _ in BOOTS:
            times = values.get((f"cold {boot}", name))
            alone = values.get((f"cold {boot}", "direct"))
            points.append(tuple(
                max(FLOOR, (pick(times) - statistics.median(alone)) / 1e6)
                if times and alone else math.nan
                for pick in (statistics.median, min, max)))
        if not all(math.isnan(middle) for middle, _, _ in points):
            found.append((name, points))
    return sorted(found, key=lambda item: item[1][-1][0])


def place_labels(heights, gap):
    """Moves labels apart on a logarithmic axis, keeping their order."""
    placed = {}
    last = -math.inf
    for key, height in sorted(heights.items(), key=lambda item: item[1]):
        last = max(math.log10(height), last + gap)
        placed[key] = 10 ** last
    return placed


def draw_cold_starts(lines, path):
    plt.rcParams.update({
        "svg.fonttype": "none", "svg.hashsalt": "warmproxy",
        "font.family": "sans-serif", "font.size": 11, "text.color": INK,
        "axes.labelcolor": INK, "axes.edgecolor": GRID, "xtick.color": INK,
        "ytick.color": INK, "axes.facecolor": BACKGROUND,
        "figure.facecolor": BACKGROUND, "savefig.facecolor": BACKGROUND})
    figure, axes = plt.subplots(figsize=(8.4, 4.6))
    axes.set_yscale("log")
    colours = iter(OTHERS)
    ends = {}
    for i, (name, points) in enumerate(lines):
        own = name == "warmproxy"
        colour = OWN if own else next(colours)
        x = [k + (i - (len(lines) - 1) / 2) * 0.06 for k in range(len(BOOTS))]
        middle, low, high = (list(column) for column in zip(*points))
        axes.plot(x, middle, color=colour, linewidth=2.4 if own else 1.2,
                  marker=MARKERS[i % len(MARKERS)], markersize=6, zorder=3)
        axes.vlines(x, low, high, color=colour, linewidth=1, zorder=2)
        known = [m for m in middle if not math.isnan(m)]
        ends[name, colour] = known[-1]
    for (name, colour), height in place_labels(ends, 0.21).items():
        axes.text(len(BOOTS) - 0.7, height, TITLES.get(name, name),
                  color=colour, va="center",
                  bbox={"facecolor": BACKGROUND, "edgecolor": "none", "pad": 1},
                  fontweight="bold" if colour == OWN else "normal")
    finish_axes(axes)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={
        "Date": None, "Title": "Time to the first response above the ideal"})
    plt.close(figure)
    make_themed(path)


def finish_axes(axes):
    axes.set_title("Time to the first response above the ideal, by boot time",
                   loc="left", fontsize=12)
    axes.set_xticks(range(len(BOOTS)),
                    [f"boot {boot / 1000:g} s" for boot, _ in BOOTS])
    axes.set_xlim(-0.4, len(BOOTS) + 0.55)
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(bottom, 0.3), max(top, 2000))
    ticks = [t for t in (0.1, 1, 10, 100, 1000, 10000)
             if axes.get_ylim()[0] <= t <= axes.get_ylim()[1]]
    axes.set_yticks(ticks, ["≤ 0.1 ms" if t == FLOOR else
                            f"{t:g} ms" if t < 1000 else f"{t / 1000:g} s"
                            for t in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def make_themed(path):
    """Replaces fixed colours by variables that follow the reader's theme."""
    text = path.read_text()
    for drawn, (name, _, _) in COLOURS.items():
        text = text.replace(drawn, f"var(--{name})")

    def values(which):
        return " ".join(f"--{c[0]}: {c[which]};" for c in COLOURS.values())

    style = (f"<style>svg {{ {values(1)} }} "
             f"@media (prefers-color-scheme: dark) {{ svg {{ {values(2)} }} }}"
             "</style>")
    start = text.index(">", text.index("<svg")) + 1
    lines = (text[:start] + "\n " + style + text[start:]).splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n")


def main():
    figures, picture = map(Path, sys.argv[1:])
    lines = series(json.loads(figures.read_text()))
    if lines:
        draw_cold_starts(lines, picture)


if __name__ == "__main__":
    main()
