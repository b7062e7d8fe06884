"""The table, the closing statement and the files of a run."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import box
from rich.table import Table

import optax_spd
from examples.demo import data, methods
from examples.demo.errors import DemoError
from examples.demo.experiment import DOMAINS, Outcome, Results, Score, Settings
from examples.demo.methods import METHODS
from examples.demo.minilm import BLOCKS
from examples.demo.pictures import (
    KERNELS,
    accuracy_picture,
    deviation_picture,
    radius_picture,
)

AGGRESSIVE = 3e-4  # three times the rate at which Adam validates best; see README.md


def table(results: Results) -> Table:
    """One row a method; with several seeds the mean, and the standard deviation where it counts."""
    # Narrow enough for a terminal of 80 columns with one seed, of 90 with more.
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
    """What the reader of the table has to know."""
    seeds = "1 seed" if settings.seeds == 1 else f"{settings.seeds} seeds (mean ± std)"
    lines = [
        f"{settings.examples} movie snippets, {settings.steps} steps of {data.BATCH}, learning "
        f"rate {settings.learning_rate:g} for all methods, {seeds}; up to {settings.evaluation} "
        "snippets in each test set.",
        f"ID ({data.IN_DISTRIBUTION}) and OOD: accuracy in %; dist.: Euclidean distance of the "
        "encoder from its pretrained weights; sec: seconds of training with compilation, without "
        "evaluation (WiSE-FT: of choosing its share; TPGM after: of learning its radii); s per "
        "step: mean of the second half of training, where nothing is compiled.",
        "The anchor is the start: pretrained encoder and linear probe. Settings were chosen on "
        f"movie validation data with other seeds: AdamW {methods.ADAMW_WEIGHT_DECAY:g}, "
        f"L2-SP {methods.L2_SP_WEIGHT_DECAY:g} (both times the learning rate), "
        f"SPD {methods.SPD_WEIGHT_DECAY:g}; radii learn at the rate {methods.TPGM_RATE:g} on each "
        f"{methods.TPGM_EVERY}th step (TPGM), {methods.TPGM_AFTER_RATE:g} for "
        f"{methods.TPGM_AFTER_BATCHES} batches (TPGM after), {methods.FTP_RATE:g} with k "
        f"{methods.FTP_K:g} (FTP). TPGM's batches are movie validation data.",
    ]
    alphas = [f"{score.alpha:g}" for score in results.get("wise-ft", [])]
    if alphas:
        lines.append(
            "WiSE-FT keeps this share of Adam's weights, by validation accuracy: "
            + ", ".join(alphas)
            + "."
        )
    return lines


def statement(settings: Settings, results: Results) -> str:
    """What this run shows about SPD against Adam, and no more."""
    if not {"spd", "adam"} <= results.keys():
        return "No comparison: it needs both adam and spd in --methods."
    pairs = list(zip(results["spd"], results["adam"], strict=True))
    identity = data.IN_DISTRIBUTION
    shifted = [100 * (spd.shifted_accuracy - adam.shifted_accuracy) for spd, adam in pairs]
    inside = [100 * (spd.accuracy[identity] - adam.accuracy[identity]) for spd, adam in pairs]
    auc = float(np.mean([spd.shifted_auc - adam.shifted_auc for spd, adam in pairs]))
    further = np.mean([adam.distance for _, adam in pairs]) / np.mean(
        [spd.distance for spd, _ in pairs]
    )
    error = 100 * standard_error(results)
    gain = float(np.mean(shifted))
    if abs(gain) <= 2 * error or min(shifted) < 0 < max(shifted):
        verdict = "within noise: this run does not separate the two"
    elif gain > 0:
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
        f"At {rate}, SPD against Adam out of distribution: {gain:+.1f} points{_each(shifted)}, "
        f"standard error {error:.1f} from the choice of test snippets - {verdict}. "
        f"AUC out of distribution {auc:+.3f}; in distribution {np.mean(inside):+.1f} points"
        f"{_each(inside)}. Adam ends {further:.1f} times as far from the pretrained weights."
        f"{caution}"
    )


def radius_order(results: Results) -> str:
    """Whether deeper blocks got wider radii, as the order of this run's numbers; "" without any."""
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


def _depth_orders(scores: Sequence[Score]) -> list[dict[str, float]]:
    """A seed each; none for a method without radii."""
    return [
        {"radius": depth_order(score.radii), "relative": depth_order(score.relative_radii)}
        for score in scores
        if score.radii and score.relative_radii
    ]


