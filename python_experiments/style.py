"""The one look of all figures: Okabe-Ito colours, thin axes, sizes that read on a phone and in print."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib

matplotlib.use("Agg")  # before pyplot: figures are files here, never windows

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

P = ParamSpec("P")

# Okabe & Ito: distinguishable with every common kind of colour blindness.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
LOSS, TOP, REST, KERNEL, CRITICAL, RATE = BLACK, VERMILION, BLUE, PURPLE, GREEN, ORANGE
GREY = "#8a8a8a"
#: Of L_<=s for the smaller s of a loss that is split at several.
TOPS = (PURPLE, GREEN)

#: Dots per inch of the stored plots, and the files that each is stored as; the report shows the first.
DPI = 160
SUFFIXES = (".png", ".pdf")

RC = {
    "figure.dpi": 110,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "pdf.fonttype": 42,  # letters that a journal's and a reader's programs take as letters
}


def styled(plot: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorator of functions that draw a figure: they draw it in the common style."""

    @functools.wraps(plot)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with plt.rc_context(RC):
            return plot(*args, **kwargs)

    return drawn


def panels(rows: int, columns: int, *, size: tuple[float, float], **kwargs: Any) -> tuple[Figure, Any]:
    """A figure and its axes, always a two-dimensional array.

    Args:
        rows: rows of axes.
        columns: columns of axes.
        size: width and height in inches.
        **kwargs: passed to `matplotlib.pyplot.subplots`.
    """
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **kwargs)


def label(ax: Axes, *, title: str = "", x: str = "", y: str = "", log: bool = False) -> None:
    """Title and axis labels of one panel; `log` makes the y axis logarithmic."""
    ax.set_title(title)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    if log:
        ax.set_yscale("log")


def legend_above(ax: Axes, lines: Sequence[Line2D]) -> None:
    """A legend in one row between the panel and its title, where it never hides a curve."""
    names = [str(line.get_label()) for line in lines]
    ax.legend(lines, names, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(lines), borderaxespad=0.1)
    if ax.get_title(loc="left"):
        ax.set_title(ax.get_title(loc="left"), pad=22)


def plain_ticks(ax: Axes) -> None:
    """Whole steps on the x axis, and numbers such as 5, 10, 20 on a logarithmic y axis below two decades."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    low, high = ax.get_ylim()
    if high / low < 100:
        wide = high / low > 5
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)) if wide else MaxNLocator(5))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem` with each of `SUFFIXES` and close the figure; the same results give the same files."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_name(stem.name + suffix) for suffix in SUFFIXES]
    with plt.rc_context(RC):
        for file in files:
            metadata = {"CreationDate": None} if file.suffix == ".pdf" else None
            figure.savefig(file, dpi=DPI, metadata=metadata)
            figure.set_layout_engine("none")  # it is laid out now; once more would take most of the time
    plt.close(figure)
    return files
