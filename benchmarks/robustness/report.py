"""Tables from the recorded runs. Intervals are unadjusted 95 % t intervals over seeds."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markdown import Markdown
from scipy import stats  # type: ignore[import-untyped]

from benchmarks.robustness import plan
from benchmarks.robustness.methods import METHODS
from benchmarks.robustness.plan import Choice, Results
from benchmarks.robustness.runs import Key, Result, Store

Measure = Callable[[Result], float]
LEADERS = ("l2-sp", "spd", "ftp")  # what is compared with Adam where there is room for few
REGIMES = {False: "at each method's own learning rate", True: "at 3 x Adam's best learning rate"}


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
        number = f"{round(self.mean, digits) + 0.0:{'+' if sign else ''}.{digits}f}"  # no -0.0
        if not math.isnan(self.half):
            number += f" ± {self.half:.{digits}f}"
        return f"**{number}**" if sign and self.shown else number


def in_distribution(result: Result) -> float:
    """Accuracy on the first test set, in per cent."""
    return 100 * next(iter(result.accuracy.values()))


def accuracy_on(test: str) -> Measure:
    """Accuracy on one test set, in per cent."""
    return lambda result: 100 * result.accuracy[test]


def auc_on(test: str) -> Measure:
    """Area under the ROC curve of one test set."""
    return lambda result: result.auc[test]


def shifted(result: Result) -> float:
    """Mean accuracy over the shifted test sets, in per cent."""
    return 100 * float(np.mean(list(result.accuracy.values())[1:]))


def relative_distance(result: Result) -> float:
    """The encoder's distance from its anchor, relative to the anchor's norm."""
    return result.relative_distance or 0.0


def auc_shifted(result: Result) -> float:
    """Mean area under the ROC curve over the shifted test sets that have one."""
    return float(np.mean([area for name, area in list(result.auc.items())[1:]]))


def kept(found: Mapping[str, Row]) -> Measure | None:
    """Accuracy on the other task relative to the pretrained encoder's, in per cent.

    The linear probe leaves the encoder as it is, so its runs tell what that has. None without them.
    """
    pretrained = found["probe"].runs[0].retained if "probe" in found else None
    if pretrained is None:
        return None
    return lambda run: 100 * (run.retained or math.nan) / pretrained


@dataclass(frozen=True)
class Row:
    """The runs of a method with one choice, seed by seed."""

    method: str
    runs: Sequence[Result]
    choice: Choice

    @property
    def diverged(self) -> int:
        """On how many seeds training diverged."""
        return sum(run.diverged for run in self.runs)

    def of(self, measure: Measure) -> Estimate:
        """The mean of a quantity over the seeds."""
        return Estimate.of(map(measure, self.runs))

    def against(self, other: Row, measure: Measure) -> Estimate:
        """The mean difference on the same seeds."""
        theirs = {run.key.seed: measure(run) for run in other.runs}
        return Estimate.of(
            measure(run) - theirs[run.key.seed] for run in self.runs if run.key.seed in theirs
        )

    @property
    def fired(self) -> str:
        """The share of SPD's decisions that pulled a layer back; empty for other methods."""
        shares = [run.fired for run in self.runs if run.fired is not None]
        return f"{100 * float(np.mean(shares)):.0f} %" if shares else ""


def gain(
    row: Row,
    found: Mapping[str, Row],
    other: str,
    measure: Measure = shifted,
    digits: int = 1,
) -> str:
    """The difference to another method, on shifted data; empty if that has no result."""
    if row.diverged:
        return "diverged"
    if other not in found or row.method == other or found[other].diverged:
        return ""
    return row.against(found[other], measure).text(digits, sign=True)


def leaders_gains(found: Mapping[str, Row]) -> list[str]:
    """The differences of `LEADERS` to Adam on shifted data; empty for those without runs."""
    return [gain(found[name], found, "adam") if name in found else "" for name in LEADERS]


