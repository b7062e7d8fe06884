"""Fine-tuning with a plain jitted Optax loop, and the scores of the result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import optax_spd
from examples.demo.data import Batch, Texts, evaluation_batches, join
from examples.demo.errors import DivergedError
from examples.demo.methods import BALANCED
from examples.demo.minilm import Classifier, Encoder, Params

Tick = Callable[[], None]
Watch = Callable[[int, float, Params, Any], None]  # after a step: its number, loss, params, state

# Inverse regularisation strengths of the linear probe, strongest regularisation first.
PROBE_STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)


def loss_fn(params: Params, tokens: jax.Array, mask: jax.Array, labels: jax.Array) -> jax.Array:
    logits = Classifier().apply({"params": params}, tokens, mask)
    loss: jax.Array = optax.sigmoid_binary_cross_entropy(logits, labels).mean()
    return loss


# Compiled separately from the optimizer's update, so that all methods share one program per length.
loss_and_gradient = jax.jit(jax.value_and_grad(loss_fn))


def validation_loss(params: Params, batch: Batch) -> jax.Array:
    """The loss that TPGM's radii minimise: the training loss on other data (without dropout)."""
    tokens, mask, labels = map(jnp.asarray, batch)
    return loss_fn(params, tokens, mask, labels)


@dataclass(frozen=True)
class Validation:
    """Validation batches on a leading axis; every `every` steps the next one is used."""

    batches: Batch
    every: int

    def at(self, step: int) -> Batch:
        """The batch for a step, with a leading axis of 1."""
        number = step // self.every
        tokens, mask, labels = (array[number : number + 1] for array in self.batches)
        return tokens, mask, labels


@dataclass(frozen=True)
class Fitted:
    """The result of a method.

    Radii, scales and exponents are by path. `scales` are TempBalance's last ones for the arrays
    with a spectrum, `exponents` their α. `alpha` is WiSE-FT's share of the fine-tuned weights.
    """

    params: Params
    step_seconds: float | None = None
    radii: dict[str, float] | None = None
    alpha: float | None = None
    exponents: dict[str, float] | None = None
    scales: dict[str, float] | None = None


# Optimizer and loss are static, so a second fit with the same ones reuses the compiled program.
# Parameters and state are donated, so they are overwritten in place.
@partial(jax.jit, static_argnums=(0, 5), donate_argnums=(1, 2))
def apply_gradient(
    tx: optax.GradientTransformation,
    params: Params,
    state: Any,
    grads: Params,
    held_out: Any,
    loss: Callable[[Params, Any], jax.Array] = validation_loss,
) -> tuple[Params, Any]:
    # Only TPGM takes these arguments.
    extra: dict[str, Any] = {}
    if held_out is not None:
        extra = {"validation_fn": loss, "validation_batches": held_out}
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state


def fit(
    start: Params,
    tx: optax.GradientTransformation,
    batches: Sequence[Batch],
    tick: Tick,
    validation: Validation | None = None,
    watch: Watch | None = None,
) -> Fitted:
    """Fine-tunes a copy of `start` with any Optax optimizer, one step per batch.

    `watch` is called after every step; the next one overwrites what it gets.

    The seconds per step are the mean of the second half, when everything is compiled.

    Raises:
      DivergedError: a loss or a parameter is no longer finite.
    """
    params: Params = jax.tree.map(jnp.array, start)
    state = tx.init(params)
    half = len(batches) // 2
    began = time.perf_counter()
    for step, (tokens, mask, labels) in enumerate(batches):
        if step == half:
            jax.block_until_ready(params)
            began = time.perf_counter()
        loss, grads = loss_and_gradient(params, tokens, mask, labels)
        held_out = None if validation is None else validation.at(step)
        params, state = apply_gradient(tx, params, state, grads, held_out)
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at step {step}: try a smaller --lr")
        if watch is not None:
            watch(step + 1, float(loss), params, state)
        tick()
    jax.block_until_ready(params)
    seconds = (time.perf_counter() - began) / (len(batches) - half)
    if not math.isfinite(optax.tree.norm(params)):
        raise DivergedError("the parameters after the last step are not finite: try a smaller --lr")
    exponents, scales = _balance(params, state)
    return Fitted(params, seconds, _radii(params, state), exponents=exponents, scales=scales)


def _radii(params: Params, state: Any) -> dict[str, float] | None:
    """The radii of TPGM or FTP by path; None for other methods."""
    for key in ("tpgm_radii", "ftp_radii"):
        if (radii := optax.tree.get(state, key)) is not None:
            return named_radii(params, radii)
    return None


def _balance(params: Params, state: Any) -> tuple[dict[str, float] | None, dict[str, float] | None]:
    """TempBalance's exponents and scales by path; None for other methods."""
    exponents = optax.tree.get(state, "temp_balance_alpha")
    if exponents is None:
        return None, None
    scales = optax.tree.get(state, "temp_balance_scale")
    names = optax_spd.layer_names(params, mask=BALANCED)
    found = [row for row in zip(names, exponents, scales, strict=True) if row[1] > 0]
    return {n: float(e) for n, e, _ in found}, {n: float(s) for n, _, s in found}


def named_radii(params: Params, radii: jax.Array) -> dict[str, float]:
    """A vector of radii as a dictionary by parameter path."""
    return dict(zip(optax_spd.layer_names(params), map(float, radii), strict=True))


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


def embed_all(
    encoder: Params, sets: Mapping[str, Texts], tick: Tick = lambda: None
) -> dict[str, np.ndarray]:
    """Embeddings of several sets. They are batched together, so that few batches need padding."""
    rows = embed(encoder, join(sets.values()), tick)
    ends = np.cumsum([len(texts) for texts in sets.values()])
    return dict(zip(sets, np.split(rows, ends[:-1]), strict=True))


def logits(params: Params, embeddings: np.ndarray) -> np.ndarray:
    """The scores of the linear head, from the embeddings."""
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
