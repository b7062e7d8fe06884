"""Is it the sign test that makes SPD work? Three variants that replace it, for comparison.

SPD pulls a layer back by the ratio r where ⟨g, Δ⟩ > 0 (:func:`optax_spd.spd`). Each variant also
measures what SPD would have done on the way that the variant takes:

- `coin`: as often as the layer's sign test was positive so far, but by chance;
- `always`: in every step, by the mean of what SPD would have pulled the layer so far;
- `away`: whenever the step leads away from the anchor, whatever the gradient's sign.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_spd
from benchmarks.robustness.setting import Setting
from optax_spd.methods.spd import act, decay_ratio, measure


def coin(
    _setting: Setting, rate: optax.Schedule, weight_decay: float
) -> optax.GradientTransformation:
    def decide(
        alignment: jax.Array,
        growth: jax.Array,
        square: jax.Array,
        steps: jax.Array,
        positive: jax.Array,
        fired: jax.Array,
        *,
        weight_decay: jax.Array,
    ) -> optax_spd.Decision:
        toss = uniform(square) < positive / jnp.maximum(steps, 1)
        ratio = decay_ratio(jnp.where(toss, 1.0, 0.0), growth, square)
        memory = {"steps": steps + 1, "positive": positive + (alignment > 0)}
        return decision(ratio, fired, weight_decay, memory)

    return _adam_with(decide, {"steps": 0, "positive": 0}, rate, weight_decay)


def always(
    _setting: Setting, rate: optax.Schedule, weight_decay: float
) -> optax.GradientTransformation:
    def decide(
        alignment: jax.Array,
        growth: jax.Array,
        square: jax.Array,
        steps: jax.Array,
        total: jax.Array,
        fired: jax.Array,
        *,
        weight_decay: jax.Array,
    ) -> optax_spd.Decision:
        memory = {"steps": steps + 1, "total": total + decay_ratio(alignment, growth, square)}
        return decision(memory["total"] / memory["steps"], fired, weight_decay, memory)

    return _adam_with(decide, {"steps": 0, "total": 0.0}, rate, weight_decay)


def away(
    _setting: Setting, rate: optax.Schedule, weight_decay: float
) -> optax.GradientTransformation:
    def decide(
        alignment: jax.Array,
        growth: jax.Array,
        square: jax.Array,
        fired: jax.Array,
        *,
        weight_decay: jax.Array,
    ) -> optax_spd.Decision:
        ratio = decay_ratio(jnp.ones_like(alignment), growth, square)
        return decision(ratio, fired, weight_decay, {})

    return _adam_with(decide, {}, rate, weight_decay)


def decision(
    ratio: jax.Array, fired: jax.Array, weight_decay: jax.Array, memory: dict[str, jax.Array]
) -> optax_spd.Decision:
    """SPD's decision with another ratio; `spd_fired` counts as SPD's does."""
    return optax_spd.Decision(
        record={"spd_ratio": ratio},
        coefficients=(weight_decay * ratio,),
        changes=ratio > 0,
        memory={**memory, "spd_fired": fired + (ratio > 0)},
    )


def uniform(seed: jax.Array) -> jax.Array:
    """A number in [0, 1) that depends on every bit of a float32, as by chance."""
    bits = jax.lax.bitcast_convert_type(seed.astype(jnp.float32), jnp.uint32)
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        bits = (bits ^ (bits >> 15)) * jnp.uint32(factor)
    return (bits ^ (bits >> 16)).astype(jnp.float32) * 2.0**-32


def _adam_with(
    decide: Callable[..., optax_spd.Decision],
    memory: dict[str, Any],
    rate: optax.Schedule,
    weight_decay: float,
) -> optax.GradientTransformation:
    pull = optax_spd.layerwise(
        "spd variant",
        measure=measure,
        decide=decide,
        act=act,
        sums=3,
        memory={**memory, "spd_fired": 0},
        hyperparameters={"weight_decay": weight_decay},
    )
    return optax_spd.chain(optax.adam(rate), pull)
