"""What a recipe's step costs beside ``optax.adamw``'s: ``python -m benchmarks.step_time``.

Both optimizers step on a tree with the shapes of a ViT, in one process and in turn, so that
whatever else the machine does falls on both; parameters and state are donated, as in training.
Only the optimizer is timed: the gradients are made once and are arguments of the step.

An update of data larger than the caches takes the time of moving it. In float32 AdamW reads a
parameter, its gradient and two moments and writes all but the gradient: 7 numbers, 28 bytes a
parameter. SPD reads the anchor as well, and knows a layer's ratio only when all of the layer was
read, so a second pass reads parameter, anchor and step (or moments) again before the parameter is
written: 12 numbers, or 8 where the second pass finds the layer in a cache. At the limit of memory
its step therefore takes 12/7 = 1.71 (8/7 = 1.14) of AdamW's time. L2-SP needs one pass: 8/7.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_spd
from benchmarks import measuring, reporting, vit

# Small beside the parameters' distance from the anchor, so that the same layers fire all along.
LEARNING_RATE = 1e-6

BASELINE = "adamw"
RECIPES: dict[str, Callable[..., Any]] = {
    "adam_spd": optax_spd.adam_spd,
    "adamw_l2_sp": optax_spd.adamw_l2_sp,
}
# Numbers moved per parameter and step: where a second pass goes to memory, and where it does not.
NUMBERS_MOVED = {BASELINE: (7, 7), "adam_spd": (12, 8), "adamw_l2_sp": (8, 8)}
FLOAT32_BYTES = 4


def compare(
    *, recipe: str, scale: str, fire: float, samples: int, steps: int, compilations: int
) -> dict[str, Any]:
    """Measures a recipe and the baseline; everything the table shows, as JSON values."""
    before = reporting.environment()
    anchor, params, grads = vit.make_trees(vit.SCALES[scale], fire)
    makers = {BASELINE: optax.adamw, recipe: RECIPES[recipe]}
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
    base, other = (c.step_seconds for c in candidates.values())
    uncached, cached = (
        b / a for a, b in zip(NUMBERS_MOVED[BASELINE], NUMBERS_MOVED[recipe], strict=True)
    )
    sizes = [array.size for array in jax.tree.leaves(params)]
    return {
        "environment": before,
        "settings": {
            "recipe": recipe,
            "scale": scale,
            "fire": fire,
            "samples": samples,
            "steps": steps,
            "compilations": compilations,
        },
        "tree": {"arrays": len(sizes), "parameters": sum(sizes)},
        "optimizers": {name: measuring.summary(c) for name, c in candidates.items()},
        # Of samples taken one after the other: what slows both cancels.
        "time_ratio": measuring.spread([b / a for a, b in zip(base, other, strict=True)]),
        "limit_ratio": {"second_pass_from_memory": uncached, "second_pass_from_cache": cached},
    }


def table(result: dict[str, Any]) -> str:
    """The result as plain text."""
    env, settings, tree = result["environment"], result["settings"], result["tree"]
    optimizers: dict[str, dict[str, Any]] = result["optimizers"]
    limit, ratio = result["limit_ratio"], result["time_ratio"]

    def row(label: str, *cells: str) -> str:
        return f"{label:<36}" + "".join(f"{cell:>18}" for cell in cells)

    def measured(label: str, show: Callable[[dict[str, Any]], str]) -> str:
        return row(label, *map(show, optimizers.values()))

    def percent(key: str) -> Callable[[dict[str, Any]], str]:
        return lambda o: "-" if o[key] is None else f"{o[key]:.1%}"

    def megabytes(size: int | None) -> str:
        return "unknown" if size is None else f"{size / 1e6:.1f}"

    def moved(name: str) -> list[int]:
        return sorted({FLOAT32_BYTES * numbers for numbers in NUMBERS_MOVED[name]})

    def rates(name: str) -> str:
        step = optimizers[name]["step_seconds"]["median"]
        return "-".join(f"{b * tree['parameters'] / step / 1e9:.1f}" for b in moved(name))

    lines = [
        *reporting.header(env),
        f"tree      {settings['scale']}: {tree['arrays']} arrays, {tree['parameters']:,} "
        "parameters, float32",
        f"samples   {settings['samples']} of each in turn, {settings['steps']} step(s) per sample",
        "",
        row("", *optimizers),
        measured("step, median [ms]", lambda o: f"{1e3 * o['step_seconds']['median']:.2f}"),
        measured("step, quartiles [ms]", lambda o: reporting.quartiles(o["step_seconds"], 1e3)),
        row("to move [bytes/parameter]", *("-".join(map(str, moved(n))) for n in optimizers)),
        row("that is [GB/s]", *map(rates, optimizers)),
        measured("tracing, median [s]", lambda o: f"{o['trace_seconds']:.2f}"),
        measured("compilation, median [s]", lambda o: f"{o['compile_seconds']:.2f}"),
        measured("state [bytes/parameter]", lambda o: f"{o['state_bytes_per_parameter']:.3f}"),
        measured("state, counts and vectors [bytes]", lambda o: f"{o['state_bytes_other']}"),
        measured("temporaries of the step [MB]", lambda o: megabytes(o["temporary_bytes"])),
        measured("layers that fired", percent("share_of_layers_fired")),
        measured("parameters in them", percent("share_of_parameters_in_them")),
        "",
        f"{settings['recipe']} takes {ratio['median']:.2f} (quartiles "
        f"{reporting.quartiles(ratio)}) of {BASELINE}'s time; by bytes moved alone "
        f"{limit['second_pass_from_memory']:.2f} "
        f"({limit['second_pass_from_cache']:.2f} if a second pass hits a cache).",
    ]
    return "\n".join(line.rstrip() for line in lines)


# argparse shows the name of such a function: "invalid share value".
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
    add("--recipe", choices=RECIPES, default="adam_spd", help="what to compare with adamw")
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
