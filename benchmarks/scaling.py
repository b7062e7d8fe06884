"""How cost grows with arrays and with parameters: ``python -m benchmarks.scaling --plot FILE``.

The step of adam_spd beside that of ``optax.adamw``, as ``step_time`` measures them: in one process
and in turn, gradients given, parameters and state donated, SPD firing in half of the arrays. Once
with as many parameters in more and more arrays, and once with more and more parameters in as many
arrays. The arrays of a tree are square and all alike. Tracing is the part of a compilation that is
Python's work (lowering included), the rest is XLA's.
"""

import argparse
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_spd
from benchmarks import measuring, reporting, vit

BASELINE, SPD = "adamw", "adam_spd"
OPTIMIZERS = {BASELINE: optax.adamw, SPD: optax_spd.adam_spd}
LEARNING_RATE = 1e-6  # as in step_time: the same layers fire all along
FIRE = 0.5

# Sizes as (arrays, parameters).
Size = tuple[int, int]
SWEEPS: dict[str, list[Size]] = {
    "arrays": [(arrays, 10_000_000) for arrays in (10, 100, 1000)],
    "parameters": [(50, parameters) for parameters in (1_000_000, 10_000_000, 100_000_000)],
}
QUICK_SWEEPS: dict[str, list[Size]] = {
    "arrays": [(2, 800), (8, 800)],
    "parameters": [(2, 200), (2, 800)],
}
GOAL_ARRAYS, GOAL_RATIO = 1000, 3.0