def row_of(method: str, keys: Iterable[Key], results: Results) -> Row | None:
    """The row of some runs; None if none is recorded, or the method is not tuned."""
    try:
        found = [results[key] for key in keys if key in results]
    except plan.UndecidedError:
        return None
    return Row(method, found, Choice(found[0].key.rate, found[0].key.strength)) if found else None


def rows(setting: str, fast: bool, results: Results, most: int | None = None) -> dict[str, Row]:
    """The methods whose final runs are recorded, on at most so many seeds.

    The probe stands in both regimes.
    """
    made: dict[str, Row] = {}
    settings = plan.PLANS[setting]
    for method in settings.methods:
        if fast and method != "probe" and method not in settings.aggressive:
            continue
        seeds = plan.seeds(settings.seeds)[:most]
        keys = (plan.key_of(setting, method, seed, fast, results) for seed in seeds)
        if row := row_of(method, keys, results):
            made[method] = row
    return made


def tested(found: Mapping[str, Row]) -> Result | None:
    """A run that did not diverge: it has all test sets."""
    runs = (run for row in found.values() for run in row.runs)
    return next((run for run in runs if not run.diverged), None)


def accuracies(found: Mapping[str, Row]) -> dict[str, Measure]:
    """Accuracy on each test set, and its mean over the shifted ones."""
    run = tested(found)
    sets = {name: accuracy_on(name) for name in run.accuracy} if run else {}
    return sets | {"shifted": shifted}


def areas(found: Mapping[str, Row]) -> dict[str, Measure]:
    """AUC on each test set that has one, and its mean over the shifted ones."""
    run = tested(found)
    sets = {f"AUC {name}": auc_on(name) for name in run.auc} if run else {}
    return sets | {"AUC shifted": auc_shifted}


def accuracy_table(found: Mapping[str, Row]) -> list[list[str]]:
    """One row a method: its choice, and accuracies in per cent."""
    named = accuracies(found)
    table = [["method", "rate", "strength", *named]]
    for name, row in found.items():
        cells = [METHODS[name].title, f"{row.choice.rate:g}" if row.choice.rate else ""]
        cells.append(f"{row.choice.strength:g}" if METHODS[name].strength else "")
        if row.diverged:
            cells.append(f"diverged on {row.diverged} of {len(row.runs)} seeds")
        else:
            cells += [row.of(measure).text() for measure in named.values()]
        table.append(cells)
    return table


def other_table(found: Mapping[str, Row]) -> list[list[str]]:
    """One row a method: AUC, distance, the time of a step, and what is kept of another task."""
    named, keeps = areas(found), kept(found)
    head = ["method", *named, "distance", "pulled back", "ms a step", *(["kept"] if keeps else [])]
    table = [head]
    for name, row in found.items():
        if row.diverged:
            continue
        times = [run.step_seconds for run in row.runs if run.step_seconds is not None]
        table.append(
            [
                METHODS[name].title,
                *(row.of(measure).text(3) for measure in named.values()),
                row.of(relative_distance).text(3),
                row.fired,
                f"{1000 * float(np.median(times)):.0f}" if times else "",
                *([row.of(keeps).text()] if keeps else []),
            ]
        )
    return table


def differences_table(found: Mapping[str, Row], other: str) -> list[list[str]]:
    """One row a method: what it has beyond another one, on the same seeds."""
    keeps = kept(found)
    named = {name: (measure, 1) for name, measure in accuracies(found).items()}
    named |= {name: (measure, 3) for name, measure in areas(found).items()}
    named |= {"kept": (keeps, 1)} if keeps else {}
    table = [["method", *named]]
    for name, row in found.items():
        if name != other and not row.diverged:
            cells = [gain(row, found, other, measure, places) for measure, places in named.values()]
            table.append([METHODS[name].title, *cells])
    return table