def depth_order(radii: Mapping[str, float]) -> float:
    """Spearman's correlation of radius and block number, within each kind of kernel, averaged.

    Within a kind all blocks' kernels have the same shape, so that the radii compare.
    """
    found = []
    for kernel in KERNELS:
        kind = [radii[f"encoder/block_{block}/{kernel}/kernel"] for block in range(BLOCKS)]
        ranks = _ranks(np.array(kind))
        # Of equal radii the correlation is 0 / 0; they show no order.
        found.append(np.corrcoef(ranks, np.arange(BLOCKS))[0, 1] if np.ptp(ranks) else 0.0)
    return float(np.mean(found))


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 0; equal values share the mean of their ranks."""
    below = (values[:, None] > values).sum(1)
    ranks: np.ndarray = below + ((values[:, None] == values).sum(1) - 1) / 2
    return ranks


def standard_error(results: Results) -> float:
    """Standard error of SPD's mean OOD accuracy minus Adam's, over the choice of test snippets.

    Paired: what counts is on how many snippets the two differ, not how hard the snippets are.
    """
    variance = 0.0
    for domain in data.OUT_OF_DISTRIBUTION:
        spd, adam = (
            np.mean([score.correct[domain] for score in results[name]], axis=0)
            for name in ("spd", "adam")
        )
        variance += float(np.var(spd - adam)) / len(spd)
    return math.sqrt(variance) / len(data.OUT_OF_DISTRIBUTION)


def check_directory(directory: Path) -> None:
    """Finds out before the work, and without creating anything, whether results can be written."""
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise DemoError(f"--out {directory}: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise DemoError(f"--out {directory}: {existing} cannot be written")


def write(directory: Path, settings: Settings, outcome: Outcome, seconds: float) -> list[Path]:
    """Writes the pictures and results.json; a file appears complete or not at all."""
    results = outcome.results
    contents = {
        "accuracy.png": _png(accuracy_picture(results)),
        "deviation.png": _png(deviation_picture(results)),
        "radii.png": _png(radius_picture(results)),
        "results.json": json.dumps(_record(settings, outcome, seconds), indent=1).encode(),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".results-", dir=directory) as scratch:
            for name, content in contents.items():
                (Path(scratch) / name).write_bytes(content)
            for name in contents:
                os.replace(Path(scratch) / name, directory / name)
    except OSError as error:
        raise DemoError(f"cannot write to {directory}: {error.strerror or error}") from error
    return [directory / name for name in contents]


def _record(settings: Settings, outcome: Outcome, seconds: float) -> dict[str, Any]:
    results = outcome.results
    packages = ("jax", "jaxlib", "optax", "flax", "numpy", "scikit-learn")
    return {
        "settings": dataclasses.asdict(settings),
        "weight_decay": {
            "adamw": methods.ADAMW_WEIGHT_DECAY,
            "l2-sp": methods.L2_SP_WEIGHT_DECAY,
            "spd": methods.SPD_WEIGHT_DECAY,
        },
        "radius_learning": {
            "tpgm": {"rate": methods.TPGM_RATE, "every": methods.TPGM_EVERY, "norm": "mars"},
            "tpgm-after": {
                "rate": methods.TPGM_AFTER_RATE,
                "batches": methods.TPGM_AFTER_BATCHES,
                "norm": "mars",
            },
            "ftp": {"rate": methods.FTP_RATE, "k": methods.FTP_K, "norm": "mars"},
        },
        "versions": {
            "python": platform.python_version(),
            "optax_spd": optax_spd.__version__,
            **{package: version(package) for package in packages},
        },
        "device": str(jax.devices()[0].device_kind),
        "cores": os.cpu_count(),
        "seconds": seconds,
        "domains": DOMAINS,
        "statement": statement(settings, results),
        "radius_order": {
            name: orders for name, scores in results.items() if (orders := _depth_orders(scores))
        },
        "diverged": outcome.diverged,
        "results": {
            name: [
                {key: value for key, value in dataclasses.asdict(score).items() if key != "correct"}
                | {"mean_ood_accuracy": score.shifted_accuracy, "mean_ood_auc": score.shifted_auc}
                for score in scores
            ]
            for name, scores in results.items()
        },
    }


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean}±{np.std(values, ddof=1):.1f}"


def _step_seconds(scores: Sequence[Score]) -> str:
    known = [score.step_seconds for score in scores if score.step_seconds is not None]
    return f"{np.mean(known):.3f}" if known else "-"


def _each(values: Sequence[float], digits: int = 1) -> str:
    if len(values) == 1:
        return ""
    return " (seed by seed " + ", ".join(f"{value:+.{digits}f}" for value in values) + ")"
