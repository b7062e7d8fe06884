"""``adam_spd`` and AdamSPD in PyTorch, on the CPU: ``python -m benchmarks.against_pytorch``.

The authors' AdamSPD is a loop over arrays in PyTorch. ``benchmarks.one_optimizer`` has such a loop,
written from the equations. It runs on the same ViT-shaped tree and gradients as
``optax_spd.adam_spd``, with as many threads; SPD fires in about half of the arrays. AdamW of both
frameworks is included for comparison. Every optimizer runs in its own process, so that the other
framework's threads do not interfere; the processes alternate, in several rounds. First both sides
step on the same gradients of a small tree, and the table shows how far apart they end.

Run it on an idle machine. PyTorch's threads synchronise after every operation on an array, so
another program slows it down far more than JAX.

Only this benchmark needs PyTorch: ``pip install torch``.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import measuring, one_optimizer, reporting, vit
from benchmarks.one_optimizer import (
    JAX_ADAMW,
    JAX_SPD,
    RUNS,
    TORCH_ADAMW,
    TORCH_FUSED,
    TORCH_SPD,
)

FIRE = 0.5

# Pairs of optimizers that must agree after steps on these multiples of the gradients. Each step is
# about a tenth of the distance from the anchor.
SAME = ((JAX_SPD, TORCH_SPD), (JAX_ADAMW, TORCH_ADAMW), (JAX_ADAMW, TORCH_FUSED))
CHECK_FACTORS = (1.0, 0.5, 2.0, -0.5, 1.0, 1.5)
CHECK_LEARNING_RATE = 1e-3
TOLERANCE = 1e-6

# The times are unreliable at this load average or above.
BUSY = 1.0

REPOSITORY = pathlib.Path(__file__).parents[1]


def run_child(name: str, folder: pathlib.Path, threads: int, *arguments: str) -> dict[str, Any]:
    """Runs ``benchmarks.one_optimizer`` in a new process; the result that it prints."""
    command = [sys.executable, "-m", "benchmarks.one_optimizer", name, str(folder)]
    # JAX must not use a GPU, since PyTorch runs on the CPU here.
    ended = subprocess.run(
        [*command, "--threads", str(threads), *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if ended.returncode != 0:
        sys.exit(f"The process of {name!r} ended with {ended.returncode}; its words are above.")
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def save_trees(folder: pathlib.Path, scale: vit.Scale) -> list[int]:
    """Writes anchor, parameters and gradients for the processes; returns the arrays' sizes."""
    names = (one_optimizer.ANCHOR, one_optimizer.PARAMS, one_optimizer.GRADS)
    for name, tree in zip(names, vit.make_trees(scale, FIRE), strict=True):
        leaves = jax.tree.leaves(tree)
        one_optimizer.save_arrays(folder, name, leaves)
    return [leaf.size for leaf in leaves]


def learning_rate(steps: int) -> float:
    """The rate with which all steps together cover a third of the distance to the anchor.

    So the same layers fire in all steps. The rate must not be smaller: the growth of the distance
    must exceed the rounding error of PyTorch's float32 sums of squares.
    """
    return vit.OFFSET / (3 * steps)


def check(threads: int) -> list[dict[str, Any]]:
    """How far apart the two frameworks are after several steps on the same gradients."""
    factors = [str(factor) for factor in CHECK_FACTORS]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        save_trees(folder, vit.SCALES["small"])
        before = np.load(folder / f"{one_optimizer.PARAMS}.npy")
        after = {}
        for index, optimizer in enumerate(RUNS):
            arguments = ["--learning-rate", str(CHECK_LEARNING_RATE), "--result", f"after_{index}"]
            run_child(optimizer, folder, threads, *arguments, "--factors", *factors)
            after[optimizer] = np.load(folder / f"after_{index}.npy")
    return [compared(one, other, before, after) for one, other in SAME]


def compared(
    one: str, other: str, before: np.ndarray, after: dict[str, np.ndarray]
) -> dict[str, Any]:
    """The largest difference of parameters, and how far they moved."""
    return {
        "optimizers": [one, other],
        "steps": len(CHECK_FACTORS),
        "largest_difference": float(np.max(np.abs(after[one] - after[other]))),
        "largest_move": float(np.max(np.abs(after[one] - before))),
        "largest_parameter": float(np.max(np.abs(after[one]))),
    }


def refuse_differences(checks: list[dict[str, Any]]) -> None:
    """Ends the program if two optimizers that must agree do not."""
    for found in checks:
        # Not ">", so that NaN fails too.
        if not found["largest_difference"] <= TOLERANCE:
            one, other = found["optimizers"]
            sys.exit(
                f"After {found['steps']} steps {one} and {other} differ by "
                f"{found['largest_difference']:.1e}, more than {TOLERANCE:.0e}: their times would "
                "not be those of the same work."
            )


