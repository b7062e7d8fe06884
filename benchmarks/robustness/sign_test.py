"""Is it the sign test that makes SPD work? Three variants that replace it, for comparison.

A step leads away from the anchor if a = (‖Δ̃‖ - ‖Δ‖) / ‖Δ̃‖ > 0. In such steps SPD pulls a layer
back by the ratio r = a if ⟨g, Δ⟩ > 0 (:func:`optax_spd.spd`). The variants, in the same steps:

- `coin`: r = a as often as the sign test was positive in such steps so far, but by chance;
- `always`: r = f a in each of them, f the share Σr / Σa that SPD would have pulled so far;
- `away`: r = a in each of them.

Frequency and share are a layer's own, on the way that the variant takes, the present step included.
So each variant pulls about as much as SPD would, except `away`, which pulls more.
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
        away = growth > 0
        steps, positive = steps + away, positive + (away & (alignment > 0))
        toss = uniform(square) < positive / jnp.maximum(steps, 1)
        pull = decay_ratio(jnp.where(toss, 1.0, 0.0), growth, square)
        return pull, (steps, positive)

    return _adam_with(ratio, {"steps": 0, "positive": 0}, rate, weight_decay)


def always(
    _setting: Setting, rate: optax.Schedule, weight_decay: float
) -> optax.GradientTransformation:
    def ratio(
        alignment: jax.Array,
        growth: jax.Array,
        square: jax.Array,
        pulled: jax.Array,
        grown: jax.Array,
    ) -> Ratio:
        most = decay_ratio(jnp.ones_like(alignment), growth, square)
        pulled = pulled + decay_ratio(alignment, growth, square)
        grown = grown + most
        share = pulled / jnp.where(grown > 0, grown, 1.0)
        return share * most, (pulled, grown)

    return _adam_with(ratio, {"pulled": 0.0, "grown": 0.0}, rate, weight_decay)


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