def grid_table(setting: str, method: str, results: Results) -> dict[Choice, tuple[float, float]]:
    """Study (i): mean accuracy in distribution and shifted, over the seeds, for each cell.

    Where a seed diverged both are NaN.
    """
    cells: dict[Choice, tuple[float, float]] = {}
    try:
        grid = plan.grid(setting, method, results)
    except plan.UndecidedError:
        return cells
    for made in grid:
        keys = [
            Key(setting, method, seed, made.rate, made.strength)
            for seed in plan.seeds(plan.PLANS[setting].grid_seeds)
        ]
        if keys and all(key in results for key in keys):
            found = [results[key] for key in keys]
            cells[made] = (math.nan, math.nan)
            if not any(run.diverged for run in found):
                cells[made] = (
                    float(np.mean([in_distribution(run) for run in found])),
                    float(np.mean([shifted(run) for run in found])),
                )
    return cells


def near_best(values: Sequence[float], within: float = 1.0) -> float:
    """The share of a grid that is within so many points of its best. NaN counts as not near."""
    return float(np.mean(np.array(values) >= np.nanmax(values) - within))


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A Markdown table; short rows are filled."""
    width = len(table[0])
    lines = [[*row, *[""] * (width - len(row))] for row in table]
    lines.insert(1, ["---"] * width)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def sign_table(setting: str, results: Results) -> list[list[str]]:
    """Study (ii): SPD and the variants without its sign test."""
    numbers = ["in distribution", "shifted", "SPD is better by", "distance", "fired"]
    table = [["method", "learning rate", "strength", *numbers]]
    for fast, strength in plan.SIGN_RUNS:
        found = {}
        for method in plan.SIGN:
            seeds = plan.seeds(plan.PLANS[setting].sign_seeds)
            keys = (plan.sign_key(setting, method, n, fast, strength, results) for n in seeds)
            if row := row_of(method, keys, results):
                found[method] = row
        # SPD by itself is in the final runs and says nothing here.
        for method, row in found.items() if len(found) > 1 else ():
            cells = [METHODS[method].title, f"{row.choice.rate:g}", f"{row.choice.strength:g}"]
            if row.diverged:
                cells.append(f"diverged on {row.diverged} of {len(row.runs)} seeds")
            else:
                cells += [row.of(in_distribution).text(), row.of(shifted).text()]
                ready = method != "spd" and "spd" in found and not found["spd"].diverged
                better = found["spd"].against(row, shifted).text(sign=True) if ready else ""
                cells += [better, row.of(relative_distance).text(3), row.fired]
            table.append(cells)
    return table


def forgiving_table(setting: str, results: Results) -> list[list[str]]:
    """Study (i): how much of the grid is near the method's best."""
    own = ["best in distribution", "near it"]
    table = [["method", "seeds", *own, "best shifted", "near it", "mean", "worst", "diverged"]]
    for method in plan.GRID:
        cells = list(grid_table(setting, method, results).values())
        if len(cells) < len(plan.GRID_RATES) * len(plan.GRID_STRENGTHS):
            continue
        inside, others = (list(each) for each in zip(*cells, strict=True))
        table.append(
            [
                METHODS[method].title,
                str(plan.PLANS[setting].grid_seeds),
                f"{np.nanmax(inside):.1f}",
                f"{100 * near_best(inside):.0f} %",
                f"{np.nanmax(others):.1f}",
                f"{100 * near_best(others):.0f} %",
                f"{np.nanmean(others):.1f}",
                f"{np.nanmin(others):.1f}",
                f"{np.isnan(inside).sum()} of {len(inside)}",
            ]
        )
    return table


def adam_at(setting: str, rate: float, results: Results) -> Row | None:
    """The row of Adam at a learning rate of study (iv)."""
    seeds = plan.seeds(plan.PLANS[setting].rate_seeds)
    return row_of("adam", (Key(setting, "adam", seed, rate) for seed in seeds), results)


def slower_adam(setting: str, results: Results) -> Row | None:
    """The row of Adam one rate below its best; None if it is not tuned."""
    try:
        return adam_at(setting, plan.slower(setting, results), results)
    except plan.UndecidedError:
        return None


