"""Fine-tunes a pretrained transformer with several methods and compares the results.

python -m examples.demo --out demo_results
python -m examples.demo --examples 64/128/256/512 --seeds 3
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

from examples.demo import assets, data, low_data, output, report
from examples.demo.errors import DemoError
from examples.demo.experiment import Settings, Workbench, run
from examples.demo.methods import DEFAULT, LOW_DATA, METHODS

LARGEST_TRAINING_SET = 5000


class Parser(argparse.ArgumentParser):
    """Reports a wrong option in one line; argparse would print the whole usage first."""

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


def training_sizes(text: str) -> list[int]:
    """Parses numbers of examples ("512" or "64/128/256/512"); sorted."""
    convert = between(data.BATCH, LARGEST_TRAINING_SET)
    return sorted({convert(part) for part in text.replace(",", "/").split("/")})


def learning_rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def method_names(text: str) -> list[str]:
    """Parses method names, in table order; adds the methods whose results others need."""
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
        default=argparse.SUPPRESS,
        help=f"comma-separated, of {', '.join(METHODS)}; wise-ft, lines and tpgm-after bring "
        "adam along "
        f"(default: {','.join(DEFAULT)}; with several numbers of examples: {','.join(LOW_DATA)})",
    )
    add("--seeds", type=between(1, 100), default=1, help="number of training sets drawn")
    add(
        "--examples",
        type=training_sizes,
        default="512",
        help="movie snippets to train on; several numbers (64/128/256/512) run the methods with "
        "each of them and plot accuracy against it",
    )
    add("--steps", type=between(1, 100_000), default=128, help=f"steps of {data.BATCH} snippets")
    add(
        "--lr",
        type=learning_rate,
        default=3e-4,
        help="peak learning rate; SGD's are a multiple of it",
    )
    add(
        "--evaluation",
        type=between(50, data.HELD_OUT),
        default=400,
        help="snippets scored in each test set",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    several = len(options.examples) > 1
    settings = Settings(
        methods=getattr(options, "methods", LOW_DATA if several else DEFAULT),
        seeds=options.seeds,
        examples=options.examples,
        steps=options.steps,
        learning_rate=options.lr,
        evaluation=options.evaluation,
    )
    # At least as wide as the table even in a narrow terminal: Rich would truncate the numbers.
    narrowest = 80 if settings.seeds == 1 else 90
    if several:
        narrowest = 20 + low_data.COLUMN * len(settings.examples)
    console = Console(width=max(Console().width, narrowest))
    try:
        began = time.perf_counter()
        output.check_directory(options.out)
        with console.status("preparing"):
            bench = Workbench.load(assets.cache_directory(), console.print)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
            outcomes = run(settings, bench, progress)
        seconds = time.perf_counter() - began
        reasons = [reason for outcome in outcomes for reason in outcome.diverged.values()]
        for reason in reasons:
            print(f"{parser().prog}: left out {reason}", file=sys.stderr)
        if not any(outcome.results for outcome in outcomes):
            return 1
        if several:
            made = low_data.report(settings, outcomes)
        else:
            made = report.report(settings, *outcomes)
        written = output.write(options.out, settings, made, seconds)
    except DemoError as error:
        print(f"{parser().prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser().prog}: interrupted, nothing was written", file=sys.stderr)
        return 130
    console.print()
    console.print(made.table)
    for line in made.legend:
        console.print(line, highlight=False)
    console.print()
    console.print(made.statement, style="bold", highlight=False)
    for line in made.remarks:
        console.print(line, highlight=False)
    console.print(f"{seconds:.0f} s in all; wrote {', '.join(map(str, written))}", highlight=False)
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
