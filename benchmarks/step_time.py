"""The cost of a recipe's step compared with ``optax.adamw``: ``python -m benchmarks.step_time``.

All optimizers step on a tree with the shapes of a ViT, alternately in one process, so that other
load affects them all alike. Parameters and state are donated, as in training. Only the optimizer is
timed: the gradients are made once and are arguments of the step.

An update of data larger than the caches is limited by memory bandwidth. In float32 AdamW reads a
parameter, its gradient and two moments and writes all but the gradient: 7 numbers, 28 bytes a
parameter. The other methods also read the anchor. What they must move, in numbers a parameter:

- L2-SP needs one pass: 8.
- SPD knows a layer's ratio only after reading the whole layer. The first pass reads parameter,
  gradient, both moments and anchor and writes the moments: 7. The second pass reads parameter,
  anchor and the two new moments (or writes and reads the step: as many), and writes the parameter:
  5. The total is 12. If the layer is still in a cache, the second pass's 4 reads are free: 8.
- TPGM, without validation data, has the same two passes, since the radius depends on all row
  norms: 12, or 8.
- FTP also reads the last deviation in the first pass: 8. Its second pass also writes the new
  deviation, and rereads the last one, because a layer with numbers that are not finite keeps it: 7.
  The total is 15. If the layer is still in a cache, the second pass's 5 reads are free: 10.

So at the limit of memory bandwidth a step takes 12/7 = 1.71 (8/7 = 1.14 from a cache) of AdamW's
time with SPD or TPGM, 15/7 = 2.14 (10/7 = 1.43) with FTP, and 8/7 with L2-SP. A chain written by
hand must move as much as its recipe.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import measuring, reporting, vit
from benchmarks.measuring import BASELINE, RECIPES

# Small compared with the distance from the anchor, so that the same layers fire in all steps.
LEARNING_RATE = 1e-6

ALL = "all"
# Numbers moved per parameter and step, as derived above: if the second pass reads from memory, and
# if it reads from a cache.
NUMBERS_MOVED = {
    BASELINE: (7, 7),
    "adam_spd": (12, 8),
    "chain(adam, spd)": (12, 8),
    "adam_tpgm": (12, 8),
    "chain(adam, tpgm)": (12, 8),
    "adam_ftp": (15, 10),
    "chain(adam, ftp)": (15, 10),
    "adamw_l2_sp": (8, 8),
}
FLOAT32_BYTES = 4


def compare(
    *,
    recipe: Sequence[str],
    scale: str,
    fire: float,
    samples: int,
    steps: int,
    compilations: int,
) -> dict[str, Any]:
    """Measures everything that the table shows, as JSON values."""
    before = reporting.environment()
    names = [name for name in RECIPES if name in recipe or ALL in recipe]
    anchor, params, grads = vit.make_trees(vit.SCALES[scale], fire)
    makers = {BASELINE: optax.adamw} | {name: RECIPES[name] for name in names}
    candidates = {
        name: measuring.make_candidate(make(LEARNING_RATE), anchor, params)
        for name, make in makers.items()
    }
    measuring.measure(
        [*candidates.values()],
        jax.tree.map(jnp.array, grads),
        samples=samples,
        steps=steps,
        compilations=compilations,
    )
    base = candidates[BASELINE].step_seconds
    sizes = [array.size for array in jax.tree.leaves(params)]
    return {
        "environment": before,
        "settings": {
            "recipe": names,
            "scale": scale,
            "fire": fire,
            "samples": samples,
            "steps": steps,
            "compilations": compilations,
        },
        "tree": {"arrays": len(sizes), "parameters": sum(sizes)},
        "optimizers": {
            name: measuring.summary(candidate)
            | {"time_ratio": measuring.ratio(candidate.step_seconds, base)}
            for name, candidate in candidates.items()
        },
    }


def moved(name: str) -> list[int]:
    """Numbers that a step must move per parameter, fewest first."""
    return sorted({*NUMBERS_MOVED[name]})


def table(result: dict[str, Any]) -> str:
    """The result as plain text."""
    settings, tree = result["settings"], result["tree"]
    optimizers: dict[str, dict[str, Any]] = result["optimizers"]
    (least,) = moved(BASELINE)

    def row(label: str, show: Callable[[str], str]) -> str:
        return f"{label:<36}" + "".join(f"{show(name):>19}" for name in optimizers)

    def measured(label: str, key: str, show: Callable[[Any], str]) -> str:
        return row(label, lambda name: show(optimizers[name][key]))

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    def seconds(value: float) -> str:
        return f"{value:.2f}"

    def bounds(values: list[float], digits: int) -> str:
        return "-".join(f"{value:.{digits}f}" for value in values)

    def rates(name: str) -> list[float]:
        step = optimizers[name]["step_seconds"]["median"]
        return [FLOAT32_BYTES * n * tree["parameters"] / step / 1e9 for n in moved(name)]

    lines = [
        *reporting.header(result["environment"]),
        f"tree      {settings['scale']}: {tree['arrays']} arrays, {tree['parameters']:,} "
        "parameters, float32",
        f"samples   {settings['samples']} of each in turn, {settings['steps']} step(s) per sample",
        "",
        row("", str),
        measured("step, median [ms]", "step_seconds", lambda x: f"{1e3 * x['median']:.2f}"),
        measured("step, quartiles [ms]", "step_seconds", lambda x: reporting.quartiles(x, 1e3)),
        measured(f"ratio to {BASELINE}, median", "time_ratio", lambda x: f"{x['median']:.2f}"),
        measured(f"ratio to {BASELINE}, quartiles", "time_ratio", reporting.quartiles),
        row("ratio by bytes that must move", lambda n: bounds([x / least for x in moved(n)], 2)),
        row(
            "must move [bytes/parameter]",
            lambda n: bounds([FLOAT32_BYTES * x for x in moved(n)], 0),
        ),
        row("that is [GB/s]", lambda n: bounds(rates(n), 1)),
        measured("tracing, median [s]", "trace_seconds", seconds),
        measured("tracing, CPU time [s]", "trace_cpu_seconds", seconds),
        measured("compilation, median [s]", "compile_seconds", seconds),
        measured("compilation, CPU time [s]", "compile_cpu_seconds", seconds),
        measured("state [bytes/parameter]", "state_bytes_per_parameter", lambda x: f"{x:.3f}"),
        measured("state, counts and vectors [bytes]", "state_bytes_other", str),
        measured("temporaries of the step [MB]", "temporary_bytes", reporting.megabytes),
        measured("layers that fired", "share_of_layers_fired", percent),
        measured("parameters in them", "share_of_parameters_in_them", percent),
        "",
        "Where two numbers must move, the smaller is for a second pass that hits a cache.",
    ]
    return "\n".join(line.rstrip() for line in lines)


# argparse shows this function's name: "invalid share value".
def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"a share lies between 0 and 1, got {text}")
    return value


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the arguments, measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_time", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add(
        "--recipe",
        nargs="+",
        choices=[*RECIPES, ALL],
        default=["adam_spd"],
        help=f"what to compare with {BASELINE}, in one process",
    )
    add("--scale", choices=vit.SCALES, default="vit-b16", help="size of the parameter tree")
    add(
        "--fire",
        type=share,
        default=0.5,
        metavar="SHARE",
        help="share of layers in which SPD acts, 0 to 1",
    )
    add("--samples", type=reporting.count, default=20, help="timings of each optimizer")
    add("--steps", type=reporting.count, default=1, help="steps per timing")
    add("--compilations", type=reporting.count, default=3, help="timings of each compilation")
    reporting.run(parser, argv, compare, table)


if __name__ == "__main__":
    main()
