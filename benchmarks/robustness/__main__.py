"""Runs the benchmark of docs/evidence.md, or what is missing of it.

python -m benchmarks.robustness --quick
python -m benchmarks.robustness --setting digits --budget-hours 1
python -m benchmarks.robustness --report
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import ChainMap
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.robustness import (
    digits,
    figures,
    images,
    pages,
    plan,
    report,
    runs,
    sentiment,
    spam,
)
from benchmarks.robustness.methods import METHODS
from benchmarks.robustness.runs import Key, Result, Store
from benchmarks.robustness.setting import Draw, Setting
from examples.demo.assets import cache_directory
from examples.demo.errors import DemoError

RESULTS = Path(__file__).parent.parent / "results" / "robustness"
LOAD: dict[str, Callable[..., Setting]] = {
    "digits": digits.load,
    "sentiment": sentiment.load,
    "spam": spam.load,
    "images": images.load,
    **{f"sentiment-{n}": partial(sentiment.load, examples=n) for n in (64, 256, 1024)},
}
PARTS = ("tune", "final", "strengths", "sign", "rates")
# What --quick runs: minutes instead of hours.
QUICK = {
    "setting": ["digits", "sentiment"],
    "methods": ["probe", "adam", "l2-sp", "spd"],
    "parts": ["final"],
    "seeds": 1,
    "budget_hours": 0.14,
    "out": Path("evidence_results"),
}


def names(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def convert(text: str) -> list[str]:
        asked = [word.strip() for word in text.split(",")]
        if unknown := sorted(set(asked) - set(allowed)):
            raise argparse.ArgumentTypeError(
                f"unknown name {unknown[0]!r}; choose from {', '.join(allowed)}"
            )
        return [name for name in allowed if name in asked]

    return convert


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.robustness",
        description="Fine-tunes pretrained models with all methods and tests them on shifted data. "
        "Runs that are recorded are not made again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = made.add_argument
    for name, allowed, what in (
        ("setting", plan.PLANS, "settings to run"),
        ("methods", METHODS, "methods to run"),
        ("parts", PARTS, "tuning, final runs, or studies: strengths, sign test, Adam's rates"),
    ):
        add(f"--{name}", type=names(tuple(allowed)), default=",".join(allowed), help=what)
    add("--seeds", type=int, default=10, help="at most so many final seeds")
    add("--budget-hours", type=float, default=10.0, help="no run begins that would end later")
    add("--out", type=Path, default=RESULTS, help="folder of the recorded runs")
    add("--quick", action="store_true", help=f"other defaults: a few runs, into {QUICK['out']}")
    add("--report", action="store_true", help="run nothing; draw the recorded runs, also in docs")
    return made


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; `--quick` has other defaults."""
    made = parser()
    options = made.parse_args(arguments)
    if options.quick:
        made.set_defaults(**QUICK)
        options = made.parse_args(arguments)
    return options


def jobs(keys: Iterable[Key], done: Container[Key]) -> dict[Key, list[str]]:
    """The runs to make. What starts from Adam's result goes with Adam's run."""
    made: dict[Key, list[str]] = {}
    for key in keys:
        if key not in done:
            after = METHODS[key.method].after is not None
            together = made.setdefault(replace(key, method="adam") if after else key, [])
            if after:
                together.append(key.method)
    return made


def recorded(*folders: Path) -> dict[Key, Result]:
    """The results in some folders; of two with one key, the first."""
    paths = [path for folder in dict.fromkeys(folders) for path in sorted(folder.glob("*.jsonl"))]
    return {key: run for path in reversed(paths) for key, run in Store(path).results.items()}


class OutOfTimeError(Exception):
    """The next run would end after the deadline."""


class Runner:
    """Makes the runs that are missing."""

    def __init__(self, options: argparse.Namespace, progress: Progress) -> None:
        """The hours are counted from now."""
        self.options, self.progress = options, progress
        self.deadline = time.monotonic() + 3600 * options.budget_hours
        self.longest = 0.0

    def setting(self, setting: Setting) -> None:
        """All parts of a setting."""
        options = self.options
        store = Store(options.out / f"{setting.name}.jsonl")
        # Choices may come from another setting's runs, and --quick takes the recorded ones.
        known = ChainMap(store.results, recorded(options.out, RESULTS))
        draw = lru_cache(maxsize=2)(setting.draw)  # tuning alternates between two seeds
        for part in options.parts:
            # What the other task keeps is reported of final runs; none of the grid's is one.
            used = replace(setting, retained=None) if part == "strengths" else setting
            keys = plan.keys(part, setting.name, options.methods, options.seeds, known)
            total = plan.trials(setting.name, options.methods) if part == "tune" else None
            task = self.progress.add_task(f"{setting.name}, {part}", total=total)
            # Tuning decides on the way which runs follow, so it is asked for one at a time.
            pending: Iterable[dict[Key, list[str]]]
            if part == "tune":
                pending = (jobs([key], store.results) for key in keys)
            else:
                missing = jobs(keys, store.results)
                self.progress.update(task, total=len(missing))
                pending = [missing]
            for some in pending:
                if not some:  # recorded before
                    self.progress.advance(task)
                for key, after in some.items():
                    made = draw(key.seed)
                    if part == "tune":
                        made = replace(made, tests={})  # only validation decides
                    self.run(used, made, store, key, after)
                    self.progress.advance(task)
            self.progress.remove_task(task)

    def run(
        self, setting: Setting, draw: Draw, store: Store, key: Key, after: Sequence[str]
    ) -> None:
        """One run, and what is made of its result."""
        began = time.monotonic()
        if began + self.longest > self.deadline:
            raise OutOfTimeError
        for result in runs.execute(setting, draw, key, after):
            if result.key not in store.results:
                store.add(result)
                self.progress.console.print(line(result), highlight=False)
        self.longest = max(self.longest, time.monotonic() - began)


def line(result: Result) -> str:
    """A result in one line."""
    key = result.key
    label = f"{key.setting} {key.method} {key.rate:g} {key.strength:g}, seed {key.seed}"
    if result.diverged:
        return f"{label}: diverged"
    shares = {"validation": result.validation, **result.accuracy}
    scores = ", ".join(f"{name} {100 * share:.1f}" for name, share in shares.items())
    return f"{label}: {scores}"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    console = Console(width=max(Console().width, 110))
    if options.report:
        results = recorded(options.out)
        report.write(options.out, results, console)
        figures.write(options.out, results)
        if options.out == RESULTS:
            for page in pages.PAGES:
                page.write_text(pages.drawn(page.read_text(), results))
        return 0
    missing = False
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    try:
        cache = cache_directory()
        jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
        # A run takes a minute or two: the speed is that of the last hour.
        with Progress(*columns, console=console, speed_estimate_period=3600) as progress:
            runner = Runner(options, progress)
            for name in options.setting:
                try:
                    setting = LOAD[name](cache, console.print)
                except DemoError as error:
                    console.print(f"left out {name}: {error}", highlight=False)
                    missing = True
                    continue
                try:
                    runner.setting(setting)
                except plan.UndecidedError as error:
                    console.print(f"left out the rest of {name}: {error}; run --parts tune first")
                    missing = True
    except OutOfTimeError:
        console.print("out of time; run it again for the rest")
    except DemoError as error:
        console.print(str(error))
        return 1
    if options.quick:
        report.compare(options.out, RESULTS, console)
    return int(missing)


if __name__ == "__main__":
    sys.exit(main())
