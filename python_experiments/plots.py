"""Figures of stored runs. Nothing is computed here that a claim depends on, and nothing is trained."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from python_experiments import style
from python_experiments.claims import Group, Run, peak_step, set_loss, spike_end, spikes

Groups = Mapping[str, Group]
Flags = Callable[[Run], np.ndarray]


def first_run(group: Group) -> Run:
    """The first seed of the first condition."""
    return next(iter(group.values()))[0]


def series(run: Run, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a column at the steps where it was recorded."""
    table = run.metrics[["step", column]].dropna()
    return table["step"].to_numpy(), table[column].to_numpy()


def loss_lines(ax: Axes, run: Run) -> list[Line2D]:
    """The parts L_<=s of the training set's loss, for each s at which it is split, and L_>s for the largest."""
    lines = []
    largest = run.config.eigenpairs
    parts = [
        *(
            (f"top_loss_{s}", colour, "--", rf"\leq {s}")
            for s, colour in zip(run.config.splits, style.TOPS, strict=False)
        ),
        ("top_loss", style.TOP, "--", rf"\leq {largest}"),
        ("rest_loss", style.REST, ":", f"> {largest}"),
    ]
    for column, colour, dash, which in parts:
        name = rf"$\mathcal{{L}}_{{{which}}}$"
        lines += ax.plot(*series(run, column), color=colour, linestyle=dash, label=name)
    return lines


def loss_panel(ax: Axes, run: Run, *, title: str, parts: bool = True) -> None:
    """Training loss on a log scale with its spikes marked, the largest one in words; and its parts."""
    style.label(ax, title=title, y="training loss", log=True)
    steps, loss = series(run, "loss")
    lines = ax.plot(steps, loss, color=style.LOSS, label=r"$\mathcal{L}$", zorder=3)
    if parts:
        lines += loss_lines(ax, run)
    peak = peak_step(run)
    marked = np.isin(steps, [spike.peak for spike in spikes(run)])
    if peak is not None:
        marked[peak] = False
    ax.plot(steps[marked], loss[marked], "v", markersize=6, color=style.TOP, zorder=4)
    if peak is not None:
        diverges = run.summary["result"] == "diverged"
        ax.plot(steps[peak], loss[peak], marker="v", markersize=8, color=style.TOP, zorder=4)
        # Above the largest loss nothing else is drawn.
        at = peak / len(steps)
        ax.margins(y=0.12)
        ax.annotate(
            f"diverges: {loss[peak]:.2g}" if diverges else f"spike: {loss[peak]:.3g}",
            (steps[peak], loss[peak]),
            xytext=(0, 6),
            ha="left" if at < 0.15 else "right" if at > 0.85 else "center",
            textcoords="offset points",
            fontsize=9,
            color=style.TOP,
        )
    style.legend_above(ax, lines)
    style.plain_ticks(ax)


def set_loss_panel(ax: Axes, run: Run, *, title: str) -> None:
    """Of a run on batches: loss of the whole training set on a log scale, and its parts."""
    style.label(ax, title=title, y="training loss", log=True)
    steps, _ = series(run, "rest_loss")
    lines = ax.plot(steps, set_loss(run), color=style.LOSS, label=r"$\mathcal{L}$", zorder=3)
    lines += loss_lines(ax, run)
    style.legend_above(ax, lines)
    style.plain_ticks(ax)


def critical_rate_panel(ax: Axes, run: Run) -> None:
    """Norm of the kernel (left axis) against critical rate and rate (right axis)."""
    lines = ax.plot(*series(run, "lambda_1"), color=style.KERNEL, label=r"$\|K\|_2$ (left)")
    style.label(ax, y=r"$\|K\|_2$", log=True)
    right = ax.twinx()
    right.spines["right"].set_visible(True)
    right.grid(False)
    lines += right.plot(
        *series(run, "critical_lr"), color=style.CRITICAL, linestyle="--", label="critical rate"
    )
    lines += right.plot(*series(run, "lr"), color=style.RATE, label="rate")
    style.label(right, y="learning rate", log=True)
    style.legend_above(ax, lines)
    style.plain_ticks(ax)
    style.plain_ticks(right)


def rate_strip(ax: Axes, run: Run) -> None:
    """One coloured strip: where the rate lies above the critical rate of the training set."""
    table = run.metrics[["step", "lr", "critical_lr"]].dropna()
    above = (table["lr"] > table["critical_lr"]).to_numpy()
    edges = np.append(table["step"].to_numpy(), table["step"].iloc[-1] + 1)
    for start, end, high in zip(edges[:-1], edges[1:], above, strict=True):
        ax.axvspan(start, end, color=style.ORANGE if high else style.SKY, linewidth=0)
    ax.set_yticks([])
    ax.grid(False)
    ax.set_xlabel("step")


