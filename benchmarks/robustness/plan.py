"""Which runs are made: tuning, the final seeds in two regimes, and four studies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.robustness.methods import METHODS
from benchmarks.robustness.runs import Key, Result

TUNING_SEEDS = (102, 103)  # reported nowhere; others were used while this was written
FIRST_SEED = 10  # of the reported ones; the demo has 0, 1, 2
FINER = (0.5, 0.7, 1.5)  # times the best rate: the last trials of a method without a strength
AGGRESSIVE = 3.0  # times Adam's best learning rate

Results = Mapping[Key, Result]


@dataclass(frozen=True)
class Choice:
    """A method's learning rate and strength."""

    rate: float
    strength: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What is run in a setting.

    Attributes:
      seeds: the number of final seeds, which are 10, 11, ...
      rates: the common learning rates to choose from.
      strengths: those of the methods that have one, if they were chosen before.
      like: the setting whose choices are taken over, instead of `rates` and `strengths`.
      methods: what is run, in the order of the tables.
      aggressive: the methods that are also run with the aggressive learning rate.
      grid_seeds: how many seeds the study of strengths has here.
      sign_seeds: how many seeds the study of the sign test has here.
      rate_seeds: how many seeds the study of Adam's learning rate has here.
    """

    seeds: int
    rates: Sequence[float] = ()
    strengths: Mapping[str, float] | None = None
    like: str | None = None
    methods: Sequence[str] = ()
    aggressive: Sequence[str] = ()
    grid_seeds: int = 0
    sign_seeds: int = 0
    rate_seeds: int = 0


EVERY = tuple(name for name in METHODS if not name.startswith("spd-"))
GRID = ("adamw", "l2-sp", "spd", "ftp")  # the study of strengths
GRID_RATES = (1 / 3, 1.0, 3.0)  # times Adam's best
GRID_STRENGTHS = (0.1, 10 ** (-1 / 3), 10 ** (1 / 3), 10.0)  # times the method's choice
SIGN = ("spd", "spd-coin", "spd-mean", "spd-away")
# The study of the sign test: whether the rate is the aggressive one, and the strength (None: the
# choice). With a strength of 1 or more, what pulls in every step away never leaves the anchor.
SIGN_RUNS = ((False, None), (True, None), (True, 0.5))
SIX = ("probe", "adam", "l2-sp", "spd", "ftp", "wise-ft")  # of the methods, where a run is long
FEW = ("adam", "l2-sp", "spd", "ftp")  # with few training examples

DIGITS = (1e-3, 3e-3, 1e-2, 3e-2)  # learning rates
IMAGES = (3e-4, 1e-3, 3e-3, 1e-2)
TEXTS = (3e-5, 1e-4, 3e-4)
# Chosen on the tuning seeds, by in-distribution validation, in examples/demo/selection.py.
MINILM = {
    "adamw": 1.0,
    "l2-sp": 300.0,
    "cautious": 1000.0,
    "spd": 2.0,
    "tpgm": 3e-2,
    "ftp": 3e-3,
    "layer-decay": 0.85,
    "temp-balance": 0.25,
    "adamp": 1.0,
    "sparse": 2.0,
}
FIVE = ("adam", "adamw", "l2-sp", "spd", "ftp")
PLANS = {
    "digits": Plan(
        10,
        DIGITS,
        methods=EVERY,
        aggressive=EVERY,
        grid_seeds=3,
        sign_seeds=10,
        rate_seeds=10,
    ),
    "sentiment": Plan(
        5,
        TEXTS,
        MINILM,
        methods=EVERY,
        aggressive=EVERY,
        grid_seeds=2,
        sign_seeds=3,
        rate_seeds=5,
    ),
    "spam": Plan(5, like="sentiment", methods=EVERY, aggressive=FIVE),
    **{f"sentiment-{n}": Plan(3, like="sentiment", methods=FEW) for n in (64, 256, 1024)},
    "images": Plan(3, IMAGES, methods=SIX, aggressive=SIX),
}


class UndecidedError(Exception):
    """Tuning runs are missing."""


def choice(setting: str, method: str, results: Results) -> Choice:
    """The learning rate and strength of a method.

    Raises:
      UndecidedError: the tuning is not complete.
    """
    setting = PLANS[setting].like or setting
    first, then = _stages(setting, method, results)
    return _best(setting, method, [*first, *then], results)


def tuning(setting: str, methods: Sequence[str], results: Results) -> Iterator[Key]:
    """The tuning runs. `results` grows while they are made: the second stage follows the first."""
    plan = PLANS[setting]
    for method in () if plan.like else plan.methods:
        if METHODS[method].make is not None and method in methods:
            yield from _keys(setting, method, _first_stage(setting, method, results))
            yield from _keys(setting, method, _stages(setting, method, results)[1])


def trials(setting: str, methods: Sequence[str]) -> int:
    """The number of tuning runs."""
    plan, count = PLANS[setting], 0
    for name in () if plan.like else plan.methods:
        if METHODS[name].make is not None and name in methods:
            count += len(plan.rates)
            if plan.strengths is None:
                strengths = METHODS[name].strengths
                count += len(FINER) if METHODS[name].strength is None else len(strengths) - 1
    return count * len(TUNING_SEEDS)


def _times(rate: float, factor: float) -> float:
    """The product without its last bits, so that 3 x 1e-4 is 3e-4 and no run is made twice."""
    return float(f"{factor * rate:.12g}")


def _first_stage(setting: str, method: str, results: Results) -> list[Choice]:
    made, plan = METHODS[method], PLANS[setting]
    if plan.strengths is not None:
        return [Choice(rate * made.rate, plan.strengths.get(method, 0.0)) for rate in plan.rates]
    if made.strength is None:
        return [Choice(rate * made.rate) for rate in plan.rates]
    adam = _best(setting, "adam", _first_stage(setting, "adam", results), results)
    return [Choice(adam.rate, strength) for strength in made.strengths]


def _stages(setting: str, method: str, results: Results) -> tuple[list[Choice], list[Choice]]:
    first, plan = _first_stage(setting, method, results), PLANS[setting]
    if plan.strengths is not None:
        return first, []
    best = _best(setting, method, first, results)
    if METHODS[method].strength is None:
        return first, [Choice(_times(best.rate, factor)) for factor in FINER]
    return first, [Choice(rate, best.strength) for rate in plan.rates if rate != best.rate]


def _keys(setting: str, method: str, choices: Sequence[Choice]) -> Iterator[Key]:
    for made in choices:
        for seed in TUNING_SEEDS:
            yield Key(setting, method, seed, made.rate, made.strength)


def _best(setting: str, method: str, choices: Sequence[Choice], results: Results) -> Choice:
    """The best mean validation accuracy on the tuning seeds; of equal ones, the lowest loss."""

    def quality(made: Choice) -> tuple[float, float]:
        try:
            runs = [results[key] for key in _keys(setting, method, [made])]
        except KeyError:
            raise UndecidedError(f"{setting}: {method} is not tuned") from None
        if any(run.diverged for run in runs):
            return 0.0, -math.inf
        # Rounded, so that it does not depend on the order of the sum.
        accuracy = round(sum(run.validation for run in runs) / len(runs), 9)
        return accuracy, -sum(run.validation_loss or 0.0 for run in runs)

    return max(choices, key=quality)


def aggressive(setting: str, method: str, results: Results) -> Choice:
    """The choice with 3 x Adam's best learning rate; for SGD 3 x its own."""
    made = choice(setting, method, results)
    leader = method if METHODS[method].rate != 1 else "adam"
    return Choice(_times(choice(setting, leader, results).rate, AGGRESSIVE), made.strength)


