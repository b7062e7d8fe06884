"""The figures of the benchmark: accuracy in and out of distribution, and the grids of strengths."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from benchmarks.robustness import plan, report
from benchmarks.robustness.methods import METHODS
from benchmarks.robustness.plan import Results
from examples.demo.methods import METHODS as STYLES


def write(out: Path, stores: Mapping[str, Results]) -> None:
    """Draws what there are runs for."""
    results = {key: run for each in stores.values() for key, run in each.items()}
    for setting in stores:
        with suppress(plan.UndecidedError):
            if report.rows(setting, False, results):
                accuracy(setting, results).savefig(out / f"{setting}.png", dpi=150)
            if plan.PLANS[setting].grid_seeds and report.grid_table(setting, "spd", results):
                grids(setting, results).savefig(out / f"{setting}_grid.png", dpi=150)
    plt.close("all")


def accuracy(setting: str, results: Results) -> Figure:
    """Shifted over in-distribution accuracy with 95 % intervals, one panel a regime."""
    regimes = [fast for fast in (False, True) if len(report.rows(setting, fast, results)) > 1]
    figure, axes = plt.subplots(
        1,
        len(regimes),
        figsize=(4.6 * len(regimes), 4.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, fast in zip(axes[0], regimes, strict=True):
        for method, row in report.rows(setting, fast, results).items():
            if row.diverged:
                continue
            x, y = row.of(report.in_distribution), row.of(report.shifted)
            style = STYLES[method]
            axis.errorbar(
                x.mean,
                y.mean,
                np.nan_to_num(y.half),
                np.nan_to_num(x.half),
                fmt=style.marker,
                color=style.colour,
                elinewidth=0.8,
                capsize=2,
                label=METHODS[method].title,
            )
        axis.set_title(report.REGIMES[fast], fontsize=10)
        axis.set_xlabel("accuracy in distribution, %")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("mean accuracy on shifted data, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    return figure


def grids(setting: str, results: Results) -> Figure:
    """Accuracy over strength and learning rate: a column a method, in distribution and shifted."""
    figure, axes = plt.subplots(
        2, len(plan.GRID), figsize=(9.2, 4.8), layout="constrained", sharey="row"
    )
    for line, what in enumerate(("in distribution", "shifted")):
        tables = {m: report.grid_table(setting, m, results) for m in plan.GRID}
        values = [cell[line] for table in tables.values() for cell in table.values()]
        low, high = max(min(values), max(values) - 15), max(values)
        for axis, (method, table) in zip(axes[line], tables.items(), strict=True):
            shape = (len(plan.GRID_RATES), len(plan.GRID_STRENGTHS))
            cells = np.full(shape, np.nan)
            cells.flat[: len(table)] = [cell[line] for cell in table.values()]
            image = axis.imshow(cells, cmap="cividis", vmin=low, vmax=high, aspect="auto")
            for (i, j), value in np.ndenumerate(cells):
                dark = value < (low + high) / 2
                axis.text(
                    j,
                    i,
                    f"{value:.1f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else "black",
                )
            made = plan.grid(setting, method, results)
            axis.set_xticks(range(shape[1]), [f"{c.strength:.2g}" for c in made[: shape[1]]])
            axis.set_yticks(range(shape[0]), [f"{c.rate:.2g}" for c in made[:: shape[1]]])
            axis.tick_params(labelsize=7)
            if line == 0:
                axis.set_title(METHODS[method].title, fontsize=10)
            else:
                axis.set_xlabel(METHODS[method].strength or "", fontsize=8)
        axes[line][0].set_ylabel("learning rate", fontsize=8)
        figure.colorbar(image, ax=axes[line], label=f"{what}, %", shrink=0.9)
    return figure
