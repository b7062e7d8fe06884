"""Fine-tuning: a plain jitted Optax loop, and the scores of what comes out of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from examples.demo.data import Batch, Texts, evaluation_batches
from examples.demo.errors import DemoError
from examples.demo.minilm import Classifier, Encoder, Params

Tick = Callable[[], None]

# Inverse regularisation strengths of the linear probe, strongest regularisation first.
PROBE_STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)


def loss_fn(params: Params, tokens: jax.Array, mask: jax.Array, labels: jax.Array) -> jax.Array:
    logits = Classifier().apply({"params": params}, tokens, mask)
    loss: jax.Array = optax.sigmoid_binary_cross_entropy(logits, labels).mean()
    return loss


# Compiled apart from the optimizer's update, so that all methods share one program per length.
loss_and_gradient = jax.jit(jax.value_and_grad(loss_fn))


def fit(
    start: Params, tx: optax.GradientTransformation, batches: Iterable[Batch], tick: Tick
) -> Params:
    """Fine-tunes a copy of `start` with any Optax optimizer, one step a batch."""

    # Donated, the old parameters and state are overwritten in place instead of held beside the
    # new ones.
    @partial(jax.jit, donate_argnums=(0, 1))
    def apply_gradient(params: Params, state: Any, grads: Params) -> tuple[Params, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params: Params = jax.tree.map(jnp.array, start)
    state = tx.init(params)
    for step, (tokens, mask, labels) in enumerate(batches):
        loss, grads = loss_and_gradient(params, tokens, mask, labels)
        params, state = apply_gradient(params, state, grads)
        if not math.isfinite(loss):
            raise DemoError(f"the loss is {loss} at step {step}: try a smaller --lr")
        tick()
    return params


def schedule(peak: float, steps: int) -> optax.Schedule:
    """Linear warm-up over the first tenth of the steps, then linear decay to zero."""
    warm_up = max(1, steps // 10)
    return optax.join_schedules(
        [
            optax.linear_schedule(peak / warm_up, peak, warm_up - 1),
            optax.linear_schedule(peak, 0.0, steps - warm_up + 1),
        ],
        [warm_up - 1],
    )


@jax.jit
def _embed(params: Params, tokens: jax.Array, mask: jax.Array) -> Any:
    return Encoder().apply({"params": params}, tokens, mask)


def embed(encoder: Params, texts: Texts, tick: Tick = lambda: None) -> np.ndarray:
    """Mean-pooled embeddings of all texts, in their order."""
    rows = np.zeros((len(texts), encoder["norm"]["scale"].shape[0]), np.float32)
    for indices, (tokens, mask, _) in evaluation_batches(texts):
        rows[indices] = _embed(encoder, tokens, mask)[: len(indices)]
        tick()
    return rows


def logits(params: Params, embeddings: np.ndarray) -> np.ndarray:
    """The head's scores; the head is linear, so embeddings are all it needs."""
    head = params["head"]
    scores: np.ndarray = embeddings @ np.asarray(head["kernel"])[:, 0] + np.asarray(head["bias"])
    return scores


def linear_probe(
    embeddings: np.ndarray,
    labels: np.ndarray,
    validation_embeddings: np.ndarray,
    validation_labels: np.ndarray,
) -> Params:
    """The head of LP-FT (Kumar et al., 2022): logistic regression on the frozen embeddings.

    Its regularisation is the value of `PROBE_STRENGTHS` with the best validation accuracy.
    """
    heads = []
    for strength in PROBE_STRENGTHS:
        fitted = LogisticRegression(C=strength, max_iter=1000).fit(embeddings, labels)
        kernel = np.asarray(fitted.coef_.T, np.float32)
        heads.append({"kernel": kernel, "bias": np.asarray(fitted.intercept_, np.float32)})

    def score(head: Params) -> float:
        return accuracy(logits({"head": head}, validation_embeddings), validation_labels)

    return max(heads, key=score)


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean((scores > 0) == (labels == 1)))


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    return float(roc_auc_score(labels, scores))


def drift(params: Params, anchor: Params) -> tuple[float, float]:
    """Euclidean distance of two trees, and the same relative to the anchor's norm."""
    difference = jax.tree.map(lambda p, a: p - a, params, anchor)
    distance = float(optax.tree.norm(difference))
    return distance, distance / float(optax.tree.norm(anchor))