def shapes_of(size: Size) -> dict[str, tuple[int, int]]:
    """Square arrays, so many that together they have about as many parameters as asked for."""
    arrays, parameters = size
    side = max(1, math.isqrt(parameters // arrays))
    return {f"array_{i:04}": (side, side) for i in range(arrays)}


def measure(size: Size, samples: int, compilations: int) -> dict[str, Any]:
    """Both optimizers on one tree."""
    anchor, params, grads = vit.trees_of(shapes_of(size), FIRE)
    candidates = {
        name: measuring.make_candidate(make(LEARNING_RATE), anchor, params)
        for name, make in OPTIMIZERS.items()
    }
    sizes = [array.size for array in jax.tree.leaves(params)]
    del anchor, params
    measuring.measure(
        [*candidates.values()],
        jax.tree.map(jnp.array, grads),
        samples=samples,
        steps=1,
        compilations=compilations,
    )
    base, spd = candidates.values()

    def ratio(times: str) -> dict[str, float]:
        # Of what was taken one after the other: what slows both cancels.
        pairs = zip(_seconds(base, times), _seconds(spd, times), strict=True)
        return measuring.spread([b / a for a, b in pairs])

    return {
        "arrays": len(sizes),
        "parameters": sum(sizes),
        "optimizers": {
            name: measuring.summary(c) | {"ready_seconds": measuring.spread(_seconds(c, "ready"))}
            for name, c in candidates.items()
        },
        "step_ratio": ratio("step"),
        "ready_ratio": ratio("ready"),
    }


def _seconds(candidate: measuring.Candidate, times: str) -> list[float]:
    """Samples of a step's time, or of the time until the first step is ready to run."""
    if times == "step":
        return candidate.step_seconds
    both = zip(candidate.trace_seconds, candidate.compile_seconds, strict=True)
    return [traced + compiled for traced, compiled in both]


def compare(*, quick: bool, samples: int, compilations: int) -> dict[str, Any]:
    """Measures both sweeps; everything the table and the picture show, as JSON values."""
    before = reporting.environment()
    sweeps = QUICK_SWEEPS if quick else SWEEPS
    measure((2, 8), samples=1, compilations=1)  # what JAX does once in a process
    measured: dict[Size, dict[str, Any]] = {}
    for size in [size for sizes in sweeps.values() for size in sizes]:
        if size not in measured:
            measured[size] = measure(size, samples, compilations)
    return {
        "environment": before,
        "settings": {"quick": quick, "samples": samples, "compilations": compilations},
        "sweeps": {name: [measured[size] for size in sizes] for name, sizes in sweeps.items()},
    }


def table(result: dict[str, Any]) -> str:
    """The result as plain text."""
    settings = result["settings"]

    def row(*cells: str) -> str:
        return f"{cells[0]:>8}{cells[1]:>13}" + "".join(f"{cell:>18}" for cell in cells[2:])

    lines = [
        *reporting.header(result["environment"]),
        f"samples   {settings['samples']} steps and {settings['compilations']} compilation(s) of "
        f"each in turn, float32, medians; {BASELINE} / {SPD}",
    ]
    for name, points in result["sweeps"].items():
        lines += [
            "",
            f"more and more {name}",
            row(
                "arrays",
                "parameters",
                "step [ms]",
                "ratio (quartiles)",
                "tracing [s]",
                "XLA [s]",
                "both, ratio",
                "temporaries [MB]",
                "layers fired",
            ),
        ]
        lines += [row(*_cells(point)) for point in points]
    last = result["sweeps"]["arrays"][-1]
    ratio = last["ready_ratio"]["median"]
    lines += [
        "",
        f"Compilation (tracing and XLA) of {last['arrays']} arrays takes {ratio:.2f} of "
        f"{BASELINE}'s time; the goal for {GOAL_ARRAYS} is at most {GOAL_RATIO:g}.",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cells(point: dict[str, Any]) -> list[str]:
    both = [point["optimizers"][name] for name in OPTIMIZERS]
    ratio, fired = point["step_ratio"], both[1]["share_of_layers_fired"]

    def pair(values: list[float], digits: int) -> str:
        return " / ".join(f"{value:.{digits}f}" for value in values)

    temporaries = [one["temporary_bytes"] for one in both]
    return [
        f"{point['arrays']}",
        f"{point['parameters']:,}",
        pair([1e3 * one["step_seconds"]["median"] for one in both], 2),
        f"{ratio['median']:.2f} ({reporting.quartiles(ratio)})",
        pair([one["trace_seconds"] for one in both], 2),
        pair([one["compile_seconds"] for one in both], 2),
        f"{point['ready_ratio']['median']:.2f}",
        "unknown" if None in temporaries else pair([size / 1e6 for size in temporaries], 1),
        f"{fired:.0%}",
    ]


def plot(result: dict[str, Any], file: pathlib.Path) -> None:
    """Draws step time above, and compile time below, against arrays and against parameters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharey="row")
    for column, (name, points) in enumerate(result["sweeps"].items()):
        for row, what in enumerate(("step [ms]", "until the first step is ready [s]")):
            axes = panels[row][column]
            for index, optimizer in enumerate(OPTIMIZERS):
                measured = [point["optimizers"][optimizer] for point in points]
                x = [point[name] for point in points]
                scale, key = (1e3, "step_seconds") if row == 0 else (1.0, "ready_seconds")
                middle = [scale * one[key]["median"] for one in measured]
                low = [scale * one[key]["lower_quartile"] for one in measured]
                high = [scale * one[key]["upper_quartile"] for one in measured]
                colour, marker = f"C{index}", "os"[index]
                axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
                axes.plot(x, middle, marker=marker, color=colour, label=optimizer)
                if row == 1:
                    traced = [one["trace_seconds"] for one in measured]
                    axes.plot(x, traced, "--", color=colour, label=f"{optimizer}, tracing alone")
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel(name)
            axes.grid(alpha=0.3)
            if column == 0:
                axes.set_ylabel(what)
        kept = "parameters" if name == "arrays" else "arrays"
        panels[0][column].set_title(f"{points[-1][kept]:,} {kept}")
    handles, labels = panels[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(result["environment"]["device"] + f", jax {result['environment']['jax']}")
    figure.savefig(file, format="png", dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the arguments, measures, prints the table and writes JSON and picture."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="tiny trees, to see that it works")
    add("--samples", type=reporting.count, default=10, help="timings of each step")
    add("--compilations", type=reporting.count, default=1, help="timings of each compilation")
    reporting.run(parser, argv, compare, table, plot)


if __name__ == "__main__":
    main()
