"""The two pictures of a run."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from examples.demo import data
from examples.demo.experiment import Results
from examples.demo.methods import METHODS
from examples.demo.minilm import BLOCKS

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
    """How far every weight matrix moved, relative to its norm, in the order of computation."""
    paths = [f"{table}/embedding" for table in TABLES]
    paths += [f"block_{index}/{kernel}/kernel" for index in range(BLOCKS) for kernel in KERNELS]
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for name, scores in results.items():
        method = METHODS[name]
        moved = [np.mean([score.deviation[path] for score in scores]) for path in paths]
        if not any(moved):
            continue  # the linear probe: nothing to draw on a logarithmic axis
        axes.plot(
            moved, marker=method.marker, markersize=5, color=method.colour, label=method.label
        )
    axes.set_yscale("log")
    axes.set_ylabel(r"relative deviation  $\|\theta - \theta_0\| \,/\, \|\theta_0\|$")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.yaxis.set_minor_locator(NullLocator())
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
    if axes.lines:
        figure.legend(loc="outside right center", frameon=False)
    return figure
