"""What a layer report costs, in training steps: ``python -m benchmarks.report_cost``.

``layer_report`` with a state that holds the anchor, beside whole training steps with ``adam_spd``,
in turn in one process: the demo's model (16 x 32 tokens) and a ViT-B/16 (8 images), random weights.
It counts the programs that reports after the first compile: there should be none.
"""

import argparse
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import optax_spd
from benchmarks import measuring, radii, reporting, vit

EVERY = 100  # steps between two reports, in the figure for a run

Tree = Any


def models(scale: str, batch: int, length: int, images: int) -> dict[str, tuple[Tree, Any, Tree]]:
    """By name: parameters, loss, and one batch."""
    size = vit.SCALES[scale]
    shape = (images, *vit.image_shape(size))
    drawn = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
    anchor, _, _ = vit.make_trees(size, 0.5)
    return {
        "demo": (radii.make_params(), radii.loss_fn, radii.make_batch(batch, length, seed=1)),
        scale: (anchor, lambda params, x: vit.loss(params, x, size), drawn),
    }


class Compilations(logging.Handler):
    """Counts the programs that JAX compiles, while ``jax.log_compiles`` is on."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """One more, if the message says so."""
        self.count += record.getMessage().startswith("Compiling")


@contextlib.contextmanager
def compilations() -> Iterator[Compilations]:
    """Counts the programs compiled inside."""
    counted, logger = Compilations(), logging.getLogger("jax")
    logger.addHandler(counted)
    try:
        with jax.log_compiles(True):
            yield counted
    finally:
        logger.removeHandler(counted)


def measure(params: Tree, loss: Callable[..., jax.Array], batch: Tree, samples: int) -> Any:
    """Times steps and reports in turn; each report is of new parameters and a new state."""
    tx = optax_spd.adam_spd(radii.LEARNING_RATE)
    one = measuring.make_candidate(tx, params, params, measuring.whole_step(tx, loss))
    measuring.compile_step(one, batch)
    measuring.take_steps(one, 1, batch)
    steps: list[float] = []
    reports: list[float] = []
    compiled: list[int] = []
    for sample in range(1 + samples):  # the first compiles
        step_seconds = measuring.take_steps(one, 1, batch)
        with compilations() as counted:
            start = time.perf_counter()
            report = optax_spd.layer_report(one.params, state=one.state)
            report_seconds = time.perf_counter() - start
        compiled.append(counted.count)
        if sample == 0:
            first = report_seconds
        else:
            steps.append(step_seconds)
            reports.append(report_seconds)
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "layers": len(report.rows),
        "step_seconds": measuring.spread(steps),
        "report_seconds": measuring.spread(reports),
        "first_report_seconds": first,
        "ratio": measuring.ratio(reports, steps),
        "compiled_by_first_report": compiled[0],
        "compiled_by_later_reports": sum(compiled[1:]),
    }


def compare(*, scale: str, batch: int, length: int, images: int, samples: int) -> dict[str, Any]:
    """Measures everything the table shows, as JSON values."""
    before = reporting.environment()
    measured = {
        name: measure(params, loss, examples, samples)
        for name, (params, loss, examples) in models(scale, batch, length, images).items()
    }
    settings = {"batch": batch, "length": length, "images": images, "samples": samples}
    return {"environment": before, "settings": settings, "models": measured}


def table(result: dict[str, Any]) -> str:
    """The result as plain text."""
    settings = result["settings"]
    lines = [
        *reporting.header(result["environment"]),
        f"batches   {settings['batch']} x {settings['length']} tokens, {settings['images']} "
        f"images; {settings['samples']} steps and reports in turn",
    ]
    for name, found in result["models"].items():
        report, ratio = found["report_seconds"], found["ratio"]
        lines += [
            "",
            f"{name}: {found['parameters']:,} parameters, {found['layers']} layers",
            f"  step {1e3 * found['step_seconds']['median']:.0f} ms, report "
            f"{1e3 * report['median']:.0f} ms ({reporting.quartiles(report, 1e3, digits=0)}), the "
            f"first {found['first_report_seconds']:.1f} s",
            f"  a report costs {ratio['median']:.3f} steps ({reporting.quartiles(ratio, digits=3)})"
            f"; every {EVERY} steps that is {ratio['median'] / EVERY:.3%} of the run",
            f"  programs compiled: {found['compiled_by_first_report']} by the first report, "
            f"{found['compiled_by_later_reports']} by the others",
        ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the arguments, measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report_cost", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--scale", choices=vit.SCALES, default="vit-b16", help="size of the ViT")
    add("--batch", type=reporting.count, default=16, help="texts in a batch")
    add("--length", type=reporting.count, default=32, help="tokens in a text")
    add("--images", type=reporting.count, default=8, help="images in a batch")
    add("--samples", type=reporting.count, default=10, help="timings of each")
    reporting.run(parser, argv, compare, table)


if __name__ == "__main__":
    main()
