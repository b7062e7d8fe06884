"""The methods that the demo compares: one entry of `METHODS` each.

Most entries train: they make an optimizer from the common learning-rate schedule, times a factor.
Others pull another entry's result back towards the start (WiSE-FT by averaging, TPGM after training
by projecting). The linear probe is the start itself.

All constants below, except those marked as fixed, were chosen by the best accuracy on
in-distribution validation data, on seeds that the demo does not report. No test set and no other
domain was used. `selection.py` repeats the choice; ../README.md has its numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import optax

import optax_spd
from examples.demo.minilm import BLOCKS

Recipe = Callable[[optax.Schedule], optax.GradientTransformation]

ADAMW_WEIGHT_DECAY = 1.0  # multiplied by the learning rate
L2_SP_WEIGHT_DECAY = 300.0  # multiplied by the learning rate
SPD_WEIGHT_DECAY = 2.0  # not multiplied by the learning rate

# WiSE-FT's share of the fine-tuned weights, and LiNeS's in the lowest block, chosen by validation
# accuracy; the smallest wins a tie.
WISE_FT_ALPHAS = (0.2, 0.4, 0.6, 0.8)
LINES_ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8)
LINES_MASK = optax_spd.path_mask("^encoder/")  # the head keeps its fine-tuned value

SPARSE_FRACTION = 0.05  # of each matrix's entries train, those with the largest first gradient
ADAMP_WEIGHT_DECAY = 1.0  # multiplied by the learning rate
CAUTIOUS_WEIGHT_DECAY = 1000.0  # multiplied by the learning rate


# The radii are in units of the norm, the largest absolute row sum (MARS).
TPGM_RATE = 3e-2  # of the radii's Adam, in the chain
TPGM_EVERY = 8  # the radii learn on every 8th step, from one batch
TPGM_AFTER_RATE = 1e-1  # of the radii's Adam, after training
TPGM_AFTER_BATCHES = 32  # one step each
FTP_RATE = 3e-3  # of the radii's Adam: the most that a radius grows in a step
FTP_K = 1.0  # factor on gradients that shrink a radius

LAYER_DECAY = 0.85  # from one block to the one below, behind AdamW
TEMP_BALANCE_LOW, TEMP_BALANCE_HIGH = 0.75, 1.25  # scales of the best and the least trained layer
TEMP_BALANCE_EVERY = 32  # fixed: the spectra are computed on every 32nd step, four times in 128
# The layers of all blocks. The authors balance Linear layers, which the word table is not; the head
# has a single eigenvalue.
BALANCED = optax_spd.path_mask("^encoder/block_")
# SGD's steps are as small as its gradients, so its peak rate is the common one times this factor.
SGD_RATE = 10.0
SGD_FREEZE_RATE = 10.0
MOMENTUM = 0.9  # fixed

# A table's rows are its tokens, as in PyTorch. By default rows lie on the last axis, which is right
# for Flax's kernels but not for its tables.
LAYERS = optax_spd.outputs("embedding$", axes=0)


def tpgm(lr: optax.Schedule, rate: float = TPGM_RATE) -> optax.GradientTransformation:
    return optax_spd.adam_tpgm(
        lr, radius_optimizer=optax.adam(rate), every=TPGM_EVERY, layers=LAYERS
    )


def ftp(
    lr: optax.Schedule, rate: float = FTP_RATE, k: float = FTP_K
) -> optax.GradientTransformation:
    return optax_spd.adam_ftp(lr, k=k, radius_learning_rate=rate, layers=LAYERS)


def sparse(lr: optax.Schedule, fraction: float = SPARSE_FRACTION) -> optax.GradientTransformation:
    spd = optax_spd.adam_spd(lr, weight_decay=SPD_WEIGHT_DECAY)
    return optax_spd.with_sparse(spd, fraction)


def adamp(lr: optax.Schedule, decay: float = ADAMP_WEIGHT_DECAY) -> optax.GradientTransformation:
    return optax_spd.adamp(lr, weight_decay=decay, layers=LAYERS)


def cautious(
    lr: optax.Schedule, decay: float = CAUTIOUS_WEIGHT_DECAY
) -> optax.GradientTransformation:
    return optax_spd.adamw_l2_sp(lr, weight_decay=decay, cautious=True)


def layer_decay(lr: optax.Schedule, decay: float = LAYER_DECAY) -> optax.GradientTransformation:
    return optax.chain(
        optax.adamw(lr, weight_decay=ADAMW_WEIGHT_DECAY),
        optax_spd.layerwise_lr_decay(decay, depth),
    )


def depth(path: str) -> int:
    """A layer's depth: -1 for the tables and their normalisation, the largest for the head.

    A pattern for the blocks alone would give that normalisation the head's full rate.
    """
    if block := re.search(r"/block_(\d+)/", path):
        return int(block[1])
    return BLOCKS if path.startswith("head/") else -1


def temp_balance(
    lr: optax.Schedule,
    unit: Literal["layer", "block"] = "layer",
    assign: Literal["linear", "sigmoid"] = "linear",
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
    """The module whose scale a module takes: for a normalisation the layer before it."""
    return module.replace("_norm", "_out")


def sgd(lr: optax.Schedule) -> optax.GradientTransformation:
    return optax.sgd(lr, MOMENTUM)


def sgd_freeze(lr: optax.Schedule) -> optax.GradientTransformation:
    return optax_spd.sgd_freeze_embed(lr, MOMENTUM)


@dataclass(frozen=True)
class Method:
    """How the demo shows a method, and how it gets the method's parameters."""

    label: str
    colour: str
    marker: str
    optimizer: Recipe | None = None
    chosen: Mapping[str, float] = field(default_factory=dict)  # settings to show
    rate: float = 1.0  # its peak learning rate, relative to the one on the command line
    new_head: bool = False  # starts from a head of zeros instead of the probe's
    validates_every: int | None = None  # number of steps for which it uses one validation batch
    average_of: str | None = None
    by_depth: bool = False  # the average's share of the fine-tuned weights grows with depth (LiNeS)
    radii_of: str | None = None

    @property
    def base(self) -> str | None:
        """The method whose result this one starts from."""
        return self.average_of or self.radii_of


