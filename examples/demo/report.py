"""The table, statement and pictures of a run with a single number of training examples."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from rich import box
from rich.table import Table

from examples.demo import data, output
from examples.demo.experiment import Outcome, Settings
from examples.demo.methods import METHODS
from examples.demo.minilm import BLOCKS
from examples.demo.output import Report
from examples.demo.pictures import (
    KERNELS,
    accuracy_picture,
    deviation_picture,
    radius_picture,
)
from examples.demo.scores import Results, Score, gain

AGGRESSIVE = 3e-4  # three times the rate at which Adam validates best; see README.md


def report(settings: Settings, outcome: Outcome) -> Report:
    results = outcome.results
    return Report(
        table(results),
        legend(settings, results),
        statement(settings, results),
        [remark for remark in (radius_order(results), balance(results)) if remark],
        {
            "accuracy.png": accuracy_picture(results),
            "deviation.png": deviation_picture(results),
            "radii.png": radius_picture(results),
        },
        {
            "radius_order": {
                name: orders
                for name, scores in results.items()
                if (orders := _depth_orders(scores))
            },
            "diverged": outcome.diverged,
            "results": output.numbers(results),
        },
    )


def table(results: Results) -> Table:
    """One row per method; with several seeds the mean, and two columns' standard deviation."""
    # Fits a terminal of 80 columns with one seed, of 90 with more.
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    shown.add_column("method", no_wrap=True)
    for heading in (
        "ID",
        *data.OUT_OF_DISTRIBUTION,
        "mean\nOOD",
        "ID\nAUC",
        "OOD\nAUC",
        "dist.",
        "sec",
        "s per\nstep",
    ):
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, scores in results.items():
        identity = data.IN_DISTRIBUTION
        shown.add_row(
            METHODS[name].label,
            _spread([100 * score.accuracy[identity] for score in scores]),
            *(
                f"{100 * np.mean([score.accuracy[domain] for score in scores]):.1f}"
                for domain in data.OUT_OF_DISTRIBUTION
            ),
            _spread([100 * score.shifted_accuracy for score in scores]),
            f"{np.mean([score.auc[identity] for score in scores]):.3f}",
            f"{np.mean([score.shifted_auc for score in scores]):.3f}",
            f"{np.mean([score.distance for score in scores]):.2f}",
            f"{np.mean([score.seconds for score in scores]):.0f}",
            _step_seconds(scores),
        )
    return shown


def legend(settings: Settings, results: Results) -> list[str]:
    """Explains the table."""
    seeds = "1 seed" if settings.seeds == 1 else f"{settings.seeds} seeds (mean ± std)"
    lines = [
        f"{settings.examples[0]} movie snippets, {settings.steps} steps of {data.BATCH}, learning "
        f"rate {settings.learning_rate:g}, {seeds}; up to {settings.evaluation} snippets in each "
        "test set.",
        f"ID ({data.IN_DISTRIBUTION}) and OOD: accuracy in %; dist.: Euclidean distance of the "
        "encoder from its pretrained weights; sec: seconds of training with compilation, without "
        "evaluation (WiSE-FT and LiNeS: of choosing a share; TPGM after: of learning its radii); s "
        "per step: mean of the second half of training, where nothing is compiled.",
        "All but “Adam new head” start from the pretrained encoder and the linear probe, which is "
        f"the anchor of those that have one. {chosen(results)}",
    ]
    for name, where in (("wise-ft", ""), ("lines", " in its lowest block")):
        alphas = [f"{score.alpha:g}" for score in results.get(name, [])]
        if alphas:
            lines.append(
                f"{METHODS[name].label} keeps this share of Adam's weights{where}, by validation "
                f"accuracy: {', '.join(alphas)}."
            )
    return lines


def chosen(names: Collection[str]) -> str:
    """The chosen settings of the methods."""
    found = [
        f"{METHODS[name].label} ("
        + ", ".join(f"{key} {value:g}" for key, value in METHODS[name].chosen.items())
        + ")"
        for name in names
        if METHODS[name].chosen
    ]
    if not found:
        return ""
    said = f"Settings, chosen on movie validation data with other seeds: {'; '.join(found)}."
    if any("weight decay" in METHODS[name].chosen for name in names):
        said += " The weight decay of SPD is not multiplied by the learning rate, others are."
    return said


