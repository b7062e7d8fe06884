"""How the decay strengths in `methods.py` were chosen: by in-distribution validation alone.

    python -m examples.demo.selection [SEED ...]

trains every setting below on seeds the demo does not report and scores it on the 2,000 held-out
movie snippets. Nothing here scores a test set or another domain. About 10 minutes a seed
on 2 cores.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import optax
from rich.console import Console

import optax_spd
from examples.demo import assets, data, training
from examples.demo.experiment import Workbench
from examples.demo.methods import Recipe
from examples.demo.minilm import Params

SEEDS = (100, 101)
EXAMPLES = 512
STEPS = 128
PEAK = 3e-4


def _adamw(decay: float) -> Recipe:
    return lambda lr: optax.adamw(lr, weight_decay=decay)


def _l2_sp(decay: float) -> Recipe:
    return lambda lr: optax_spd.adamw_l2_sp(lr, weight_decay=decay)


def _spd(decay: float) -> Recipe:
    return lambda lr: optax_spd.adam_spd(lr, weight_decay=decay)


# What is tried: name, peak learning rate, optimizer.
GRID: list[tuple[str, float, Recipe]] = [
    *((f"SPD {decay:g}", PEAK, _spd(decay)) for decay in (1.0, 2.0, 3.0, 5.0)),
    *((f"L2-SP {decay:g}", PEAK, _l2_sp(decay)) for decay in (30.0, 100.0, 300.0)),
    *((f"Adam, lr {peak:g}", peak, lambda lr: optax.adam(lr)) for peak in (1e-4, PEAK)),
    *((f"AdamW {decay:g}", PEAK, _adamw(decay)) for decay in (0.1, 1.0, 10.0)),
]


def main(seeds: Sequence[int]) -> None:
    """Prints a line a setting and seed, then the means."""
    console = Console(width=100, highlight=False)
    bench = Workbench.load(assets.cache_directory(), console.print)
    validation = bench.splits.validation
    frozen = training.embed(bench.encoder, validation)
    found = defaultdict(list)

    def score(name: str, params: Params, embedded: np.ndarray) -> None:
        scores = training.logits(params, embedded)
        row = (
            100 * training.accuracy(scores, validation.labels),
            training.auc(scores, validation.labels),
            training.drift(params["encoder"], bench.encoder)[0],
        )
        found[name].append(row)
        console.print(_line(f"seed {seed}: {name}", row))

    for seed in seeds:
        texts = bench.splits.training(EXAMPLES, seed)
        head = training.linear_probe(
            training.embed(bench.encoder, texts), texts.labels, frozen, validation.labels
        )
        start = {"encoder": bench.encoder, "head": head}
        score("linear probe", start, frozen)
        for name, peak, recipe in GRID:
            batches = data.training_batches(texts, STEPS, seed)
            tx = recipe(training.schedule(peak, STEPS))
            params = training.fit(start, tx, batches, lambda: None)
            score(name, params, training.embed(params["encoder"], validation))

    console.print(f"mean of {len(seeds)}")
    for name, rows in found.items():
        console.print(_line(name, np.mean(rows, axis=0)))


def _line(name: str, row: Sequence[float] | np.ndarray) -> str:
    return f"{name:26} accuracy {row[0]:.2f}  AUC {row[1]:.4f}  distance {row[2]:.2f}"


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or SEEDS)