STRIP = "Strip: orange while the rate is above the critical rate, blue while it is below."


#: Panels of one run, top to bottom: how each is drawn and how high it is.
LOSS_PANEL, PARTS_PANEL, SET_PANEL, NORM_PANEL, STRIP_PANEL = "loss", "parts", "set", "norm", "strip"
_HEIGHTS = {LOSS_PANEL: 4.0, PARTS_PANEL: 4.0, SET_PANEL: 4.0, NORM_PANEL: 3.0, STRIP_PANEL: 0.3}


@style.styled
def columns(groups: Groups, shown: Sequence[str]) -> Figure:
    """The first run of each condition of each group, a column each, with the panels named in `shown`."""
    runs = {
        " ".join([name] if len(group) == 1 else [name, condition]): (name == "main", condition, members[0])
        for name, group in groups.items()
        for condition, members in group.items()
    }
    heights = [_HEIGHTS[panel] for panel in shown]
    figure, axes = style.panels(
        len(shown),
        len(runs),
        size=(4.9 * len(runs), 0.95 * sum(heights)),
        sharex="col",
        gridspec_kw={"height_ratios": heights},
    )
    for column, (name, (is_main, condition, run)) in enumerate(runs.items()):
        title = f"{condition if is_main else f'control: {name}'} (seed {run.seed})"
        for ax, panel in zip(axes[:, column], shown, strict=True):
            if panel in (LOSS_PANEL, PARTS_PANEL):
                loss_panel(ax, run, title=title, parts=panel == PARTS_PANEL)
            elif panel == SET_PANEL:
                set_loss_panel(ax, run, title=title)
            elif panel == NORM_PANEL:
                critical_rate_panel(ax, run)
            else:
                rate_strip(ax, run)
        axes[-1, column].set_xlabel("step")
    if STRIP_PANEL in shown:
        figure.supxlabel(STRIP, fontsize=9)
    return figure


def catapult(groups: Groups) -> Figure:
    """Loss and its parts, norm of the kernel and critical rate, rate strip."""
    return columns(groups, (PARTS_PANEL, NORM_PANEL, STRIP_PANEL))


def norms(groups: Groups) -> Figure:
    """Loss, norm of the kernel and critical rate (Fig. 13)."""
    return columns(groups, (LOSS_PANEL, NORM_PANEL))


def loss_parts(groups: Groups) -> Figure:
    """Loss and its parts over the rate strip (Fig. 17)."""
    return columns(groups, (PARTS_PANEL, STRIP_PANEL))


def sgd_catapults(groups: Groups) -> Figure:
    """Runs on batches: loss of the whole set and its parts, norm of its kernel, critical rate and rate (Fig. 7)."""
    return columns(groups, (SET_PANEL, NORM_PANEL))


def from_scratch(groups: Groups) -> Figure:
    """Loss, norm of the kernel and rate (Fig. 18)."""
    return columns(groups, (LOSS_PANEL, NORM_PANEL))


@style.styled
def anatomy(groups: Groups) -> Figure:
    """Fig. 2: loss and norm of the kernel of one catapult, with its three phases named."""
    run = first_run(groups["main"])
    figure, axes = style.panels(3, 1, size=(7.4, 7), sharex="col", gridspec_kw={"height_ratios": [4, 3, 0.3]})
    loss_panel(axes[0, 0], run, title=f"anatomy of a catapult: {run.config.network}", parts=False)
    critical_rate_panel(axes[1, 0], run)
    rate_strip(axes[2, 0], run)
    figure.supxlabel(STRIP, fontsize=9)
    steps, _ = series(run, "loss")
    peak = peak_step(run)
    if peak is None:
        return figure
    end = spike_end(run)
    back = len(steps) - 1 if end is None else end
    phases = (
        (steps[0], steps[peak], style.ORANGE, "1  rate above critical rate: the loss grows"),
        (steps[peak], steps[back], style.BLUE, "2  the norm of K has dropped: the loss falls back"),
        (steps[back], steps[-1], style.GREEN, "3  below where it began, with a smaller norm of K"),
    )
    upper = axes[0, 0]
    for row, (start, end, colour, words) in enumerate(phases):
        for ax in axes[:2, 0]:
            ax.axvspan(start, end, color=colour, alpha=0.13, linewidth=0)
        upper.text((start + end) / 2, 0.03, words[0], transform=upper.get_xaxis_transform(), ha="center")
        upper.text(0.97, 0.72 - 0.075 * row, words, transform=upper.transAxes, ha="right", fontsize=9)
    return figure


