"""What the settings with pictures share: their batches, scores and the start of the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from benchmarks.robustness.setting import Batch, Examples, Params

BATCH = 48
EVALUATION_BATCH = 250
# Inverse regularisation strengths of the probe, strongest regularisation first.
PROBE_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


def take(examples: Examples, indices: np.ndarray) -> Examples:
    """The examples at `indices`, in that order."""
    return Examples(examples.inputs[indices], examples.labels[indices])


def training_batches(examples: Examples, steps: int, seed: int) -> list[Batch]:
    """`steps` batches; every epoch is reshuffled, and what does not fill a batch is left out."""
    rng = np.random.default_rng(seed)
    order = _epochs(len(examples), steps * BATCH, rng, len(examples) // BATCH * BATCH)
    return [(examples.inputs[rows], examples.labels[rows]) for rows in np.split(order, steps)]


def validation_batches(examples: Examples, count: int, seed: int) -> Batch:
    """`count` random batches on a leading axis; they cover the examples epoch by epoch."""
    rng = np.random.default_rng(seed)
    order = _epochs(len(examples), count * BATCH, rng, len(examples))
    rows = order.reshape(count, BATCH)
    return examples.inputs[rows], examples.labels[rows]


def _epochs(size: int, count: int, rng: np.random.Generator, used: int) -> np.ndarray:
    """The first `count` indices of shuffled epochs, of each of which `used` are taken."""
    return np.concatenate([rng.permutation(size)[:used] for _ in range(-(-count // used))])[:count]


def in_batches(apply: Callable[[Any], jax.Array], inputs: np.ndarray) -> np.ndarray:
    """`apply` to all inputs, in batches of one shape: the last is filled up with zeros."""
    rows = []
    for first in range(0, len(inputs), EVALUATION_BATCH):
        batch = inputs[first : first + EVALUATION_BATCH]
        missing = EVALUATION_BATCH - len(batch)
        filled = np.pad(batch, [(0, missing)] + [(0, 0)] * (inputs.ndim - 1))
        rows.append(np.asarray(apply(filled))[: len(batch)])
    return np.concatenate(rows)


def probe(
    features: np.ndarray,
    labels: np.ndarray,
    validation_features: np.ndarray,
    validation_labels: np.ndarray,
) -> Params:
    """The head of LP-FT (Kumar et al., 2022): multinomial logistic regression on frozen features.

    Its regularisation is the value of `PROBE_STRENGTHS` with the best validation accuracy.
    Features are divided by their common root mean square, so that the values suit any network.
    """
    scale = float(np.sqrt(np.mean(features**2)))
    # On a busy machine BLAS's threads wait for each other: a fit took a hundred times as long.
    with threadpool_limits(1):
        fits = [
            LogisticRegression(C=strength, max_iter=2000).fit(features / scale, labels)
            for strength in PROBE_STRENGTHS
        ]
    best = max(fits, key=lambda fit: fit.score(validation_features / scale, validation_labels))
    kernel = np.asarray(best.coef_.T / scale, np.float32)
    return {"kernel": kernel, "bias": np.asarray(best.intercept_, np.float32)}
