"""The methods of the benchmark: how each makes its optimizer, and the strengths that are tried.

A method has one strength to tune, the argument that says how strongly it holds the weights back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import optax

import optax_spd
from benchmarks.robustness import sign_test
from benchmarks.robustness.setting import Batch, Draw, Params, Setting
from examples.demo.training import apply_gradient

Recipe = Callable[[Setting, optax.Schedule, float], optax.GradientTransformation]
After = Callable[[Setting, Draw, Params, "Validate"], Params]
Validate = Callable[[Params], float]  # accuracy on the validation set

# The radii learn on every 8th step, from one validation batch; the others get none. (With `every=8`
# XLA would compute their gradient inside a condition, where convolutions are slow on a CPU.)
TPGM_EVERY = 8
MOMENTUM = 0.9
WEIGHT_DECAY = 1.0  # of AdamW with layer decay
SPARSE_FRACTION = 0.05  # of each matrix's entries train
TPGM_AFTER_BATCHES = 32
TPGM_AFTER_RATE = 0.1
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8)  # of the fine-tuned weights; validation chooses


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    Attributes:
      title: its name in tables.
      make: (setting, learning rate, strength) -> optimizer; None for the start itself and for what
        is done after training.
      strength: what the strength is; None if there is none.
      strengths: the values to try.
      rate: its learning rates are the common ones times this.
      validates: whether it learns on validation batches while it trains.
      after: (setting, draw, Adam's result, validation accuracy) -> weights.
    """

    title: str
    make: Recipe | None = None
    strength: str | None = None
    strengths: Sequence[float] = (0.0,)
    rate: float = 1.0
    validates: bool = False
    after: After | None = None


def adam(_setting: Setting, rate: optax.Schedule, _: float) -> optax.GradientTransformation:
    return optax.adam(rate)


