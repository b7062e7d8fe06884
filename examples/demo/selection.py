"""Repeats the choice of the settings in `methods.py`, by in-distribution validation only.

    python -m examples.demo.selection [--only WORD,...] [SEED ...]

trains every setting below, on seeds that the demo does not report. It scores them on the 2,000
held-out movie snippets, and separately on those that TPGM's radii were not learned on, by which
TPGM is compared. No test set and no other domain is scored.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import numpy as np
import optax
from rich.console import Console

import optax_spd
from examples.demo import assets, data, experiment, methods, training
from examples.demo.experiment import Workbench
from examples.demo.methods import Recipe
from examples.demo.minilm import Params

SEEDS = (100, 101)
EXAMPLES = 512
STEPS = 128
PEAK = 3e-4
LEARNED_ON = experiment.VALIDATION  # TPGM learns radii on this many of the held-out snippets


def _adamw(decay: float) -> Recipe:
    return lambda lr: optax.adamw(lr, weight_decay=decay)


def _l2_sp(decay: float) -> Recipe:
    return lambda lr: optax_spd.adamw_l2_sp(lr, weight_decay=decay)


def _spd(decay: float) -> Recipe:
    return lambda lr: optax_spd.adam_spd(lr, weight_decay=decay)


# The settings to try: name, peak learning rate, optimizer, steps between validation batches.
GRID: list[tuple[str, float, Recipe, int | None]] = [
    *((f"SPD {decay:g}", PEAK, _spd(decay), None) for decay in (1.0, 2.0, 3.0, 5.0)),
    *((f"L2-SP {decay:g}", PEAK, _l2_sp(decay), None) for decay in (30.0, 100.0, 300.0)),
    *(
        (f"cautious L2-SP {decay:g}", PEAK, partial(methods.cautious, decay=decay), None)
        for decay in (30.0, 100.0, 300.0, 1000.0)
    ),
    *(
        (f"AdamP {decay:g}", PEAK, partial(methods.adamp, decay=decay), None)
        for decay in (0.1, 1.0, 10.0)
    ),
    *(
        (f"sparse SPD {fraction:g}", PEAK, partial(methods.sparse, fraction=fraction), None)
        for fraction in (0.01, 0.05, 0.2)
    ),
    *((f"Adam, lr {peak:g}", peak, lambda lr: optax.adam(lr), None) for peak in (1e-4, PEAK)),
    *((f"AdamW {decay:g}", PEAK, _adamw(decay), None) for decay in (0.1, 1.0, 10.0)),
    *(
        (f"TPGM {rate:g}", PEAK, partial(methods.tpgm, rate=rate), methods.TPGM_EVERY)
        for rate in (1e-2, 3e-2, 1e-1)
    ),
    *(
        (f"FTP {rate:g}, k {k:g}", PEAK, partial(methods.ftp, rate=rate, k=k), None)
        for rate, k in ((3e-3, 1.0), (1e-2, 1.0), (3e-2, 1.0), (1e-2, 0.0))
    ),
    *(
        (f"layer decay {decay:g}", PEAK, partial(methods.layer_decay, decay=decay), None)
        for decay in (0.65, 0.75, 0.85)
    ),
    *(
        (f"{name} {factor:g}", factor * PEAK, recipe, None)
        for name, recipe in (("SGD", methods.sgd), ("SGD freeze", methods.sgd_freeze))
        for factor in (3.0, 10.0, 30.0)
    ),
    *(
        (
            f"TempBalance {low:g} to {high:g}",
            PEAK,
            partial(methods.temp_balance, low=low, high=high),
            None,
        )
        for low, high in ((0.5, 1.5), (0.75, 1.25))
    ),
    (
        "TempBalance sigmoid, blocks",
        PEAK,
        partial(methods.temp_balance, unit="block", assign="sigmoid"),
        None,
    ),
]
# For TPGM after training: the radii's learning rate and the number of batches.
AFTER = ((1e-2, 32), (3e-2, 32), (1e-1, 32))


class Selection:
    """The pretrained model, the held-out data, and the scores so far."""

    def __init__(self, only: Sequence[str]) -> None:
        self.only = only
        self.console = Console(width=110, highlight=False)
        self.bench = Workbench.load(assets.cache_directory(), self.console.print)
        self.held_out = self.bench.splits.validation
        self.frozen = training.embed(self.bench.encoder, self.held_out)
        self.found: dict[str, list[tuple[float, ...]]] = defaultdict(list)

    def run(self, seed: int) -> None:
        """Trains and scores every wanted setting on one training set."""
        texts = self.bench.splits.training(EXAMPLES, seed)
        learned_on = self.held_out.first(LEARNED_ON)
        head = training.linear_probe(
            training.embed(self.bench.encoder, texts),
            texts.labels,
            self.frozen,
            self.held_out.labels,
        )
        start = {"encoder": self.bench.encoder, "head": head}
        self.score(seed, "linear probe", start, self.frozen)
        batches = list(data.training_batches(texts, STEPS, seed))
        for name, peak, recipe, every in GRID:
            after = name == f"Adam, lr {PEAK:g}" and self.wanted("after")
            if not self.wanted(name) and not after:
                continue
            tx = recipe(training.schedule(peak, STEPS))
            validation = None
            if every is not None:
                validation = experiment.validation_for(learned_on, STEPS, every, seed)
            fitted = training.fit(start, tx, batches, lambda: None, validation)
            self.score(seed, name, fitted.params)
            for rate, count in AFTER if after else ():
                projected = experiment.project_back(
                    fitted.params, start, learned_on, seed, rate, count
                )
                self.score(seed, f"TPGM after {rate:g}, {count} batches", projected.params)

    def wanted(self, name: str) -> bool:
        """Whether the name contains one of the requested words."""
        return not self.only or any(word in name for word in self.only)

    def score(
        self, seed: int, name: str, params: Params, embedded: np.ndarray | None = None
    ) -> None:
        """Prints and records the scores of one result."""
        if embedded is None:
            embedded = training.embed(params["encoder"], self.held_out)
        scores, labels = training.logits(params, embedded), self.held_out.labels
        unseen = slice(LEARNED_ON, None)
        row = (
            100 * training.accuracy(scores, labels),
            100 * training.accuracy(scores[unseen], labels[unseen]),
            training.auc(scores, labels),
            training.drift(params["encoder"], self.bench.encoder)[0],
        )
        self.found[name].append(row)
        self.console.print(_line(f"seed {seed}: {name}", row))


def main() -> None:
    """Prints a line per setting and seed, then the means."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo.selection")
    parser.add_argument("seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--only", default="", help="settings whose name contains one of these")
    options = parser.parse_args()
    selection = Selection([word for word in options.only.split(",") if word])
    for seed in options.seeds:
        selection.run(seed)
    selection.console.print(f"mean of {len(options.seeds)}")
    for name, rows in selection.found.items():
        selection.console.print(_line(name, np.mean(rows, axis=0)))


def _line(name: str, row: Sequence[float] | np.ndarray) -> str:
    return (
        f"{name:40} accuracy {row[0]:.2f}, unseen {row[1]:.2f}  AUC {row[2]:.4f}  "
        f"distance {row[3]:.2f}"
    )


if __name__ == "__main__":
    main()
