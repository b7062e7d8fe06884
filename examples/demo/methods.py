"""The methods the demo compares: one entry of `METHODS` each.

An entry either trains - it makes an optimizer from the learning-rate schedule that all share - or
averages the result of another entry with the start (WiSE-FT), or leaves the start as it is.

The three decay strengths have the best accuracy on in-distribution validation data, on seeds the
demo does not report; no test set and no other domain had a say. `selection.py` repeats the choice,
../README.md has its numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import optax

import optax_spd

Recipe = Callable[[optax.Schedule], optax.GradientTransformation]

ADAMW_WEIGHT_DECAY = 1.0  # multiplied by the learning rate
L2_SP_WEIGHT_DECAY = 300.0  # multiplied by the learning rate
SPD_WEIGHT_DECAY = 2.0  # not multiplied by the learning rate

# WiSE-FT's share of the fine-tuned weights; validation accuracy decides, the smallest wins a tie.
WISE_FT_ALPHAS = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class Method:
    """How the demo shows a method, and how it comes by its parameters."""

    label: str
    colour: str
    marker: str
    optimizer: Recipe | None = None
    average_of: str | None = None


# The anchor of every method is the whole start, the probe's head included.
METHODS = {
    "probe": Method("linear probe", "#7f7f7f", "s"),
    "adam": Method("Adam", "#d62728", "v", lambda lr: optax.adam(lr)),
    "adamw": Method(
        "AdamW", "#ff9d4d", "^", lambda lr: optax.adamw(lr, weight_decay=ADAMW_WEIGHT_DECAY)
    ),
    "l2-sp": Method(
        "L2-SP",
        "#2ca02c",
        "D",
        lambda lr: optax_spd.adamw_l2_sp(lr, weight_decay=L2_SP_WEIGHT_DECAY),
    ),
    "spd": Method(
        "SPD", "#1f77b4", "o", lambda lr: optax_spd.adam_spd(lr, weight_decay=SPD_WEIGHT_DECAY)
    ),
    "wise-ft": Method("WiSE-FT", "#9467bd", "P", average_of="adam"),
}
