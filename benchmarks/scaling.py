"""How cost grows with arrays and with parameters: ``python -m benchmarks.scaling --plot FILE``.

Compares the steps of ``adam_spd`` and ``optax.adamw``, measured as in ``step_time``: alternately in
one process, with given gradients and donated parameters and state; SPD fires in half of the arrays.
One sweep varies the number of arrays at a fixed number of parameters, one the number of parameters
at a fixed number of arrays, and one has 300 and 1000 arrays of 100 x 100, for which there is a
goal. For 1000 of these the tracing time of three recipes is compared with that of ``optax.adamw``.
The arrays of a tree are equal squares. Tracing is the Python part of a compilation, including
lowering; the rest is XLA's. The CPU time of all threads measures compilation even on a busy
machine.
"""

import argparse
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import measuring, reporting, vit

BASELINE, SPD = measuring.BASELINE, "adam_spd"
OPTIMIZERS = {BASELINE: optax.adamw, SPD: measuring.RECIPES[SPD]}
LEARNING_RATE = 1e-6  # as in step_time: so small that the same layers fire in all steps
FIRE = 0.5

# Sizes as (arrays, parameters).
Size = tuple[int, int]
SWEEPS: dict[str, list[Size]] = {
    "arrays": [(arrays, 10_000_000) for arrays in (10, 100, 1000)],
    "parameters": [(50, parameters) for parameters in (1_000_000, 10_000_000, 100_000_000)],
    "arrays of 100 x 100": [(arrays, arrays * 100 * 100) for arrays in (300, 1000)],
}
QUICK_SWEEPS: dict[str, list[Size]] = {
    "arrays": [(2, 800), (8, 800)],
    "parameters": [(2, 200), (2, 800)],
    "arrays of 100 x 100": [(2, 20_000)],
}
GOAL, GOAL_RATIO = "arrays of 100 x 100", 4.0
DRAWN = ("arrays", "parameters")
TRACED = {"adam_spd": 3.0, "adam_tpgm": 4.0, "adam_ftp": 4.0}  # recipes, and goals of the ratio
TRACED_SIZE, QUICK_TRACED_SIZE = (1000, 10_000_000), (2, 20_000)


def shapes_of(size: Size) -> dict[str, tuple[int, int]]:
    """The given number of equal square arrays, with about the given number of parameters."""
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
    return {
        "arrays": len(sizes),
        "parameters": sum(sizes),
        "optimizers": {
            name: measuring.summary(c)
            | {
                "ready_seconds": measuring.spread(_sums(c.trace_seconds, c.compile_seconds)),
                "ready_cpu_seconds": measuring.spread(_ready_cpu(c)),
            }
            for name, c in candidates.items()
        },
        "step_ratio": measuring.ratio(spd.step_seconds, base.step_seconds),
        "ready_cpu_ratio": measuring.ratio(_ready_cpu(spd), _ready_cpu(base)),
    }


def trace(size: Size, rounds: int) -> dict[str, dict[str, float]]:
    """For each recipe of ``TRACED`` its tracing time as a ratio to the baseline's."""
    params = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes_of(size).items()}
    made = {name: measuring.RECIPES[name](LEARNING_RATE) for name in TRACED}
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        for name, tx in {BASELINE: optax.adamw(LEARNING_RATE), **made}.items():
            state = jax.eval_shape(tx.init, params)
            start = time.process_time()
            jax.jit(measuring.update_only(tx)).lower(params, state, params)
            seconds.setdefault(name, []).append(time.process_time() - start)
    # Without the first round, which also traces what all arrays of a shape share.
    return {name: measuring.ratio(seconds[name][1:], seconds[BASELINE][1:]) for name in TRACED}


def _ready_cpu(candidate: measuring.Candidate) -> list[float]:
    """Per compilation the CPU time until the first step is ready to run."""
    return _sums(candidate.trace_cpu_seconds, candidate.compile_cpu_seconds)


def _sums(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a + b for a, b in zip(one, other, strict=True)]


def compare(*, quick: bool, samples: int, compilations: int) -> dict[str, Any]:
    """Measures everything that the table and the picture show, as JSON values."""
    before = reporting.environment()
    sweeps = QUICK_SWEEPS if quick else SWEEPS
    measure((2, 8), samples=1, compilations=1)  # so that JAX's one-time set-up is not measured
    measured: dict[Size, dict[str, Any]] = {}
    for size in [size for sizes in sweeps.values() for size in sizes]:
        if size not in measured:
            measured[size] = measure(size, samples, compilations)
    return {
        "environment": before,
        "settings": {"quick": quick, "samples": samples, "compilations": compilations},
        "sweeps": {name: [measured[size] for size in sizes] for name, sizes in sweeps.items()},
        "traced_arrays": (QUICK_TRACED_SIZE if quick else TRACED_SIZE)[0],
        "trace_cpu_ratio": trace(QUICK_TRACED_SIZE if quick else TRACED_SIZE, rounds=3),
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
            name,
            row(
                "arrays",
                "parameters",
                "step [ms]",
                "ratio (quartiles)",
                "tracing [s]",
                "XLA [s]",
                "both, CPU [s]",
                "ratio of CPU",
                "temporaries [MB]",
                "layers fired",
            ),
        ]
        lines += [row(*_cells(point)) for point in points]
    lines += [
        "",
        *(
            f"Tracing and compiling {point['arrays']} {GOAL} takes "
            f"{point['ready_cpu_ratio']['median']:.2f} of {BASELINE}'s CPU time; the goal is at "
            f"most {GOAL_RATIO:g}."
            for point in result["sweeps"][GOAL]
        ),
        *(
            f"Tracing {name} for {result['traced_arrays']} {GOAL} takes {ratio['median']:.2f} of "
            f"{BASELINE}'s CPU time; the goal is at most {TRACED[name]:g}."
            for name, ratio in result["trace_cpu_ratio"].items()
        ),
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cells(point: dict[str, Any]) -> list[str]:
    both = [point["optimizers"][name] for name in OPTIMIZERS]
    ratio, fired = point["step_ratio"], both[1]["share_of_layers_fired"]

    def pair(values: list[float], digits: int) -> str:
        return " / ".join(f"{value:.{digits}f}" for value in values)

    return [
        f"{point['arrays']}",
        f"{point['parameters']:,}",
        pair([1e3 * one["step_seconds"]["median"] for one in both], 2),
        f"{ratio['median']:.2f} ({reporting.quartiles(ratio)})",
        pair([one["trace_seconds"] for one in both], 2),
        pair([one["compile_seconds"] for one in both], 2),
        pair([one["ready_cpu_seconds"]["median"] for one in both], 2),
        f"{point['ready_cpu_ratio']['median']:.2f}",
        " / ".join(reporting.megabytes(one["temporary_bytes"]) for one in both),
        f"{fired:.0%}",
    ]


def plot(result: dict[str, Any], file: pathlib.Path) -> None:
    """Draws step time above, and compile time below, against arrays and against parameters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharey="row")
    for column, name in enumerate(DRAWN):
        points = result["sweeps"][name]
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