# The anchor of every method that has one is the whole start, the probe's head included.
METHODS = {
    "probe": Method("linear probe", "#7f7f7f", "s"),
    "ft": Method("Adam new head", "#56b4e9", "<", optax.adam, new_head=True),
    "adam": Method("Adam", "#d55e00", "v", optax.adam),
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
        "#0072b2",
        "o",
        lambda lr: optax_spd.adam_spd(lr, weight_decay=SPD_WEIGHT_DECAY),
        chosen={"weight decay": SPD_WEIGHT_DECAY},
    ),
    "cautious": Method(
        "cautious L2-SP",
        "#7fbc41",
        "8",
        cautious,
        chosen={"weight decay": CAUTIOUS_WEIGHT_DECAY},
    ),
    "adamp": Method("AdamP", "#c51b7d", "4", adamp, chosen={"weight decay": ADAMP_WEIGHT_DECAY}),
    "sparse": Method(
        "sparse SPD",
        "#6baed6",
        ".",
        sparse,
        chosen={"fraction": SPARSE_FRACTION, "weight decay": SPD_WEIGHT_DECAY},
    ),
    "tpgm": Method(
        "TPGM",
        "#cc79a7",
        "X",
        tpgm,
        chosen={"radius rate": TPGM_RATE, "every": TPGM_EVERY},
        validates_every=TPGM_EVERY,
    ),
    "ftp": Method("FTP", "#009e73", "p", ftp, chosen={"radius rate": FTP_RATE, "k": FTP_K}),
    "temp-balance": Method(
        "TempBalance",
        "#8c510a",
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
    "lines": Method("LiNeS", "#54278f", "x", average_of="adam", by_depth=True),
    "tpgm-after": Method(
        "TPGM after",
        "#e69f00",
        "*",
        chosen={"radius rate": TPGM_AFTER_RATE, "batches": TPGM_AFTER_BATCHES},
        radii_of="adam",
    ),
}
# One method of each family; all methods would take more than six minutes on two cores.
DEFAULT = ("probe", "adam", "spd", "ftp", "temp-balance", "sgd-freeze", "tpgm-after")
# The default with several numbers of examples. Adam starts from the probe, so it is LP-FT.
LOW_DATA = ("ft", "adam", "spd", "temp-balance")
