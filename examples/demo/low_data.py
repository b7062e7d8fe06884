"""The low-data mode: every method with several numbers of training examples.

Zhou et al. (NeurIPS 2023) and Liu et al. (EMNLP 2024) find that balancing layers helps most when
data is scarce. Here all methods run with each number of examples. The statement compares them with
LP-FT: Adam from the linear probe (Kumar et al., ICLR 2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from examples.demo import data, output
from examples.demo.experiment import Outcome, Settings
from examples.demo.methods import METHODS
from examples.demo.output import Report
from examples.demo.pictures import low_data_picture
from examples.demo.report import chosen
from examples.demo.scores import Gain, Results, Score, gain

BASELINE = "adam"
# The probe and the new head are for comparison; the statement does not mention them.
REFERENCES = ("probe", "ft", BASELINE)
COLUMN = 14  # width of the table's column for one number of examples

Curve = Mapping[int, Results]  # number of examples -> results


def label(name: str) -> str:
    """A method's label; Adam is called LP-FT here, since another Adam starts from a new head."""
    return f"LP-FT ({METHODS[name].label})" if name == BASELINE else METHODS[name].label


def report(settings: Settings, outcomes: Sequence[Outcome]) -> Report:
    """The report of a run; `outcomes` are in the order of `settings.examples`."""
    curve = {
        examples: outcome.results
        for examples, outcome in zip(settings.examples, outcomes, strict=True)
    }
    labels = {name: label(name) for name in settings.methods}
    return Report(
        table(settings, curve),
        legend(settings),
        statement(settings, curve),
        [],
        {"low_data.png": low_data_picture(curve, labels)},
        {
            "gains": gains_record(curve),
            "diverged": {
                examples: outcome.diverged
                for examples, outcome in zip(settings.examples, outcomes, strict=True)
            },
            "results": {examples: output.numbers(results) for examples, results in curve.items()},
        },
    )


def table(settings: Settings, curve: Curve) -> Table:
    """One row per method, one column per number of examples: ID / OOD, deviations below."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    shown.add_column("ID / OOD", no_wrap=True)
    for examples in curve:
        shown.add_column(f"{examples}", justify="right", no_wrap=True)
    for name in settings.methods:
        cells = [_cell(results.get(name)) for results in curve.values()]
        shown.add_row(label(name), *cells)
    return shown


def _cell(scores: Sequence[Score] | None) -> str:
    if not scores:
        return "-"
    inside = [100 * score.accuracy[data.IN_DISTRIBUTION] for score in scores]
    shifted = [100 * score.shifted_accuracy for score in scores]
    means = f"{np.mean(inside):.1f} / {np.mean(shifted):.1f}"
    if len(scores) == 1:
        return means
    return f"{means}\n±{np.std(inside, ddof=1):.1f}   ±{np.std(shifted, ddof=1):.1f}"


def legend(settings: Settings) -> list[str]:
    """Explains the table."""
    seeds = "1 seed" if settings.seeds == 1 else f"{settings.seeds} seeds (mean, ± std below)"
    epochs = ", ".join(f"{_epochs(settings, examples):.3g}" for examples in settings.examples)
    return [
        "Accuracy in % in distribution (movie) / mean of the other domains, by the number of movie "
        f"snippets trained on; {settings.steps} steps of {data.BATCH} with each number ({epochs} "
        f"epochs), learning rate {settings.learning_rate:g}, {seeds}; up to {settings.evaluation} "
        "snippets in each test set.",
        "All but “Adam new head” start from the linear probe of as many examples, so that Adam is "
        "LP-FT. Validation, by which the probe's regularisation is chosen, has no more snippets "
        f"than training. {chosen(settings.methods)} They were chosen with 512 examples.",
    ]


def _epochs(settings: Settings, examples: int) -> float:
    return settings.steps / (examples // data.BATCH)


def statement(settings: Settings, curve: Curve) -> str:
    """What the run shows about the methods compared with LP-FT, without extrapolation."""
    few, many = min(curve), max(curve)
    compared = [
        name
        for name in settings.methods
        if name not in REFERENCES
        and all({name, BASELINE} <= curve[examples].keys() for examples in (few, many))
    ]
    if not compared:
        return f"No comparison: it needs {BASELINE} and one more method with {few} and {many}."

    at_few = {name: gains(curve, few, name) for name in compared}
    at_many = {name: gains(curve, many, name) for name in compared}
    change = {
        name: (at_few[name][0] - at_many[name][0], at_few[name][1] - at_many[name][1])
        for name in compared
    }

    caution = ""
    if settings.seeds == 1:
        caution = " One training set says nothing about others: --seeds 3 draws three."
    return (
        f"Points of accuracy gained on {label(BASELINE)}. "
        f"With {few} examples: {_verdicts(at_few, 'better', 'worse')}. "
        f"With {many}: {_verdicts(at_many, 'better', 'worse')}. "
        f"The gain with {few} less the gain with {many}: {_verdicts(change, 'larger', 'smaller')}. "
        "After ±: the standard error from the choice of test snippets, not of training snippets; "
        "noise is what lies within twice that, or changes its sign from seed to seed. Even where "
        f"nothing differs, one in twenty of these {6 * len(compared)} would lie beyond.{caution}"
    )


def gains(curve: Curve, examples: int, name: str) -> tuple[Gain, Gain]:
    """A method's gain over LP-FT in distribution and out of distribution."""
    ours, theirs = (curve[examples][each] for each in (name, BASELINE))
    return (
        gain(ours, theirs, [data.IN_DISTRIBUTION]),
        gain(ours, theirs, data.OUT_OF_DISTRIBUTION),
    )


def _verdicts(found: Mapping[str, tuple[Gain, Gain]], up: str, down: str) -> str:
    """The gains of all methods, in and out of distribution, each marked as noise or not."""

    def one(each: Gain) -> str:
        verdict = "noise" if each.is_noise else up if each.mean > 0 else down
        return f"{each.mean:+.1f} ± {each.error:.1f} ({verdict})"

    return "; ".join(
        f"{label(name)} ID {one(inside)}, OOD {one(shifted)}"
        for name, (inside, shifted) in found.items()
    )


def gains_record(curve: Curve) -> dict[int, dict[str, Any]]:
    """The gains over LP-FT for every number of examples, for results.json."""
    return {
        examples: {
            name: {
                domain: {"seeds": list(found.seeds), "error": found.error, "noise": found.is_noise}
                for domain, found in zip(("ID", "OOD"), gains(curve, examples, name), strict=True)
            }
            for name in results
            if name != BASELINE and BASELINE in results
        }
        for examples, results in curve.items()
    }
