"""The cost of learned radii in a training step: ``python -m benchmarks.radii``.

Whole training steps on the demo's model (all-MiniLM-L6-v2 with a head, random weights): loss,
gradient and optimizer in one jitted function that donates parameters and state. Plain Adam, Adam
with FTP, Adam with TPGM that learns with one inner step on every step, and the same on every tenth
step alternate in one process. When TPGM learns, the model runs forward and backward once more, on a
validation batch as large as the training batch. FTP learns its radii from the training gradient.

TPGM's paper has no such figure; FTP's paper claims 35 % less time a step than TPGM.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_spd
from benchmarks import measuring, reporting
from examples.demo.minilm import VOCABULARY, Classifier

Tree = Any
Batch = tuple[jax.Array, jax.Array, jax.Array]

LEARNING_RATE = 1e-5
EVERY = 10
PLAIN, FTP, TPGM, SELDOM = "adam", "adam_ftp", "adam_tpgm", f"adam_tpgm, every={EVERY}"


def loss_fn(params: Tree, batch: Batch) -> jax.Array:
    """The demo's loss."""
    tokens, mask, labels = batch
    logits = Classifier().apply({"params": params}, tokens, mask)
    loss: jax.Array = optax.sigmoid_binary_cross_entropy(logits, labels).mean()
    return loss


def make_batch(size: int, length: int, seed: int) -> Batch:
    """Random tokens without padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, (size, length), np.int32)
    labels = rng.integers(0, 2, size, np.int32)
    return jnp.asarray(tokens), jnp.ones((size, length), bool), jnp.asarray(labels)


def make_params() -> Tree:
    """Parameters of the demo's shapes."""
    tokens, mask, _ = make_batch(1, 8, seed=0)
    return Classifier().init(jax.random.key(0), tokens, mask)["params"]


def make_optimizers() -> dict[str, optax.GradientTransformation]:
    """The optimizers to compare, by name."""
    return {
        PLAIN: optax.adam(LEARNING_RATE),
        FTP: optax_spd.adam_ftp(LEARNING_RATE),
        TPGM: optax_spd.adam_tpgm(LEARNING_RATE),
        SELDOM: optax_spd.adam_tpgm(LEARNING_RATE, every=EVERY),
    }


def compare(*, batch: int, length: int, samples: int) -> dict[str, Any]:
    """Measures everything that the table shows, as JSON values."""
    before = reporting.environment()
    params = make_params()
    candidates = {
        name: measuring.make_candidate(
            tx, params, params, measuring.whole_step(tx, loss_fn, validates=name in (TPGM, SELDOM))
        )
        for name, tx in make_optimizers().items()
    }
    validation = jax.tree.map(lambda x: x[None], make_batch(batch, length, seed=2))
    measuring.measure(
        [*candidates.values()],
        make_batch(batch, length, seed=1),
        validation,
        samples=samples,
        # EVERY steps, so that each timing of SELDOM includes one step that learns.
        steps=EVERY,
        warm_up=EVERY,
        compilations=1,
    )
    seconds = {name: c.step_seconds for name, c in candidates.items()}
    return {
        "environment": before,
        "settings": {"batch": batch, "length": length, "samples": samples, "steps": EVERY},
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "optimizers": {name: measuring.summary(c) for name, c in candidates.items()},
        "ratio_to_plain": {
            name: measuring.ratio(times, seconds[PLAIN]) for name, times in seconds.items()
        },
        "ftp_to_tpgm": measuring.ratio(seconds[FTP], seconds[TPGM]),
        "seldom_to_each": measuring.ratio(seconds[SELDOM], seconds[TPGM]),
    }


def table(result: dict[str, Any]) -> str:
    """The result as plain text."""
    settings, versus, seldom = result["settings"], result["ftp_to_tpgm"], result["seldom_to_each"]

    def row(*cells: str) -> str:
        return f"{cells[0]:<20}" + "".join(f"{cell:>18}" for cell in cells[1:])

    lines = [
        *reporting.header(result["environment"]),
        f"model     the demo's, {result['parameters']:,} parameters, float32; batches of "
        f"{settings['batch']} x {settings['length']} tokens",
        f"samples   {settings['samples']} of each in turn, {settings['steps']} steps per sample",
        "",
        row("", "step [ms]", "quartiles", "ratio to plain", "quartiles", "temporaries [MB]"),
    ]
    for name, measured in result["optimizers"].items():
        step, ratio = measured["step_seconds"], result["ratio_to_plain"][name]
        lines.append(
            row(
                name,
                f"{1e3 * step['median']:.0f}",
                reporting.quartiles(step, 1e3, digits=0),
                f"{ratio['median']:.2f}",
                reporting.quartiles(ratio),
                reporting.megabytes(measured["temporary_bytes"], digits=0),
            )
        )
    return "\n".join(
        [
            *lines,
            "",
            f"An FTP step takes {1 - versus['median']:.0%} less time than a TPGM step (ratio "
            f"{versus['median']:.2f}, quartiles {reporting.quartiles(versus)}).",
            f"Learning on every {EVERY}th step takes {1 - seldom['median']:.0%} less time than on "
            f"each (ratio {seldom['median']:.2f}, quartiles {reporting.quartiles(seldom)}).",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the arguments, measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.radii", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--batch", type=reporting.count, default=16, help="texts in a batch")
    add("--length", type=reporting.count, default=32, help="tokens in a text")
    add("--samples", type=reporting.count, default=8, help="timings of each optimizer")
    reporting.run(parser, argv, compare, table)


if __name__ == "__main__":
    main()
