"""Draws the pictures of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from examples.demo import data
from examples.demo.methods import METHODS, Method
from examples.demo.minilm import BLOCKS
from examples.demo.scores import Results, Score

TABLES = ("word", "position", "token_type")
KERNELS = ("query", "key", "value", "attention_out", "feed_forward_in", "feed_forward_out")
_TICKS = ("query", "key", "value", "output", "ff. in", "ff. out")


def accuracy_picture(results: Results) -> Figure:
    """Accuracy in distribution against accuracy out of distribution; pale dots are single seeds."""
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for name, scores in results.items():
        method = METHODS[name]
        inside = [score.accuracy[data.IN_DISTRIBUTION] for score in scores]
        shifted = [score.shifted_accuracy for score in scores]
        if len(scores) > 1:
            axes.scatter(inside, shifted, s=22, color=method.colour, alpha=0.35, linewidths=0)
        axes.scatter(
            np.mean(inside),
            np.mean(shifted),
            s=110,
            marker=method.marker,
            color=method.colour,
            edgecolors="white",
            label=method.label,
            zorder=3,
        )
    axes.set_xlabel("accuracy in distribution (movie)")
    axes.set_ylabel(f"mean accuracy out of distribution\n({', '.join(data.OUT_OF_DISTRIBUTION)})")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, 1))
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    axes.set_title("Up and to the right is better")
    figure.legend(loc="outside right center", frameon=False)
    return figure


def deviation_picture(results: Results) -> Figure:
    """Each weight matrix's deviation relative to its norm, in the order of computation."""
    paths = [f"{table}/embedding" for table in TABLES]
    paths += [f"block_{index}/{kernel}/kernel" for index in range(BLOCKS) for kernel in KERNELS]
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for name, scores in results.items():
        method = METHODS[name]
        moved = [np.mean([score.deviation[path] for score in scores]) for path in paths]
        if not any(moved):
            continue  # the linear probe: zeros cannot be drawn on a logarithmic axis
        axes.plot(
            moved, marker=method.marker, markersize=5, color=method.colour, label=method.label
        )
    axes.set_yscale("log")
    axes.set_ylabel(r"relative deviation  $\|\theta - \theta_0\| \,/\, \|\theta_0\|$")
    _tick(axes, lambda value, _: f"{100 * value:g} %")
    labels = ("word", "position", "type", *(_TICKS * BLOCKS))
    axes.set_xticks(range(len(paths)), labels, fontsize=8, rotation=90)
    axes.set_xlim(-0.7, len(paths) - 0.3)
    for index in range(BLOCKS + 1):
        left = len(TABLES) + (index - 1) * len(KERNELS) if index else 0
        right = len(TABLES) + index * len(KERNELS)
        title = f"block {index - 1}" if index else "tables"
        axes.annotate(
            title,
            ((left + right - 1) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
        )
        if index < BLOCKS:
            axes.axvline(right - 0.5, color="0.8", linewidth=1)
    axes.grid(axis="y", alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right center", frameon=False)
    return figure


def radius_picture(results: Results) -> Figure:
    """The learned radii by depth: pale dots are matrices, the line connects the blocks' medians."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    learned = {name: scores for name, scores in results.items() if scores[0].radii}
    for shift, (name, scores) in enumerate(learned.items()):
        method = METHODS[name]
        position = 0.14 * (shift - (len(learned) - 1) / 2)  # side by side, without overlap
        _draw_radii(left, method, [score.radii or {} for score in scores], position)
        _draw_radii(right, method, [score.relative_radii or {} for score in scores], position)
    if not learned:
        figure.suptitle("No method of this run learns radii")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_xticks(range(-1, BLOCKS), ["tables", *map(str, range(BLOCKS))])
        axes.set_xlabel("block, from the input to the output")
        axes.grid(axis="y", alpha=0.3)
        axes.set_ylim(bottom=0.8 * SMALLEST_RADIUS)
    left.set_ylabel("radius (largest absolute row sum)")
    right.set_ylabel("radius relative to the pretrained matrix's norm")
    _tick(left, lambda value, _: f"{_at_most(value)}{value:g}")
    _tick(right, lambda value, _: f"{_at_most(value)}{100 * value:g} %")
    if learned:
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


def low_data_picture(curve: Mapping[int, Results], labels: Mapping[str, str]) -> Figure:
    """Accuracy against the number of examples; bars are standard deviations over the seeds."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
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
        axes.set_xlabel("training examples")
        axes.set_ylabel(title)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, 1))
        axes.margins(0.08)
        axes.grid(alpha=0.3)
    handles, shown = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, shown, loc="outside right center", frameon=False)
    return figure


def _tick(axes: Axes, text: Callable[[float, int], str]) -> None:
    """Puts ticks at round numbers on a logarithmic axis."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(text))
    axes.yaxis.set_minor_locator(NullLocator())


# Matrices held at the anchor have radii down to 1e-8; they are drawn at this value.
SMALLEST_RADIUS = 1e-3


def _at_most(value: float) -> str:
    return "≤ " if value < 1.01 * SMALLEST_RADIUS else ""


def _draw_radii(
    axes: Axes, method: Method, radii: Sequence[Mapping[str, float]], shift: float
) -> None:
    groups = [[f"encoder/{table}/embedding" for table in TABLES]]
    groups += [
        [f"encoder/block_{block}/{kernel}/kernel" for kernel in KERNELS] for block in range(BLOCKS)
    ]
    values = [
        [max(SMALLEST_RADIUS, float(np.mean([each[path] for each in radii]))) for path in paths]
        for paths in groups
    ]
    for depth, group in enumerate(values, start=-1):
        axes.scatter(
            [depth + shift] * len(group), group, s=14, color=method.colour, alpha=0.4, linewidths=0
        )
    axes.plot(
        np.arange(BLOCKS) + shift,
        [np.median(group) for group in values[1:]],
        marker=method.marker,
        color=method.colour,
        label=method.label,
    )
