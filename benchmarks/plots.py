"""Draw the figures of `compare.py` as horizontal bars, in SVG, readable on light and on dark pages."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from measures import FIGURES, Figures
from peers import OURS

SHOWN = ("round_trip", "gathered", "million", "array_echo", "objects_stall")
_OURS_COLOR, _OTHERS_COLOR, _INK = "#2a8f5d", "#8c96a3", "#6b7480"


def draw_all(systems: dict[str, list[Figures]], folder: Path) -> None:
    """Write a file for each of the figures that are shown; the bar's end is the median, its line the whole range."""
    mpl.rcParams["svg.hashsalt"] = "cpupool"  # the same figures, the same file
    for name in SHOWN:
        about = FIGURES[name]
        found = {
            system: [value for each in rounds if (value := each.get(name)) is not None]
            for system, rounds in systems.items()
        }
        rows = sorted(
            ((statistics.median(each), system, each) for system, each in found.items() if each),
            key=lambda row: row[0],
            reverse=not about.more_is_better,
        )
        if not rows:
            continue
        figure, axes = plt.subplots(figsize=(7.2, 0.5 + 0.32 * len(rows)))
        medians = [median for median, _, _ in rows]
        spread = [[median - min(each) for median, _, each in rows], [max(each) - median for median, _, each in rows]]
        colors = [_OURS_COLOR if system == OURS else _OTHERS_COLOR for _, system, _ in rows]
        bars = axes.barh([system for _, system, _ in rows], medians, xerr=spread, color=colors, ecolor=_INK)
        axes.bar_label(bars, [f" {median:,.0f}" for median in medians], color=_INK, padding=6, fontsize=8)
        better = "more" if about.more_is_better else "less"
        axes.set_title(f"{about.title} ({about.unit}; {better} is better)", color=_INK, fontsize=9)
        if max(medians) > 50 * min(medians):
            axes.set_xscale("log")
        axes.tick_params(colors=_INK, labelsize=8)
        axes.margins(x=0.14)
        for side in axes.spines.values():
            side.set_visible(False)
        figure.tight_layout()
        figure.savefig(folder / f"{name}.svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