def key_of(setting: str, method: str, seed: int, fast: bool, results: Results) -> Key:
    """The final run of a method in one of the two regimes."""
    if method == "probe":
        return Key(setting, method, seed)
    base = "adam" if METHODS[method].after else "spd" if method in SIGN else method
    made = aggressive(setting, base, results) if fast else choice(setting, base, results)
    return Key(setting, method, seed, made.rate, made.strength)


def seeds(count: int) -> range:
    """So many of the reported seeds."""
    return range(FIRST_SEED, FIRST_SEED + count)


def finals(setting: str, methods: Sequence[str], most: int, results: Results) -> Iterator[Key]:
    """The final runs, seed by seed."""
    plan = PLANS[setting]
    for seed in seeds(min(most, plan.seeds)):
        for fast, some in ((False, plan.methods), (True, plan.aggressive)):
            for method in some:
                if method in methods and not (fast and method == "probe"):
                    yield key_of(setting, method, seed, fast, results)


def grid(setting: str, method: str, results: Results) -> list[Choice]:
    """Study (i): the grid around a method's strength and Adam's learning rate."""
    rate, made = choice(setting, "adam", results).rate, choice(setting, method, results)
    return [Choice(_times(rate, r), s * made.strength) for r in GRID_RATES for s in GRID_STRENGTHS]


def strengths(setting: str, methods: Sequence[str], results: Results) -> Iterator[Key]:
    """The runs of study (i)."""
    for seed in seeds(PLANS[setting].grid_seeds):
        for method in (name for name in GRID if name in methods):
            for made in grid(setting, method, results):
                yield Key(setting, method, seed, made.rate, made.strength)


def sign_test(setting: str, results: Results) -> Iterator[Key]:
    """The runs of study (ii): SPD and its variants in both regimes."""
    for seed in seeds(PLANS[setting].sign_seeds):
        for fast, strength in SIGN_RUNS:
            for method in SIGN:
                yield sign_key(setting, method, seed, fast, strength, results)


def sign_key(
    setting: str, method: str, seed: int, fast: bool, strength: float | None, results: Results
) -> Key:
    """A run of study (ii)."""
    key = key_of(setting, method, seed, fast, results)
    return key if strength is None else replace(key, strength=strength)


def adams_rates(setting: str, results: Results) -> list[float]:
    """Study (iv): the common learning rates, and those of Adam's final runs."""
    finals = (choice(setting, "adam", results), aggressive(setting, "adam", results))
    return sorted({*PLANS[setting].rates, *(made.rate for made in finals)})


def slower(setting: str, results: Results) -> float:
    """The next common learning rate below Adam's best; 0 if there is none."""
    best = choice(setting, "adam", results).rate
    return max((rate for rate in PLANS[setting].rates if rate < best), default=0.0)


def rates(setting: str, results: Results) -> Iterator[Key]:
    """The runs of study (iv): Adam at each of its learning rates."""
    for seed in seeds(PLANS[setting].rate_seeds):
        for rate in adams_rates(setting, results):
            yield Key(setting, "adam", seed, rate)


def keys(
    part: str, setting: str, methods: Sequence[str], most: int, results: Results
) -> Iterator[Key]:
    """The runs of a part of the plan; of the final ones, those of at most so many seeds."""
    made = {
        "tune": lambda: tuning(setting, methods, results),
        "final": lambda: finals(setting, methods, most, results),
        "strengths": lambda: strengths(setting, methods, results),
        "sign": lambda: sign_test(setting, results),
        "rates": lambda: rates(setting, results),
    }[part]()
    return (key for key in made if key.method in methods)