@style.styled
def batches(groups: Groups, *, is_spike: Flags, drawn: Flags) -> Figure:
    """Fig. 5: training loss of SGD, and the critical rate of each batch beside the rate.

    Args:
        groups: the stored runs by group.
        is_spike: run -> (steps,) boolean, whether each step is a spike.
        drawn: run -> (steps,) boolean, whether the special point is the batch.
    """
    shown = {name: first_run(group) for name, group in groups.items()}
    figure, axes = style.panels(2, len(shown), size=(4.9 * len(shown), 6.2), sharex="col")
    for column, (name, run) in enumerate(shown.items()):
        upper, lower = axes[:, column]
        title = "between the critical rates" if name == "main" else f"control: {name}"
        style.label(upper, title=f"{title} (seed {run.seed})", y="training loss", log=True)
        steps, loss = series(run, "train_loss")
        at = np.flatnonzero(is_spike(run)) + 1  # the loss after the step
        lines = upper.plot(steps, loss, color=style.LOSS, linewidth=1.2, label="training loss")
        lines += upper.plot(
            steps[at], loss[at], "v", color=style.TOP, markersize=7, label="spike (loss of the batch rises)"
        )
        style.legend_above(upper, lines)
        style.plain_ticks(upper)

        style.label(lower, x="step", y="critical rate of the batch", log=True)
        steps, critical = series(run, "batch_critical_lr")
        special = drawn(run)
        steps, critical = steps[: len(special)], critical[: len(special)]
        lines = lower.plot(
            steps[~special], critical[~special], ".", color=style.SKY, markersize=4, label="other points"
        )
        lines += lower.plot(
            steps[special], critical[special], "D", color=style.TOP, markersize=5, label="doubled point"
        )
        lines += lower.plot(*series(run, "lr"), color=style.RATE, label="rate")
        style.legend_above(lower, lines)
        style.plain_ticks(lower)
    return figure


def summaries(ax: Axes, groups: Groups, key: str) -> list[Line2D]:
    """An entry of the runs' summaries over the conditions of "main", a line for each group.

    Points are means over the seeds, bars reach from the smallest to the largest.
    """
    names = list(groups["main"])
    looks = iter((("x", style.GREY), ("+", style.PURPLE), ("^", style.GREEN)))
    lines = []
    for group, conditions in groups.items():
        marker, colour = ("o", style.BLUE) if group == "main" else next(looks)
        shown = [name for name in names if name in conditions]
        values = [[float(run.summary[key]) for run in conditions[name]] for name in shown]
        means = [float(np.mean(v)) for v in values]
        spread = np.array([[m - min(v), max(v) - m] for m, v in zip(means, values, strict=True)]).T
        at = [names.index(name) for name in shown]
        ax.errorbar(at, means, yerr=np.abs(spread), color=colour, capsize=3, fmt="none")
        name = "ours" if group == "main" else f"control: {group}"
        lines += ax.plot(at, means, marker=marker, color=colour, label=name, zorder=3)
    return lines


@style.styled
def table(
    groups: Groups, paper: Mapping[str, Mapping[str, float]], columns: Sequence[tuple[str, str]]
) -> Figure:
    """Table 1 / Fig. 9a: one panel for each quantity over the batch sizes, ours beside the paper's.

    Args:
        groups: the stored runs by group.
        paper: condition -> quantity -> the paper's number.
        columns: (key of the run's summary, title) of each panel.
    """
    figure, axes = style.panels(1, len(columns), size=(4.1 * len(columns), 3.9))
    names = list(groups["main"])
    for ax, (key, title) in zip(axes[0], columns, strict=True):
        lines = summaries(ax, groups, key)
        known = [(names.index(name), paper[name][key]) for name in names if key in paper.get(name, {})]
        if known:
            lines += ax.plot(
                *zip(*known, strict=True), "s", color=style.ORANGE, fillstyle="none", label="paper", zorder=4
            )
        ax.set_xticks(range(len(names)), names)
        ax.set_xmargin(0.12)
        style.label(ax, title=title, x="batch")
        ax.legend(lines, [str(line.get_label()) for line in lines])
    return figure


