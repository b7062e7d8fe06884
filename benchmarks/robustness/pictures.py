"""What the settings with pictures share: they classify by an encoder and a linear head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from benchmarks.robustness.setting import Batch, Draw, Examples, Params, Setting

BATCH = 48
EVALUATION_BATCH = 50
# Inverse regularisation strengths of the probe, strongest regularisation first.
PROBE_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


def make(
    encode: Callable[[Params, Any], jax.Array],
    encoder: Params,
    pool: Examples,
    tests: Mapping[str, Examples],
    *,
    training: int,
    validation: int,
    held_out: int,
    steps: int,
    **described: Any,
) -> Setting:
    """A setting.

    Args:
      encode: (encoder, inputs) -> features, (batch, width).
      encoder: the pretrained weights.
      pool: where each seed draws its training and validation examples from.
      tests: the same for all seeds.
      training: the number of training examples.
      validation: the number of validation examples.
      held_out: the number of further examples, for methods that learn from validation data.
      steps: the number of training steps.
      **described: the setting's other attributes.
    """

    def logits(params: Params, inputs: Any) -> jax.Array:
        features = encode(params["encoder"], inputs)
        found: jax.Array = features @ params["head"]["kernel"] + params["head"]["bias"]
        return found

    def loss(params: Params, batch: Batch) -> jax.Array:
        inputs, labels = batch
        each = optax.softmax_cross_entropy_with_integer_labels(logits(params, inputs), labels)
        mean: jax.Array = each.mean()
        return mean

    jitted_encode, jitted_logits = jax.jit(encode), jax.jit(logits)

    def scores(params: Params, examples: Examples) -> np.ndarray:
        return in_batches(partial(jitted_logits, params), examples.inputs)

    def draw(seed: int) -> Draw:
        ends = np.cumsum([training, validation, held_out])
        parts = np.split(np.random.default_rng(seed).permutation(len(pool)), ends)[:3]
        trained, chosen_by, learned_from = (take(pool, part) for part in parts)
        features = partial(jitted_encode, encoder)
        head = probe(
            in_batches(features, trained.inputs),
            trained.labels,
            in_batches(features, chosen_by.inputs),
            chosen_by.labels,
        )
        return Draw(
            start={"encoder": encoder, "head": head},
            batches=training_batches(trained, steps, seed),
            validation=chosen_by,
            tests=tests,
            held_out=lambda count: validation_batches(learned_from, count, seed),
        )

    return Setting(
        tests=tuple(tests), steps=steps, draw=draw, loss=loss, scores=scores, **described
    )


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
