"""The methods the demo compares: one entry of `METHODS` each.

An entry either trains - it makes an optimizer from the learning-rate schedule that all share, up to
a factor - or draws the result of another entry back towards the start (WiSE-FT by averaging, TPGM
after training by projecting), or leaves the start as it is.

All constants below that are not said to be fixed have the best accuracy on in-distribution
validation data, on seeds the demo does not report; no test set and no other domain had a say.
`selection.py` repeats the choice, ../README.md has its numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import optax

import optax_spd
from examples.demo.minilm import BLOCKS

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

LAYER_DECAY = 0.85  # from one block to the one below, behind AdamW
TEMP_BALANCE_LOW, TEMP_BALANCE_HIGH = 0.75, 1.25  # the scales of the most and the least trained
TEMP_BALANCE_EVERY = 32  # fixed: the spectra are computed on every 32nd step, four times in 128
# Every block's layers; the word table is none of the Linear layers that the authors balance, and
# the head has one eigenvalue.
BALANCED = optax_spd.path_mask("^encoder/block_")
# An SGD step is as small as its gradient, so its peak rate is so many times the common one.
SGD_RATE = 10.0
SGD_FREEZE_RATE = 10.0
MOMENTUM = 0.9  # fixed

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


def layer_decay(lr: optax.Schedule, decay: float = LAYER_DECAY) -> optax.GradientTransformation:
    return optax.chain(
        optax.adamw(lr, weight_decay=ADAMW_WEIGHT_DECAY),
        optax_spd.layerwise_lr_decay(decay, depth),
    )


def depth(path: str) -> int:
    """A layer's place between the tables with their normalisation, at -1, and the head, on top.

    A pattern for the blocks alone would give that normalisation the head's full rate.
    """
    if block := re.search(r"/block_(\d+)/", path):
        return int(block[1])
    return BLOCKS if path.startswith("head/") else -1


def temp_balance(
    lr: optax.Schedule,
    unit: str = "layer",
    assign: str = "linear",
    low: float = TEMP_BALANCE_LOW,
    high: float = TEMP_BALANCE_HIGH,
) -> optax.GradientTransformation:
    balance = optax_spd.temp_balance(
        every=TEMP_BALANCE_EVERY,
        unit=unit,
        assign=assign,
        min_scale=low,
        max_scale=high,
        follows=followed if unit == "layer" else None,
        mask=BALANCED,
    )
    return optax.chain(optax.adam(lr), balance)


def followed(module: str) -> str:
    """The module whose scale another one takes: a normalisation that of the layer before it."""
    return module.replace("_norm", "_out")


def sgd(lr: optax.Schedule) -> optax.GradientTransformation:
    return optax.sgd(lr, MOMENTUM)


def sgd_freeze(lr: optax.Schedule) -> optax.GradientTransformation:
    return optax_spd.sgd_freeze_embed(lr, MOMENTUM)


@dataclass(frozen=True)
class Method:
    """How the demo shows a method, and how it comes by its parameters."""

    label: str
    colour: str
    marker: str
    optimizer: Recipe | None = None
    chosen: Mapping[str, float] = field(default_factory=dict)  # for the reader
    rate: float = 1.0  # its peak learning rate, relative to the one on the command line
    new_head: bool = False  # starts from a head of zeros instead of the probe's
    validates_every: int | None = None  # its optimizer takes a validation batch each so many steps
    average_of: str | None = None
    radii_of: str | None = None

    @property
    def base(self) -> str | None:
        """The method whose result this one works on."""
        return self.average_of or self.radii_of


# The anchor of every method that has one is the whole start, the probe's head included.
METHODS = {
    "probe": Method("linear probe", "#7f7f7f", "s"),
    "ft": Method("Adam new head", "#e69f00", "<", optax.adam, new_head=True),
    "adam": Method("Adam", "#d62728", "v", optax.adam),
    "adamw": Method(
        "AdamW",
        "#ff9d4d",
        "^",
        lambda lr: optax.adamw(lr, weight_decay=ADAMW_WEIGHT_DECAY),
        chosen={"weight decay": ADAMW_WEIGHT_DECAY},
    ),
    "layer-decay": Method(
        "layer decay",
        "#bcbd22",
        ">",
        layer_decay,
        chosen={"weight decay": ADAMW_WEIGHT_DECAY, "from block to block": LAYER_DECAY},
    ),
    "l2-sp": Method(
        "L2-SP",
        "#2ca02c",
        "D",
        lambda lr: optax_spd.adamw_l2_sp(lr, weight_decay=L2_SP_WEIGHT_DECAY),
        chosen={"weight decay": L2_SP_WEIGHT_DECAY},
    ),
    "spd": Method(
        "SPD",
        "#1f77b4",
        "o",
        lambda lr: optax_spd.adam_spd(lr, weight_decay=SPD_WEIGHT_DECAY),
        chosen={"weight decay": SPD_WEIGHT_DECAY},
    ),
    "tpgm": Method(
        "TPGM",
        "#8c564b",
        "X",
        tpgm,
        chosen={"radius rate": TPGM_RATE, "every": TPGM_EVERY},
        validates_every=TPGM_EVERY,
    ),
    "ftp": Method("FTP", "#17becf", "p", ftp, chosen={"radius rate": FTP_RATE, "k": FTP_K}),
    "temp-balance": Method(
        "TempBalance",
        "#000000",
        "h",
        temp_balance,
        chosen={
            "scale from": TEMP_BALANCE_LOW,
            "to": TEMP_BALANCE_HIGH,
            "every": TEMP_BALANCE_EVERY,
        },
    ),
    "sgd": Method(
        "SGD", "#98df8a", "d", sgd, chosen={"learning rate times": SGD_RATE}, rate=SGD_RATE
    ),
    "sgd-freeze": Method(
        "SGD freeze",
        "#006d2c",
        "H",
        sgd_freeze,
        chosen={"learning rate times": SGD_FREEZE_RATE},
        rate=SGD_FREEZE_RATE,
    ),
    "wise-ft": Method("WiSE-FT", "#9467bd", "P", average_of="adam"),
    "tpgm-after": Method(
        "TPGM after",
        "#e377c2",
        "*",
        chosen={"radius rate": TPGM_AFTER_RATE, "batches": TPGM_AFTER_BATCHES},
        radii_of="adam",
    ),
}
# One of each family: all of them would take more than six minutes on two cores.
DEFAULT = ("probe", "adam", "spd", "ftp", "temp-balance", "sgd-freeze", "tpgm-after")
# With several numbers of examples. Adam starts from the probe, so it is LP-FT.
LOW_DATA = ("ft", "adam", "spd", "temp-balance")
