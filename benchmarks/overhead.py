"""SPD's share of the time of a training step: ``python -m benchmarks.overhead``.

The model is the demo's, with random weights, at 32 x 128 tokens. Two measurements alternate in one
process: whole training steps with Adam, and with Adam and SPD; and only their updates with given
gradients. The difference of the updates is SPD's cost. It resolves small shares, which whole steps
do not, because they take seconds and vary by several per cent.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import optax

import optax_spd
from benchmarks import measuring, radii, reporting

LEARNING_RATE = 1e-5
OPTIMIZERS = {
    "adam": lambda: optax.adam(LEARNING_RATE),
    "adam_spd": lambda: optax_spd.adam_spd(LEARNING_RATE),
}


def compare(*, batch: int, length: int, samples: int, updates: int) -> dict[str, Any]:
    """Measures everything the table shows, as JSON values."""
    before = reporting.environment()
    params = radii.make_params()
    moved = jax.tree.map(lambda x: x + 1e-3, params)
    examples = radii.make_batch(batch, length, seed=1)
    steps = {
        name: measuring.make_candidate(
            make(), params, moved, measuring.whole_step(make(), radii.loss_fn)
        )
        for name, make in OPTIMIZERS.items()
    }
    measuring.measure(
        [*steps.values()],
        examples,
        samples=samples,
        steps=1,
        warm_up=1,
        compilations=1,
    )
    alone = {
        name: measuring.make_candidate(make(), params, moved) for name, make in OPTIMIZERS.items()
    }
    grads = jax.jit(jax.grad(radii.loss_fn))(moved, examples)
    measuring.measure([*alone.values()], grads, samples=updates, steps=1, compilations=1)
    added = [
        spd - adam
        for adam, spd in zip(
            alone["adam"].step_seconds, alone["adam_spd"].step_seconds, strict=True
        )
    ]
    step = measuring.spread(steps["adam"].step_seconds)
    return {
        "environment": before,
        "settings": {"batch": batch, "length": length, "samples": samples, "updates": updates},
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "step_seconds": {n: measuring.spread(c.step_seconds) for n, c in steps.items()},
        "update_seconds": {n: measuring.spread(c.step_seconds) for n, c in alone.items()},
        "temporary_bytes": {n: measuring.summary(c)["temporary_bytes"] for n, c in steps.items()},
        "added_seconds": measuring.spread(added),
        "share": measuring.spread([seconds / step["median"] for seconds in added]),
    }


def table(result: dict[str, Any]) -> str:
    """The result as plain text."""
    settings = result["settings"]
    lines = [
        *reporting.header(result["environment"]),
        f"model     the demo's, {result['parameters']:,} parameters, {settings['batch']} x "
        f"{settings['length']} tokens",
        f"samples   {settings['samples']} steps and {settings['updates']} updates of each, in turn",
        "",
        f"{'':<12}{'step [ms]':>22}{'update alone [ms]':>26}{'temporaries [MB]':>20}",
    ]
    for name in OPTIMIZERS:
        cells = [
            f"{1e3 * s['median']:.0f} ({reporting.quartiles(s, 1e3, digits=0)})"
            for s in (result["step_seconds"][name], result["update_seconds"][name])
        ]
        memory = reporting.megabytes(result["temporary_bytes"][name], digits=0)
        lines.append(f"{name:<12}{cells[0]:>22}{cells[1]:>26}{memory:>20}")
    added, share = result["added_seconds"], result["share"]
    lines += [
        "",
        f"SPD adds {1e3 * added['median']:.0f} ms ({reporting.quartiles(added, 1e3, digits=0)}) to "
        f"an update: {share['median']:.2%} of a training step with Adam "
        f"({reporting.quartiles(share, 100)} %).",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the arguments, measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--batch", type=reporting.count, default=32, help="sequences in a batch")
    add("--length", type=reporting.count, default=128, help="tokens in a sequence")
    add("--samples", type=reporting.count, default=5, help="timings of each training step")
    add("--updates", type=reporting.count, default=20, help="timings of each update")
    reporting.run(parser, argv, compare, table)


if __name__ == "__main__":
    main()
