"""The figures of a run as PNG files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from bench.report import Figure

SIZE_INCHES = (8, 4.5)
DOTS_PER_INCH = 120
COLORS = {"plain": "tab:red", "transaction": "tab:orange", "lock": "tab:purple", "presence": "tab:blue"}
"""A contender looks the same in every plot."""
MARKERS = "osD^vP*X"
GROUP_WIDTH = 0.8
"""Of the room between two groups of bars, how much the bars take."""

mpl.use("agg")


def draw(figure: Figure, path: Path) -> None:
    """Write one figure as a PNG file."""
    canvas = Canvas(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    axes = canvas.subplots()
    if figure.kind == "bars":
        _draw_bars(axes, figure)
    else:
        _draw_lines(axes, figure)
    axes.set_title(figure.title)
    axes.set_xlabel(figure.x_label)
    axes.set_ylabel(figure.y_label)
    axes.grid(axis="y", which="major", alpha=0.3)
    if len(figure.series) > 1:
        canvas.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    canvas.savefig(path)


def _draw_lines(axes: Axes, figure: Figure) -> None:
    for index, (label, points) in enumerate(figure.series.items()):
        xs, ys = [float(x) for x, _ in points], [y for _, y in points]
        axes.plot(xs, ys, label=label, color=COLORS.get(label), marker=MARKERS[index % len(MARKERS)], markersize=5)
    if figure.log_x:
        axes.set_xscale("log")
        axes.set_xticks(sorted({float(x) for points in figure.series.values() for x, _ in points}), minor=False)
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter(FuncFormatter(_count))
    if figure.log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(_count))


def _draw_bars(axes: Axes, figure: Figure) -> None:
    groups = list(dict.fromkeys(str(x) for points in figure.series.values() for x, _ in points))
    width = GROUP_WIDTH / len(figure.series)
    for index, (label, points) in enumerate(figure.series.items()):
        offset = (index - (len(figure.series) - 1) / 2) * width
        xs, ys = [groups.index(str(x)) + offset for x, _ in points], [y for _, y in points]
        bars = axes.bar(xs, ys, width, label=label, color=COLORS.get(label))
        axes.bar_label(bars, fmt=_number, fontsize=8, padding=2)
    axes.set_xticks(range(len(groups)), groups)
    axes.margins(y=0.12)
    if figure.log_y:
        # Zero has its place on the axis: it is what counts most.
        axes.set_yscale("symlog", linthresh=0.1)
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(_count))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.2g}"


def _count(value: float, _position: int) -> str:
    if value >= 1_000_000:
        return f"{value / 1_000_000:g} M"
    return f"{value / 1000:g} k" if value >= 1000 else f"{value:g}"