def adamw(_setting: Setting, rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    return optax.adamw(rate, weight_decay=decay)


def l2_sp(_setting: Setting, rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    return optax_spd.adamw_l2_sp(rate, weight_decay=decay)


def cautious(_setting: Setting, rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    return optax_spd.adamw_l2_sp(rate, weight_decay=decay, cautious=True)


def spd(_setting: Setting, rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    return optax_spd.adam_spd(rate, weight_decay=decay)


def tpgm(setting: Setting, rate: optax.Schedule, pace: float) -> optax.GradientTransformation:
    return optax_spd.adam_tpgm(rate, radius_optimizer=optax.adam(pace), layers=setting.layers)


def ftp(setting: Setting, rate: optax.Schedule, pace: float) -> optax.GradientTransformation:
    return optax_spd.adam_ftp(rate, radius_learning_rate=pace, layers=setting.layers)


def layer_decay(
    setting: Setting, rate: optax.Schedule, decay: float
) -> optax.GradientTransformation:
    return optax.chain(
        optax.adamw(rate, weight_decay=WEIGHT_DECAY),
        optax_spd.layerwise_lr_decay(decay, setting.depth),
    )


def temp_balance(
    setting: Setting, rate: optax.Schedule, spread: float
) -> optax.GradientTransformation:
    balance = optax_spd.temp_balance(
        every=max(1, setting.steps // 4),
        min_scale=1 - spread,
        max_scale=1 + spread,
        follows=setting.follows,
        mask=setting.balanced,
    )
    return optax.chain(optax.adam(rate), balance)


def sgd(_setting: Setting, rate: optax.Schedule, _: float) -> optax.GradientTransformation:
    return optax.sgd(rate, MOMENTUM)


def sgd_freeze(setting: Setting, rate: optax.Schedule, _: float) -> optax.GradientTransformation:
    if setting.embedding is None:
        return optax_spd.sgd_freeze_embed(rate, MOMENTUM)
    return optax_spd.sgd_freeze_embed(rate, MOMENTUM, embedding=setting.embedding)


def adamp(setting: Setting, rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    return optax_spd.adamp(rate, weight_decay=decay, layers=setting.layers)


def sparse(_setting: Setting, rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    return optax_spd.with_sparse(optax_spd.adam_spd(rate, weight_decay=decay), SPARSE_FRACTION)


def wise_ft(_setting: Setting, draw: Draw, fitted: Params, validate: Validate) -> Params:
    return max((optax_spd.wise_ft(fitted, draw.start, share) for share in SHARES[1:]), key=validate)


def lines(setting: Setting, draw: Draw, fitted: Params, validate: Validate) -> Params:
    def block(path: str) -> int | None:
        depth = setting.depth(path)
        return depth if depth >= 0 else None

    def mixed(share: float) -> Params:
        encoder, start = fitted["encoder"], draw.start["encoder"]
        alphas = optax_spd.lines_alpha({"encoder": encoder}, share, block)
        mix = optax_spd.wise_ft({"encoder": encoder}, {"encoder": start}, alphas)
        return {**mix, "head": fitted["head"]}

    return max(map(mixed, SHARES), key=validate)


def tpgm_after(setting: Setting, draw: Draw, fitted: Params, _validate: Validate) -> Params:
    """As `optax_spd.fit_radii`, but in a loop, since in its scan convolutions are slow on a CPU."""
    tx = _radii(setting)
    state = tx.init(draw.start)  # the anchor
    still, made = optax.tree.zeros_like(fitted), fitted
    for batch in one_by_one(draw.held_out(TPGM_AFTER_BATCHES)):
        # Every step starts at the fitted weights; what it learns are the radii in the state.
        params = jax.tree.map(jnp.array, fitted)
        made, state = apply_gradient(tx, params, state, still, batch, setting.loss)
    return made


@cache
def _radii(setting: Setting) -> optax.GradientTransformation:
    """One object a setting, so that compiled code is used again."""
    return optax_spd.tpgm(optax.adam(TPGM_AFTER_RATE), layers=setting.layers)


def one_by_one(batches: Batch) -> Iterator[Batch]:
    """The batches of a stack, each with a leading axis of 1."""
    for number in range(len(batches[-1])):
        yield tuple(array[number : number + 1] for array in batches)


# Every method has seven trials (`plan.py`): its four strengths at Adam's best learning rate, then
# the best of them at three others.
METHODS = {
    "probe": Method("linear probe"),
    "adam": Method("Adam", adam),
    "adamw": Method("AdamW", adamw, "weight decay", (0.1, 0.3, 1.0, 3.0)),
    "l2-sp": Method("L2-SP", l2_sp, "weight decay", (1.0, 3.0, 10.0, 30.0)),
    "cautious": Method("cautious L2-SP", cautious, "weight decay", (3.0, 10.0, 30.0, 100.0)),
    "spd": Method("SPD", spd, "weight decay", (0.25, 0.5, 1.0, 2.0)),
    "tpgm": Method("TPGM", tpgm, "radius rate", (0.03, 0.1, 0.3, 1.0), validates=True),
    "ftp": Method("FTP", ftp, "radius rate", (0.03, 0.1, 0.3, 1.0)),
    "layer-decay": Method("AdamW, layer decay", layer_decay, "decay", (0.65, 0.75, 0.85, 0.95)),
    "temp-balance": Method("TempBalance", temp_balance, "spread", (0.25, 0.4, 0.5, 0.75)),
    "adamp": Method("AdamP", adamp, "weight decay", (0.01, 0.1, 1.0, 10.0)),
    "sparse": Method("sparse SPD", sparse, "weight decay", (0.25, 0.5, 1.0, 2.0)),
    "sgd": Method("SGD", sgd, rate=10.0),
    "sgd-freeze": Method("SGD freeze", sgd_freeze, rate=10.0),
    "spd-coin": Method("SPD, a coin", sign_test.coin, "weight decay"),
    "spd-mean": Method("SPD, always", sign_test.always, "weight decay"),
    "spd-away": Method("SPD, moving away", sign_test.away, "weight decay"),
    "wise-ft": Method("WiSE-FT", after=wise_ft),
    "lines": Method("LiNeS", after=lines),
    "tpgm-after": Method("TPGM after", after=tpgm_after),
}
