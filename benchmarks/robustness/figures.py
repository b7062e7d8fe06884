"""The figures of the benchmark: differences to Adam, and the grids of strengths."""

from __future__ import annotations

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

LOWEST = -25.0  # points; what is below stands at the edge as an arrow
MEASURES = (
    ("shifted", report.shifted, "tab:blue", -0.15),
    ("in distribution", report.in_distribution, "tab:gray", 0.15),
)  # filled where the interval leaves out 0


def write(out: Path, results: Results) -> None:
    """Draws what there are runs for."""
    for setting in report.settings(results):
        with suppress(plan.UndecidedError):
            if {"adam", "spd"} <= report.rows(setting, False, results).keys():
                differences(setting, results).savefig(out / f"{setting}.png", dpi=150)
            if len(report.forgiving_table(setting, results)) > len(plan.GRID):  # complete
                grids(setting, results).savefig(out / f"{setting}_grid.png", dpi=150)
    plt.close("all")


def differences(setting: str, results: Results) -> Figure:
    """Accuracy minus Adam's with 95 % intervals: a row a method, a panel a regime."""
    panels = {fast: report.rows(setting, fast, results) for fast in report.REGIMES}
    panels = {fast: found for fast, found in panels.items() if len(found) > 1 and "adam" in found}
    names = [name for name in panels[False] if name not in ("adam", "probe")]
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(4.6 * len(panels), 1.2 + 0.3 * len(names)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (fast, found) in zip(axes[0], panels.items(), strict=True):
        for label, measure, colour, offset in MEASURES:
            for place, name in enumerate(names):
                if name not in found or found[name].diverged or found["adam"].diverged:
                    continue
                gain = found[name].against(found["adam"], measure)
                axis.errorbar(
                    max(gain.mean, LOWEST),
                    place + offset,
                    xerr=np.nan_to_num(gain.half) if gain.mean > LOWEST else 0.0,
                    fmt="o" if gain.mean > LOWEST else "<",
                    color=colour,
                    markerfacecolor=colour if gain.shown else "white",
                    markersize=5,
                    capsize=2,
                    label=label if place == 0 else None,
                )
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(report.REGIMES[fast], fontsize=10)
        axis.set_xlabel("accuracy minus Adam's, points")
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_yticks(range(len(names)), [METHODS[name].title for name in names])
    axes[0][0].invert_yaxis()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
    return figure


def grids(setting: str, results: Results) -> Figure:
    """Accuracy over strength and learning rate: a column a method, in distribution and shifted."""
    figure, axes = plt.subplots(
        2, len(plan.GRID), figsize=(9.2, 4.8), layout="constrained", sharey="row"
    )
    for line, what in enumerate(("in distribution", "shifted")):
        tables = {m: report.grid_table(setting, m, results) for m in plan.GRID}
        values = [cell[line] for table in tables.values() for cell in table.values()]
        high = np.nanmax(values)
        low = max(np.nanmin(values), high - 15)
        for axis, (method, table) in zip(axes[line], tables.items(), strict=True):
            shape = (len(plan.GRID_RATES), len(plan.GRID_STRENGTHS))
            cells = np.full(shape, np.nan)
            cells.flat[:] = [cell[line] for cell in table.values()]
            image = axis.imshow(cells, cmap="cividis", vmin=low, vmax=high, aspect="auto")
            for (i, j), value in np.ndenumerate(cells):
                dark = value < (low + high) / 2
                axis.text(
                    j,
                    i,
                    "div." if np.isnan(value) else f"{value:.1f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else "black",
                )
            made = plan.grid(setting, method, results)
            strengths = [float(f"{c.strength:.2g}") for c in made[: shape[1]]]  # 650, not 6.5e+02
            axis.set_xticks(range(shape[1]), [f"{strength:g}" for strength in strengths])
            axis.set_yticks(range(shape[0]), [f"{c.rate:.2g}" for c in made[:: shape[1]]])
            axis.tick_params(labelsize=7)
            if line == 0:
                axis.set_title(METHODS[method].title, fontsize=10)
            else:
                axis.set_xlabel(METHODS[method].strength or "", fontsize=8)
        axes[line][0].set_ylabel("learning rate", fontsize=8)
        figure.colorbar(image, ax=axes[line], label=f"{what}, %", shrink=0.9)
    return figure