def summarize(rounds: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Per optimizer the spread of its step times, and of their ratio to PyTorch's AdamSPD.

    A ratio is of the medians of one round, so that anything that slows a whole round cancels.
    """

    def medians(name: str) -> list[float]:
        return [statistics.median(found[name]["seconds"]) for found in rounds]

    return {
        name: {
            "step_seconds": measuring.spread([s for r in rounds for s in r[name]["seconds"]]),
            "ratio": measuring.ratio(medians(name), medians(TORCH_SPD)),
            "fired": rounds[-1][name]["fired"],
        }
        for name in rounds[0]
    }


def compare(*, scale: str, rounds: int, steps: int, warm_up: int, threads: int) -> dict[str, Any]:
    """Checks and measures everything that the table shows, as JSON values."""
    if importlib.util.find_spec("torch") is None:
        sys.exit("benchmarks.against_pytorch needs PyTorch: pip install torch")
    before = reporting.environment()
    checks = check(threads)
    refuse_differences(checks)
    rate = learning_rate(warm_up + steps)
    arguments = [f"--learning-rate={rate}", f"--steps={steps}", f"--warm-up={warm_up}"]
    measured: list[dict[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as folder:
        sizes = save_trees(pathlib.Path(folder), vit.SCALES[scale])
        for index in range(rounds):
            # In alternating order, so that no optimizer always runs first.
            order = [*RUNS] if index % 2 == 0 else [*RUNS][::-1]
            found = {
                name: run_child(name, pathlib.Path(folder), threads, *arguments) for name in order
            }
            measured.append({name: found[name] for name in RUNS})
    ours = measured[0][JAX_SPD]
    return {
        "environment": before
        | {"device": ours["device"], "torch": measured[0][TORCH_SPD]["version"]},
        "settings": {
            "scale": scale,
            "rounds": rounds,
            "steps": steps,
            "warm_up": warm_up,
            "threads": threads,
        },
        "tree": {"arrays": len(sizes), "parameters": sum(sizes)},
        "checks": checks,
        "optimizers": summarize(measured),
    }


def table(result: dict[str, Any]) -> str:
    """The result as plain text."""
    env, settings, tree = result["environment"], result["settings"], result["tree"]
    ratio = result["optimizers"][JAX_SPD]["ratio"]

    def row(*cells: str) -> str:
        return f"{cells[0]:<28}" + "".join(f"{cell:>18}" for cell in cells[1:])

    lines = [
        *reporting.header(env),
        f"          torch {env['torch']}; {settings['threads']} thread(s) for either",
        f"tree      {settings['scale']}: {tree['arrays']} arrays, {tree['parameters']:,} "
        "parameters, float32",
        f"samples   {settings['rounds']} processes of each in turn, {settings['steps']} steps in "
        "each",
        "",
        row("", "step [ms]", "quartiles", "ratio to PyTorch", "quartiles", "layers fired"),
    ]
    for name, found in result["optimizers"].items():
        step, fired = found["step_seconds"], found["fired"]
        lines.append(
            row(
                name,
                f"{1e3 * step['median']:.1f}",
                reporting.quartiles(step, 1e3, digits=1),
                f"{found['ratio']['median']:.2f}",
                reporting.quartiles(found["ratio"]),
                "-" if fired is None else f"{fired:.0%}",
            )
        )
    lines += [
        "",
        f"{JAX_SPD} takes {ratio['median']:.2f} (quartiles {reporting.quartiles(ratio)}) of the "
        f"time of {TORCH_SPD}.",
    ]
    if env["load_average"] >= BUSY:
        lines.append(
            f"The machine was busy (load average {env['load_average']:.1f}), which slows PyTorch "
            "down more than JAX: do not trust these times."
        )
    for found in result["checks"]:
        lines.append(
            f"Largest difference after {found['steps']} steps, "
            f"{' and '.join(found['optimizers'])}: {found['largest_difference']:.1e} "
            f"(parameters up to {found['largest_parameter']:.2f}, moved by up to "
            f"{found['largest_move']:.1e})."
        )
    return "\n".join(line.rstrip() for line in lines)


# argparse shows this function's name: "invalid threads value".
def threads(text: str) -> int:
    value = reporting.count(text)
    if value > reporting.cores():
        raise argparse.ArgumentTypeError(f"there are {reporting.cores()}, got {text}")
    if value < reporting.cores() and not hasattr(os, "sched_setaffinity"):
        raise argparse.ArgumentTypeError("JAX takes all threads on this system; leave this out")
    return value


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the arguments, measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.against_pytorch", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--scale", choices=vit.SCALES, default="vit-b16", help="size of the parameter tree")
    add("--rounds", type=reporting.count, default=5, help="processes of each optimizer")
    add("--steps", type=reporting.count, default=10, help="timed steps in each process")
    add("--warm-up", type=reporting.count, default=2, help="steps before them")
    add("--threads", type=threads, default=reporting.cores(), help="of either framework")
    reporting.run(parser, argv, compare, table)


if __name__ == "__main__":
    main()