def rates_table(setting: str, results: Results) -> list[list[str]]:
    """Study (iv): Adam at each of its learning rates, and what the tuned methods have beyond it."""
    beyond = [f"tuned {METHODS[name].title} against it" for name in LEADERS]
    table = [["Adam's learning rate", "seeds", "in distribution", "shifted", *beyond]]
    try:
        rates = plan.adams_rates(setting, results)
        best = plan.choice(setting, "adam", results).rate
    except plan.UndecidedError:
        return table
    tuned = rows(setting, False, results)
    for rate in rates:
        row = adam_at(setting, rate, results)
        if row is None or row.diverged:
            continue
        mark = " (tuned)" if rate == best else ""
        cells = [f"{rate:g}{mark}", str(len(row.runs))]
        cells += [row.of(measure).text() for measure in (in_distribution, shifted)]
        table.append([*cells, *leaders_gains({**tuned, "adam": row})])
    return table


def write(out: Path, results: Results, console: Console) -> None:
    """Writes the tables and a CSV file of every setting."""
    for setting in settings(results):
        recorded = [run for key, run in results.items() if key.setting == setting]
        count = f"No final run is among the {len(recorded)} recorded ones.\n"
        text = tables(setting, results) or count
        (out / f"{setting}.md").write_text(text)
        write_csv(out / f"{setting}.csv", recorded)
        console.print(setting, style="bold")
        console.print(Markdown(text))


def tables(setting: str, results: Results) -> str:
    """All tables of a setting, as Markdown."""
    parts = []
    for fast, regime in REGIMES.items():
        if found := rows(setting, fast, results):
            parts += [f"Accuracy, {regime}:\n", markdown(accuracy_table(found))]
            parts += [f"The same runs, {regime}:\n", markdown(other_table(found))]
            for other in ("adam", "l2-sp"):
                if other in found and not found[other].diverged:
                    title = f"Difference to {METHODS[other].title}, {regime}:\n"
                    parts += [title, markdown(differences_table(found, other))]
    if plan.PLANS[setting].grid_seeds and len(table := forgiving_table(setting, results)) > 1:
        parts += ["Strength times learning rate:\n", markdown(table)]
    if plan.PLANS[setting].sign_seeds and len(table := sign_table(setting, results)) > 1:
        parts += ["Without the sign test:\n", markdown(table)]
    if plan.PLANS[setting].rate_seeds and len(table := rates_table(setting, results)) > 1:
        parts += ["Adam at other learning rates:\n", markdown(table)]
    return "\n".join(parts)


def settings(results: Results) -> list[str]:
    """The settings that have runs, in the plan's order."""
    found = {key.setting for key in results}
    return [name for name in plan.PLANS if name in found]


def write_csv(path: Path, results: Iterable[Result]) -> None:
    """One row a run; test sets have a column each."""
    flat = []
    for run in results:
        row = {
            **vars(run.key),
            **{k: v for k, v in vars(run).items() if not isinstance(v, Mapping)},
        }
        del row["key"]
        row |= {f"accuracy {name}": share for name, share in run.accuracy.items()}
        row |= {f"auc {name}": area for name, area in run.auc.items()}
        row |= run.made  # machine, versions and commit
        flat.append(row)
    columns = list(dict.fromkeys(name for row in flat for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(flat)


def compare(out: Path, recorded: Path, console: Console) -> None:
    """Prints the runs in `out` beside the recorded ones."""
    table = [["run", "in distribution", "recorded", "shifted", "recorded"]]
    for path in sorted(out.glob("*.jsonl")):
        known = Store(recorded / path.name).results
        for key, run in Store(path).results.items():
            if run.diverged:
                continue
            cells = [f"{key.setting}, {METHODS[key.method].title} {key.rate:g}, seed {key.seed}"]
            for measure in (in_distribution, shifted):
                cells.append(f"{measure(run):.1f}")
                there = key in known and not known[key].diverged
                cells.append(f"{measure(known[key]):.1f}" if there else "")
            table.append(cells)
    console.print(Markdown(markdown(table)))
    console.print(
        "Other machines and numbers of threads give other results; digits by some points."
    )
