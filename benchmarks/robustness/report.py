"""Tables and figures from the recorded runs. Intervals are unadjusted 95 % t intervals over seeds."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markdown import Markdown
from scipy import stats

from benchmarks.robustness import plan
from benchmarks.robustness.methods import METHODS
from benchmarks.robustness.plan import Choice, Results
from benchmarks.robustness.runs import Key, Result, Store

REGIMES = {False: "at each method's own learning rate", True: "at three times Adam's learning rate"}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and the half-width of its interval."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Estimate:
        """The estimate from one value a seed; one seed alone has no interval."""
        numbers = np.array(list(values), float)
        n = len(numbers)
        if n < 2:
            return cls(float(numbers.mean()), math.nan)
        half = stats.t.ppf(0.975, n - 1) * numbers.std(ddof=1) / math.sqrt(n)
        return cls(float(numbers.mean()), float(half))

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out 0."""
        return abs(self.mean) > self.half

    def text(self, digits: int = 1, sign: bool = False) -> str:
        """The mean and the half-width; a difference in bold if it is shown."""
        number = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        if not math.isnan(self.half):
            number += f" ± {self.half:.{digits}f}"
        return f"**{number}**" if sign and self.shown else number


def in_distribution(result: Result) -> float:
    """Accuracy in distribution, in per cent: the first test set."""
    return 100 * next(iter(result.accuracy.values()))


def shifted(result: Result) -> float:
    """Mean accuracy over the shifted test sets, in per cent."""
    return 100 * float(np.mean(list(result.accuracy.values())[1:]))