@style.styled
def batch_spikes(groups: Groups) -> Figure:
    """Fig. 6: loss of the whole set and its parts, and the critical rate of each batch beside the rate."""
    shown = {name: first_run(group) for name, group in groups.items()}
    figure, axes = style.panels(2, len(shown), size=(4.9 * len(shown), 6.2), sharex="col")
    for column, (name, run) in enumerate(shown.items()):
        upper, lower = axes[:, column]
        title = run.config.algorithm if name == "main" else f"control: {name}"
        set_loss_panel(upper, run, title=f"{title} (seed {run.seed})")
        style.label(lower, x="step", y="critical rate of the batch", log=True)
        steps, rate, critical = run.recorded("step", "lr", "batch_critical_lr")
        above = rate > critical
        lines = lower.plot(
            steps[~above], critical[~above], ".", color=style.SKY, markersize=4, label="above the rate"
        )
        lines += lower.plot(
            steps[above], critical[above], "D", color=style.TOP, markersize=3.5, label="below the rate"
        )
        lines += lower.plot(steps, rate, color=style.RATE, label="rate")
        style.legend_above(lower, lines)
        style.plain_ticks(lower)
    return figure


@style.styled
def critical_rates(groups: Groups) -> Figure:
    """Fig. 12: each step's critical rate of the batch, from the kernel over that from the Hessian."""
    shown = {name: first_run(group) for name, group in groups.items()}
    figure, axes = style.panels(1, len(shown), size=(4.4 * len(shown), 4.4))
    for ax, (name, run) in zip(axes[0], shown.items(), strict=True):
        title = str(run.config.network) if name == "main" else f"control: {name}"
        style.label(
            ax, title=f"{title} (seed {run.seed})", x=r"$2 / \lambda_1(H)$", y=r"$b / \lambda_1(K)$", log=True
        )
        ax.set_xscale("log")
        hessian, kernel = run.recorded("batch_hessian_critical_lr", "batch_critical_lr")
        lines = ax.plot(hessian, kernel, ".", color=style.CRITICAL, markersize=5, label="step")
        ends = [min(hessian.min(), kernel.min()), max(hessian.max(), kernel.max())]
        lines += ax.plot(ends, ends, color=style.GREY, linewidth=1, label="equal", zorder=1)
        (rate,) = {*run.recorded("lr")[0]}
        lines.append(ax.axhline(rate, color=style.RATE, linewidth=1, label="rate"))
        style.legend_above(ax, lines)
    return figure


@style.styled
def catapult_counts(groups: Groups, quantities: Sequence[tuple[str, str]]) -> Figure:
    """Fig. 8: quantities at the best validation step over the number of catapults, and validation curves.

    Args:
        groups: the stored runs by group.
        quantities: (key of the run's summary, title) of each panel.
    """
    figure, axes = style.panels(1, len(quantities) + 1, size=(4.1 * (len(quantities) + 1), 3.9))
    names = list(groups["main"])
    for ax, (key, title) in zip(axes[0, :-1], quantities, strict=True):
        summaries(ax, groups, key)
        ax.set_xticks(range(len(names)), [name.split()[0] for name in names])
        style.label(ax, title=title, x="catapults")
        ax.legend()
    last = axes[0, -1]
    colours = itertools.cycle((style.GREY, style.SKY, style.BLUE, style.TOP))
    for name, colour in zip(names, colours, strict=False):
        last.plot(
            *series(groups["main"][name][0], "validation_loss"), color=colour, label=name, linewidth=1.3
        )
    style.label(last, title="validation loss", x="step", log=True)
    last.legend()
    style.plain_ticks(last)
    return figure


@style.styled
def agop_pictures(
    groups: Groups, picture: Callable[[Run], np.ndarray], truth: Callable[[Run], np.ndarray]
) -> Figure:
    """Fig. 26: the AGOP of the first seed of each condition, and the true one.

    Args:
        groups: the stored runs by group.
        picture: run -> (size, size) numbers in [0, 1].
        truth: the same of the target function.
    """
    names = list(groups["main"])
    figure, axes = style.panels(1, len(names) + 1, size=(2.6 * (len(names) + 1), 3.0))
    shown = [(name, picture(groups["main"][name][0])) for name in names]
    shown.append(("true AGOP", truth(groups["main"][names[0]][0])))
    for ax, (name, image) in zip(axes[0], shown, strict=True):
        drawn = ax.imshow(image, cmap="cividis", vmin=0, vmax=1)
        ax.set_title(name)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.grid(False)
    figure.colorbar(drawn, ax=axes[0, :].tolist(), shrink=0.7)
    return figure
