"""Draws the pictures of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from examples.demo import data
from examples.demo.methods import METHODS, Method
from examples.demo.minilm import BLOCKS
from examples.demo.scores import Results, Score

TABLES = ("word", "position", "token_type")
KERNELS = ("query", "key", "value", "attention_out", "feed_forward_in", "feed_forward_out")

BLUE, ORANGE = "#0072b2", "#d55e00"  # of Okabe and Ito's palette
GREY = "#808080"  # can be read on white and on black
SMALLEST_DEVIATION = 1e-3  # what moved less has the darkest colour


def percent(value: float, _: object = None) -> str:
    """Writes a tick of a share, such as 0.625."""
    return f"{100 * value:.4g} %"


def on_any_page(figure: Figure) -> Figure:
    """Makes the background transparent and black text and lines grey, for light and dark pages."""
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
        axes.tick_params(which="both", colors=GREY)
        axes.spines[:].set_edgecolor(GREY)
    for text in figure.findobj(lambda artist: isinstance(artist, Text)):
        if isinstance(text, Text) and text.get_color() == "black":
            text.set_color(GREY)
    return figure


def accuracy_picture(results: Results) -> Figure:
    """Accuracy in and out of distribution, a row a method; pale dots are single seeds.

    Bars are the standard deviation over seeds or, with one seed, the binomial standard error.
    """
    figure = Figure(figsize=(8, 1.4 + 0.42 * len(results)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    domains = [(data.IN_DISTRIBUTION,), data.OUT_OF_DISTRIBUTION]
    titles = ("in distribution", "out of distribution")
    several = any(len(scores) > 1 for scores in results.values())
    for axes, names, title, colour in zip(panels, domains, titles, (BLUE, ORANGE), strict=True):
        for row, scores in enumerate(results.values()):
            seeds = [float(np.mean([score.accuracy[name] for name in names])) for score in scores]
            bar = np.std(seeds, ddof=1) if len(seeds) > 1 else _binomial_error(scores[0], names)
            if several:
                axes.scatter(seeds, [row] * len(seeds), s=28, color=colour, alpha=0.5, linewidths=0)
            axes.errorbar(
                np.mean(seeds), row, xerr=bar, fmt="o", color=colour, capsize=4, markersize=8
            )
        axes.set_title(f"{title}\n({', '.join(names)})", fontsize=12)
        axes.xaxis.set_major_formatter(percent)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(labelsize=11)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(results)), [METHODS[name].label for name in results])
    panels[0].set_ylim(len(results) - 0.5, -0.5)
    panels[1].tick_params(left=False)
    count = max(len(scores) for scores in results.values())
    bars = (
        f"standard deviation over {count} training sets"
        if several
        else "standard error, from the number of test snippets"
    )
    figure.supxlabel(f"accuracy; mean, and bars: {bars}", fontsize=12)
    return figure


def _binomial_error(score: Score, domains: Sequence[str]) -> float:
    """Standard error of one seed's mean accuracy, from the number of test snippets alone."""
    variances = [
        score.accuracy[name] * (1 - score.accuracy[name]) / len(score.correct[name])
        for name in domains
    ]
    return math.sqrt(sum(variances)) / len(domains)


