"""Fine-tunes a pretrained transformer with several methods and compares what is left of it.

python -m examples.demo --out demo_results
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.demo import assets, data, report
from examples.demo.errors import DemoError
from examples.demo.experiment import Settings, Workbench, run
from examples.demo.methods import DEFAULT, METHODS

LARGEST_TRAINING_SET = 5000


class Parser(argparse.ArgumentParser):
    """Reports a wrong option in one line, where argparse would print the whole usage first."""

    def error(self, message: str) -> NoReturn:
        """Ends the program."""
        self.exit(2, f"{self.prog}: {message}\n")


def between(low: int, high: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"expected a whole number from {low} to {high}, got {text!r}"
            )
        return value

    return convert


def learning_rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def method_names(text: str) -> list[str]:
    """Names in table order; a method that works on another's result brings it along."""
    asked = {name.strip() for name in text.split(",")}
    if unknown := sorted(asked - METHODS.keys()):
        raise argparse.ArgumentTypeError(
            f"unknown method {unknown[0]!r}; choose from {', '.join(METHODS)}"
        )
    asked |= {base for name in asked if (base := METHODS[name].base)}
    return [name for name in METHODS if name in asked]


def parser() -> Parser:
    made = Parser(
        prog="python -m examples.demo",
        description="Fine-tunes all-MiniLM-L6-v2 on movie snippets with several methods and tests "
        "it on movie snippets and on three other domains.",
        epilog="Downloads and compiled programs are kept in the user's cache directory; set "
        f"{assets.CACHE_VARIABLE} to keep them elsewhere.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = made.add_argument
    add("--out", type=Path, default=Path("demo_results"), help="where the results are written")
    add(
        "--methods",
        type=method_names,
        default=",".join(DEFAULT),
        help=f"comma-separated, of {', '.join(METHODS)}; wise-ft and tpgm-after bring adam along",
    )
    add("--seeds", type=between(1, 100), default=1, help="number of training sets drawn")
    add(
        "--examples",
        type=between(data.BATCH, LARGEST_TRAINING_SET),
        default=512,
        help="movie snippets to train on",
    )
    add("--steps", type=between(1, 100_000), default=128, help=f"steps of {data.BATCH} snippets")
    add("--lr", type=learning_rate, default=3e-4, help="peak learning rate of all methods")
    add(
        "--evaluation",
        type=between(50, data.HELD_OUT),
        default=400,
        help="snippets scored in each test set",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    settings = Settings(
        methods=options.methods,
        seeds=options.seeds,
        examples=options.examples,
        steps=options.steps,
        learning_rate=options.lr,
        evaluation=options.evaluation,
    )
    # No narrower than the table, whatever the terminal: Rich would cut the numbers short.
    console = Console(width=max(Console().width, 80 if settings.seeds == 1 else 90))
    try:
        began = time.perf_counter()
        report.check_directory(options.out)
        with console.status("preparing"):
            bench = Workbench.load(assets.cache_directory(), console.print)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
            outcome = run(settings, bench, progress)
        seconds = time.perf_counter() - began
        for reason in outcome.diverged.values():
            print(f"{parser().prog}: left out {reason}", file=sys.stderr)
        if not outcome.results:
            return 1
        written = report.write(options.out, settings, outcome, seconds)
    except DemoError as error:
        print(f"{parser().prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser().prog}: interrupted, nothing was written", file=sys.stderr)
        return 130
    results = outcome.results
    console.print()
    console.print(report.table(results))
    for line in report.legend(settings, results):
        console.print(line, highlight=False)
    console.print()
    console.print(report.statement(settings, results), style="bold", highlight=False)
    if order := report.radius_order(results):
        console.print(order, highlight=False)
    console.print(f"{seconds:.0f} s in all; wrote {', '.join(map(str, written))}", highlight=False)
    return 1 if outcome.diverged else 0


if __name__ == "__main__":
    sys.exit(main())
