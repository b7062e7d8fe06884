"""The methods the demo compares: one entry of `METHODS` each.

An entry either trains - it makes an optimizer from the learning-rate schedule that all share - or
draws the result of another entry back towards the start (WiSE-FT by averaging, TPGM after training
by projecting), or leaves the start as it is.

The decay strengths and the settings of the radii have the best accuracy on in-distribution
validation data, on seeds the demo does not report; no test set and no other domain had a say.
`selection.py` repeats the choice, ../README.md has its numbers.
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


# The radii are in units of the norm, the largest absolute row sum (MARS).
TPGM_RATE = 3e-2  # of the radii's Adam, in the chain
TPGM_EVERY = 8  # the radii learn on every 8th step, from one batch
TPGM_AFTER_RATE = 1e-1  # of the radii's Adam, after training
TPGM_AFTER_BATCHES = 32  # one step each
FTP_RATE = 3e-3  # of the radii's Adam: a radius grows by no more a step
FTP_K = 1.0  # what gradients that shrink a radius are multiplied by

# One row a token, as in PyTorch. Flax keeps that layout, but by default the last axis counts rows,
# which is right for kernels only.
LAYERS = optax_spd.outputs("embedding$", axes=0)


def tpgm(lr: optax.Schedule, rate: float = TPGM_RATE) -> optax.GradientTransformation:
    return optax_spd.adam_tpgm(
        lr, radius_optimizer=optax.adam(rate), every=TPGM_EVERY, layers=LAYERS
    )


def ftp(
    lr: optax.Schedule, rate: float = FTP_RATE, k: float = FTP_K
) -> optax.GradientTransformation:
    return optax_spd.adam_ftp(lr, k=k, radius_learning_rate=rate, layers=LAYERS)


@dataclass(frozen=True)
class Method:
    """How the demo shows a method, and how it comes by its parameters."""

    label: str
    colour: str
    marker: str
    optimizer: Recipe | None = None
    validates_every: int | None = None  # its optimizer takes a validation batch each so many steps
    average_of: str | None = None
    radii_of: str | None = None

    @property
    def base(self) -> str | None:
        """The method whose result this one works on."""
        return self.average_of or self.radii_of


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
    "tpgm": Method("TPGM", "#8c564b", "X", lambda lr: tpgm(lr), validates_every=TPGM_EVERY),
    "ftp": Method("FTP", "#17becf", "p", lambda lr: ftp(lr)),
    "wise-ft": Method("WiSE-FT", "#9467bd", "P", average_of="adam"),
    "tpgm-after": Method("TPGM after", "#e377c2", "*", radii_of="adam"),
}
# Left out of the default run to keep it within six minutes on two cores; --methods brings them in.
DEFAULT = [name for name in METHODS if name not in ("adamw", "l2-sp", "wise-ft")]
