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

Ratio = tuple[jax.Array, tuple[jax.Array, ...]]  # how far to pull back, and the new memory


def coin(
    _setting: Setting, rate: optax.Schedule, weight_decay: float
) -> optax.GradientTransformation:
    def ratio(
        alignment: jax.Array,
        growth: jax.Array,
        square: jax.Array,
        steps: jax.Array,
        positive: jax.Array,
    ) -> Ratio:
        toss = uniform(square) < positive / jnp.maximum(steps, 1)
        pull = decay_ratio(jnp.where(toss, 1.0, 0.0), growth, square)
        return pull, (steps + 1, positive + (alignment > 0))

    return _adam_with(ratio, {"steps": 0, "positive": 0}, rate, weight_decay)


def always(
    _setting: Setting, rate: optax.Schedule, weight_decay: float
) -> optax.GradientTransformation:
    def ratio(*sums_and_memory: jax.Array) -> Ratio:
        *sums, steps, total = sums_and_memory
        steps, total = steps + 1, total + decay_ratio(*sums)
        return total / steps, (steps, total)

    return _adam_with(ratio, {"steps": 0, "total": 0.0}, rate, weight_decay)


def away(
    _setting: Setting, rate: optax.Schedule, weight_decay: float
) -> optax.GradientTransformation:
    def ratio(alignment: jax.Array, growth: jax.Array, square: jax.Array) -> Ratio:
        return decay_ratio(jnp.ones_like(alignment), growth, square), ()

    return _adam_with(ratio, {}, rate, weight_decay)


def uniform(seed: jax.Array) -> jax.Array:
    """A number in [0, 1) that depends on every bit of a float32, as by chance."""
    bits = jax.lax.bitcast_convert_type(seed.astype(jnp.float32), jnp.uint32)
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        bits = (bits ^ (bits >> 15)) * jnp.uint32(factor)
    return (bits ^ (bits >> 16)).astype(jnp.float32) * 2.0**-32


def _adam_with(
    ratio: Callable[..., Ratio],
    memory: dict[str, Any],
    rate: optax.Schedule,
    weight_decay: float,
) -> optax.GradientTransformation:
    """Adam and SPD with another ratio, of SPD's sums and a memory. `spd_fired` counts as SPD's."""

    def decide(*arguments: jax.Array, weight_decay: jax.Array) -> optax_spd.Decision:
        *sums_and_memory, fired = arguments
        pull, remembered = ratio(*sums_and_memory)
        return optax_spd.Decision(
            record={"spd_ratio": pull},
            coefficients=(weight_decay * pull,),
            changes=pull > 0,
            memory={**dict(zip(memory, remembered, strict=True)), "spd_fired": fired + (pull > 0)},
        )

    stage = optax_spd.layerwise(
        "spd variant",
        measure=measure,
        decide=decide,
        act=act,
        sums=3,
        memory={**memory, "spd_fired": 0},
        hyperparameters={"weight_decay": weight_decay},
    )
    return optax_spd.chain(optax.adam(rate), stage)
