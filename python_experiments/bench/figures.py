"""The roofline, and cost against size, from stored measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from python_experiments.bench.cases import JOBS
from python_experiments.bench.scaling import BASE, PEER, SIZES
from python_experiments.bench.tables import OURS, Measured
from python_experiments.style import BLACK, BLUE, GREEN, GREY, SKY, VERMILION, label, panels, styled

__all__ = ["roofline", "scaling_curves", "slope"]

#: Points at the large end that the slope is fitted to: small sizes cost what every call costs.
_FITTED = 3
#: Operations per byte of neighbouring names in the roofline, at least.
_APART = 1.2


@styled
def roofline(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """GFLOP/s against floating-point operations per byte, below what torch and memory reach on the same machine.

    Args:
        lines: as `read_lines` gives them.

    Raises:
        ValueError: no line of ours has operations and bytes.
    """
    found = Measured(lines).by_job
    jobs = [name for name in JOBS if found.get(name, {}).get(OURS, {}).get("flop_per_byte")]
    if not jobs:
        raise ValueError(
            "lines: expected some with operations and bytes of ours; `catapult bench gram` measures them"
        )
    figure, axes = panels(1, 1, size=(7.6, 4.9))
    ax = axes[0, 0]
    rows = [line for name in jobs for line in found[name].values()]
    bandwidth = max(line["peak_gbytes_per_s"] for line in rows)
    intensity = [line["flop_per_byte"] for line in rows]
    x = np.geomspace(min(1.0, min(intensity) / 2), 2 * max(intensity), 400)  # [400]
    for dtype, color in (("float32", BLACK), ("float64", GREY)):
        peaks = [line["peak_gflops"] for line in rows if line["dtype"] == dtype]
        if peaks:
            ax.plot(x, np.minimum(max(peaks), bandwidth * x), color=color)
            text = f"{dtype}: {max(peaks):.0f} GFLOP/s, best product of torch"
            ax.annotate(
                text, (x[0], max(peaks)), (2, 3), textcoords="offset points", color=color, fontsize=8.5
            )
    ax.annotate(
        f"copy: {bandwidth:.1f} GB/s",
        (x[0], bandwidth * x[0]),
        (14, 2),
        textcoords="offset points",
        fontsize=8.5,
    )
    kinds = (
        ("catapult_ext", OURS, "o", VERMILION),
        ("torch", None, "s", BLUE),
        ("BLAS syrk", "BLAS syrk", "^", GREEN),
    )
    for text, name, marker, color in kinds:
        points = [found[job].get(name or JOBS[job].baseline) for job in jobs]
        shown = [point for point in points if point is not None]
        filled = [point["dtype"] == "float32" for point in shown]
        ax.scatter(
            [point["flop_per_byte"] for point in shown],
            [point["gflops"] for point in shown],
            marker=marker,
            facecolors=[color if fill else "white" for fill in filled],
            edgecolors=color,
            label=text,
            zorder=3,
            s=34,
        )
    top = 1.25 * max(line["peak_gflops"] for line in rows)
    at = 0.0
    for job in sorted(jobs, key=lambda job: found[job][OURS]["flop_per_byte"]):
        line = found[job][OURS]
        at = max(line["flop_per_byte"], _APART * at)  # names stand side by side above the roof
        ax.annotate(
            job,
            (line["flop_per_byte"], line["gflops"]),
            (at, top),
            rotation=90,
            ha="center",
            va="bottom",
            fontsize=7.5,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5},
        )
    ax.set_xscale("log")
    label(ax, title="Roofline, one thread", x="operations per byte", y="GFLOP/s", log=True)
    low = min(line["gflops"] for line in rows)
    ax.set_ylim(low / 2, 5 * top)
    ax.legend(loc="lower right", title="open: float64", title_fontsize=8.5)
    return figure


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Exponent of the power law through the last three points, by least squares of the logarithms."""
    if len(sizes) < 2 or len(sizes) != len(seconds):
        raise ValueError(f"expected two sizes or more and as many times, got {len(sizes)} and {len(seconds)}")
    fit = np.polyfit(np.log(sizes[-_FITTED:]), np.log(seconds[-_FITTED:]), 1)
    return float(fit[0])


@styled
def scaling_curves(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Seconds of a kernel against samples, width, depth and outputs, beside a plain step and torch.func.

    Args:
        lines: as `read_lines` gives them.

    Raises:
        ValueError: a size has not been measured at two values at least.
    """
    found = Measured(lines).by_job
    figure, axes = panels(1, len(SIZES), size=(12.5, 3.7), sharey=True)
    kinds = (
        (OURS, "kernel", VERMILION),
        ("torch step", "plain step", BLACK),
        (PEER, "torch.func.jacrev", SKY),
    )
    for ax, (size, values) in zip(axes[0], SIZES.items(), strict=True):
        measured = {value: found.get(f"scaling-{size}-{value}", {}) for value in values}
        if sum(bool(each) for each in measured.values()) < 2:
            raise ValueError(
                f"lines: expected some of scaling-{size}-; `catapult bench scaling-` measures them"
            )
        for name, text, color in kinds:
            at = [value for value, each in measured.items() if name in each]
            seconds = [measured[value][name]["median_s"] for value in at]
            if not at:
                continue
            power = f"  slope {round(slope(at, seconds), 1) + 0:.1f}" if len(at) > 1 else ""
            ax.plot(at, seconds, "o-", color=color, markersize=4, label=f"{text}{power}")
        ax.set_xscale("log", base=2)
        ax.set_xticks(values, [str(value) for value in values])
        ax.xaxis.set_minor_locator(NullLocator())
        label(ax, title=f"against {size}", x=size, y="seconds" if size == "n" else "", log=True)
        ax.legend(loc="upper left", fontsize=8)
    low, high = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(low, high * 12)  # room for the legends
    others = ", ".join(f"{name} {value}" for name, value in BASE.items())
    figure.suptitle(f"FCN, one thread; where nothing else is said: {others}", fontsize=10)
    return figure