def deviation_picture(results: Results) -> Figure:
    """Each weight matrix's deviation relative to its norm: a row a method, a column a matrix."""
    paths = [f"{table}/embedding" for table in TABLES]
    paths += [f"block_{index}/{kernel}/kernel" for index in range(BLOCKS) for kernel in KERNELS]
    moved = {
        METHODS[name].label: [
            np.mean([score.deviation[path] for score in scores]) for path in paths
        ]
        for name, scores in results.items()
        if any(scores[0].deviation[path] for path in paths)  # not the linear probe
    }
    figure = Figure(figsize=(7, 2.1 + 0.34 * len(moved)), layout="constrained")
    axes = figure.add_subplot()
    values = np.array([*moved.values()]).reshape(len(moved), len(paths))
    top = values.max(initial=SMALLEST_DEVIATION * 10)
    image = axes.pcolormesh(
        values, cmap="cividis", norm=LogNorm(SMALLEST_DEVIATION, top, clip=True)
    )
    bar = figure.colorbar(image, extend="min", orientation="horizontal", aspect=40, pad=0.03)
    bar.set_label(r"relative deviation  $\|\theta - \theta_0\| \,/\, \|\theta_0\|$", fontsize=12)
    _tick(bar.ax.xaxis, percent)
    bar.ax.tick_params(labelsize=11)
    axes.set_yticks(np.arange(len(moved)) + 0.5, [*moved], fontsize=11)
    axes.invert_yaxis()
    axes.set_xticks(np.arange(len(paths)) + 0.5, ("w", "p", "t", *("qkvo↑↓" * BLOCKS)), fontsize=10)
    axes.tick_params(length=0)
    for index in range(BLOCKS + 1):
        left = len(TABLES) + (index - 1) * len(KERNELS) if index else 0
        right = len(TABLES) + index * len(KERNELS)
        title = f"block {index - 1}" if index else "tables"
        axes.annotate(
            title,
            ((left + right) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=11,
        )
        if index < BLOCKS:
            axes.axvline(right, color=GREY, linewidth=2)
    axes.set_xlabel(
        "w word, p position, t type table; q query, k key, v value,\n"
        "o attention output, ↑ ↓ feed-forward in, out",
        fontsize=11,
    )
    return figure


def radius_picture(results: Results) -> Figure:
    """The learned radii by depth: dots are matrices, bars the blocks' medians."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    learned = {name: scores for name, scores in results.items() if scores[0].relative_radii}
    if not learned:
        axes.set_title("No method of this run learns radii")
    width = 0.8 / max(1, len(learned))
    for place, (name, scores) in enumerate(learned.items()):
        shift = width * (place - (len(learned) - 1) / 2)  # side by side, without overlap
        method = METHODS[name]
        _draw_radii(axes, method, [score.relative_radii or {} for score in scores], shift, width)
        axes.annotate(
            method.label,
            (0.02 + 0.16 * place, 1.03),
            xycoords="axes fraction",
            fontsize=14,
            weight="bold",
            color=method.colour,
        )
    axes.set_yscale("log")
    axes.set_xticks(range(-1, BLOCKS), ["tables", *map(str, range(BLOCKS))])
    axes.set_xlim(-1.5, BLOCKS - 0.5)
    axes.set_xlabel("block, from the input to the output", fontsize=12)
    axes.set_ylabel("radius, of the pretrained matrix's norm", fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(bottom=0.8 * SMALLEST_RADIUS)
    _tick(axes.yaxis, lambda value, _: f"{_at_most(value)}{percent(value)}")
    return figure


def low_data_picture(curve: Mapping[int, Results], labels: Mapping[str, str]) -> Figure:
    """Accuracy against the number of examples; bars are standard deviations over the seeds."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    panels = figure.subplots(1, 2)
    measures: list[tuple[str, Callable[[Score], float]]] = [
        ("accuracy in distribution (movie)", lambda score: score.accuracy[data.IN_DISTRIBUTION]),
        ("mean accuracy out of distribution", lambda score: score.shifted_accuracy),
    ]
    for axes, (title, measure) in zip(panels, measures, strict=True):
        for place, name in enumerate(labels):
            method = METHODS[name]
            found = {
                examples: [measure(score) for score in results[name]]
                for examples, results in curve.items()
                if name in results
            }
            if not found:
                continue
            several = any(len(values) > 1 for values in found.values())
            # Side by side, so that the bars do not overlap.
            shift = 1.015 ** (place - (len(labels) - 1) / 2) if several else 1.0
            axes.errorbar(
                [examples * shift for examples in found],
                [float(np.mean(values)) for values in found.values()],
                yerr=[float(np.std(v, ddof=1)) for v in found.values()] if several else None,
                capsize=3,
                elinewidth=1,
                marker=method.marker,
                markersize=8,
                markeredgecolor="white",
                color=method.colour,
                label=labels[name],
            )
        axes.set_xscale("log")
        axes.set_xticks(list(curve), [str(examples) for examples in curve])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("training examples", fontsize=12)
        axes.set_title(title, fontsize=12)
        axes.tick_params(labelsize=11)
        axes.yaxis.set_major_formatter(percent)
        axes.margins(0.08)
        axes.grid(alpha=0.3)
    handles, shown = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, shown, loc="outside upper center", ncols=4, frameon=False, fontsize=11
        )
    return figure


def _tick(axis: Axis, text: Callable[[float, int], str]) -> None:
    """Puts ticks at round numbers on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(text))
    axis.set_minor_locator(NullLocator())


# Matrices held at the anchor have radii down to 1e-8; they are drawn at this value.
SMALLEST_RADIUS = 1e-3


def _at_most(value: float) -> str:
    return "≤ " if value < 1.01 * SMALLEST_RADIUS else ""


def _draw_radii(
    axes: Axes, method: Method, radii: Sequence[Mapping[str, float]], shift: float, width: float
) -> None:
    groups = [[f"encoder/{table}/embedding" for table in TABLES]]
    groups += [
        [f"encoder/block_{block}/{kernel}/kernel" for kernel in KERNELS] for block in range(BLOCKS)
    ]
    for depth, paths in enumerate(groups, start=-1):
        means = [float(np.mean([each[path] for each in radii])) for path in paths]
        values = np.maximum(means, SMALLEST_RADIUS)
        place = depth + shift
        axes.scatter([place] * len(values), values, s=40, color=method.colour, alpha=0.5, lw=0)
        axes.hlines(
            np.median(values), place - 0.4 * width, place + 0.4 * width, color=method.colour, lw=3
        )