def statement(settings: Settings, results: Results) -> str:
    """What this run shows about SPD compared with Adam, without extrapolation."""
    if not {"spd", "adam"} <= results.keys():
        return "No comparison: it needs both adam and spd in --methods."
    spd, adam = results["spd"], results["adam"]
    shifted = gain(spd, adam, data.OUT_OF_DISTRIBUTION)
    inside = gain(spd, adam, [data.IN_DISTRIBUTION])
    auc = np.mean([score.shifted_auc for score in spd]) - np.mean(
        [score.shifted_auc for score in adam]
    )
    further = np.mean([score.distance for score in adam]) / np.mean(
        [score.distance for score in spd]
    )
    if shifted.is_noise:
        verdict = "within noise: this run does not separate the two"
    elif shifted.mean > 0:
        verdict = "more than twice that error: SPD generalised better here"
    else:
        verdict = "more than twice that error: Adam generalised better here"
    caution = ""
    if settings.seeds == 1:
        caution = " One training set says nothing about others: --seeds 3 draws three."
    rate = f"learning rate {settings.learning_rate:g}"
    if settings.learning_rate >= AGGRESSIVE:
        rate = f"an aggressive {rate}"
    return (
        f"At {rate}, SPD against Adam out of distribution: {shifted.mean:+.1f} points"
        f"{_each(shifted.seeds)}, standard error {shifted.error:.1f} from the choice of test "
        f"snippets - {verdict}. AUC out of distribution {auc:+.3f}; in distribution "
        f"{inside.mean:+.1f} points{_each(inside.seeds)}. Adam ends {further:.1f} times as far "
        f"from the pretrained weights.{caution}"
    )


def radius_order(results: Results) -> str:
    """The rank correlation of radius and depth in this run; "" without learned radii."""
    found = []
    for name, scores in results.items():
        orders = _depth_orders(scores)
        if orders:
            relative = np.mean([order["relative"] for order in orders])
            radii = [order["radius"] for order in orders]
            found.append(
                f"{METHODS[name].label} {np.mean(radii):+.2f}{_each(radii, 2)}, "
                f"relative to the pretrained matrix {relative:+.2f}"
            )
    if not found:
        return ""
    return (
        "Rank correlation of radius and depth (block), mean of the six kinds of kernel: "
        + "; ".join(found)
        + ". At +1 each block's radius is wider than all below it, at -1 tighter; six kinds "
        "without any order would average 0, give or take 0.18."
    )


def balance(results: Results) -> str:
    """TempBalance's last factors for each kind of kernel; "" without TempBalance."""
    found = [score.scales for score in results.get("temp-balance", []) if score.scales]
    if not found:
        return ""
    kinds = {
        kernel: [
            scale
            for scales in found
            for path, scale in scales.items()
            if path.endswith(f"/{kernel}/kernel")
        ]
        for kernel in KERNELS
    }
    return (
        "TempBalance's last factors, kernel by kernel (mean of the blocks, least to most): "
        + ", ".join(
            f"{kernel} {np.mean(scales):.2f} ({min(scales):.2f} to {max(scales):.2f})"
            for kernel, scales in kinds.items()
        )
        + "."
    )


def _depth_orders(scores: Sequence[Score]) -> list[dict[str, float]]:
    """One entry per seed; none for a method without radii."""
    return [
        {"radius": depth_order(score.radii), "relative": depth_order(score.relative_radii)}
        for score in scores
        if score.radii and score.relative_radii
    ]


def depth_order(radii: Mapping[str, float]) -> float:
    """Spearman's correlation of radius and block number, averaged over the kinds of kernel.

    It is taken within each kind, where all kernels have the same shape and radii are comparable.
    """
    found = []
    for kernel in KERNELS:
        kind = [radii[f"encoder/block_{block}/{kernel}/kernel"] for block in range(BLOCKS)]
        ranks = _ranks(np.array(kind))
        # The correlation of equal radii is 0 / 0; they have no order.
        found.append(np.corrcoef(ranks, np.arange(BLOCKS))[0, 1] if np.ptp(ranks) else 0.0)
    return float(np.mean(found))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values get the mean of their ranks."""
    below = (values[:, None] > values).sum(1)
    ranks: np.ndarray = below + ((values[:, None] == values).sum(1) - 1) / 2
    return ranks


def _spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean}±{np.std(values, ddof=1):.1f}"


def _step_seconds(scores: Sequence[Score]) -> str:
    known = [score.step_seconds for score in scores if score.step_seconds is not None]
    return f"{np.mean(known):.3f}" if known else "-"


def _each(values: Sequence[float] | np.ndarray, digits: int = 1) -> str:
    if len(values) == 1:
        return ""
    return " (seed by seed " + ", ".join(f"{value:+.{digits}f}" for value in values) + ")"
