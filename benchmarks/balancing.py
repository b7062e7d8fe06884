"""Cost and accuracy of TempBalance's spectra: ``python -m benchmarks.balancing``.

Three updates of a ViT's parameters alternate in one process: Adam; Adam with TempBalance on a step
that is not due; and on a step that is due, which computes the spectra of all weights. Then a whole
training step of the same ViT with Adam (loss and gradient on random images) gives the spectra's
share of a run at ``every=100``. Last, the exponents of all weights in float32 are compared with
those in float64, for random weights or, with ``--weights minilm``, for the demo's pretrained
encoder.
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_spd
from benchmarks import measuring, reporting, vit
from examples.demo import assets
from examples.demo.minilm import load_encoder
from optax_spd.methods.temp_balance import power_law

Tree = Any

LEARNING_RATE = 1e-6
EVERY = 100
PLAIN, BETWEEN, DUE = "adam", "temp_balance, not due", "temp_balance, due"
NEVER = 2**30  # updates after the first
FITS = power_law.FITS


def load_minilm() -> Tree:
    """The weights of the demo's encoder, downloaded unless they are in its cache."""
    weights, _ = assets.fetch(assets.MINILM, assets.cache_directory(), print)
    return load_encoder(weights)


def updates_of(params: Tree, samples: int, min_eigenvalues: int) -> dict[str, measuring.Candidate]:
    """The three updates, timed."""
    stages = {
        PLAIN: optax.identity(),
        BETWEEN: optax_spd.temp_balance(every=NEVER, min_eigenvalues=min_eigenvalues),
        DUE: optax_spd.temp_balance(every=1, min_eigenvalues=min_eigenvalues),
    }
    candidates = {
        name: measuring.make_candidate(
            optax.chain(optax.adam(LEARNING_RATE), stage), params, params
        )
        for name, stage in stages.items()
    }
    grads = jax.tree.map(lambda x: jnp.full_like(x, 1e-3), params)
    # The very first step, on which spectra are always computed, is part of the warm-up.
    measuring.measure([*candidates.values()], grads, samples=samples, steps=1, compilations=1)
    return candidates


def training_seconds(scale: vit.Scale, params: Tree, batch: int, samples: int) -> list[float]:
    """Whole training steps with Adam."""
    tx = optax.adam(LEARNING_RATE)
    step = measuring.whole_step(tx, lambda params, images: vit.loss(params, images, scale))
    candidate = measuring.make_candidate(tx, params, params, step)
    images = jax.random.normal(jax.random.key(0), (batch, *vit.image_shape(scale)))
    measuring.measure([candidate], images, samples=samples, steps=1, compilations=1, warm_up=1)
    return candidate.step_seconds


def errors_of(params: Tree) -> dict[str, float]:
    """The largest error of α in float32 for each fit, over all weight matrices."""
    weights = [
        np.asarray(leaf, np.float32)
        for leaf in jax.tree.leaves(params)
        if leaf.ndim == 2 and min(leaf.shape) > 2
    ]

    def alphas(dtype: type, fit: power_law.FitMethod) -> np.ndarray:
        return np.array(
            [float(optax_spd.power_law_alpha(w.astype(dtype), fit=fit)) for w in weights]
        )

    found = {fit: alphas(np.float32, fit) for fit in FITS}
    jax.config.update("jax_enable_x64", True)
    try:
        exact = {fit: alphas(np.float64, fit) for fit in FITS}
    finally:
        jax.config.update("jax_enable_x64", False)
    return {fit: float(np.max(np.abs(found[fit] - exact[fit]))) for fit in FITS}


def compare(*, scale: str, weights: str, batch: int, samples: int) -> dict[str, Any]:
    """Measures everything that the table shows, as JSON values."""
    before = reporting.environment()
    size = vit.SCALES[scale]
    anchor, _, _ = vit.make_trees(size, fire=0)
    params = jax.tree.map(jnp.asarray, anchor)
    candidates = updates_of(params, samples, min(50, size.width))
    seconds = {name: c.step_seconds for name, c in candidates.items()}
    balanced = optax.tree.get(candidates[DUE].state, "temp_balance_alpha")
    taking = [d - b for d, b in zip(seconds[DUE], seconds[BETWEEN], strict=True)]
    training = training_seconds(size, params, batch, max(1, samples // 4))
    recomputation, step = statistics.median(taking), statistics.median(training)
    return {
        "environment": before,
        "settings": {"scale": scale, "weights": weights, "batch": batch, "samples": samples},
        "tree": {
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
            "weights": int(np.sum(np.asarray(balanced) > 0)),
        },
        "updates": {name: measuring.summary(c) for name, c in candidates.items()},
        "recomputation_seconds": measuring.spread(taking),
        "between_to_plain": measuring.ratio(seconds[BETWEEN], seconds[PLAIN]),
        "training_step_seconds": measuring.spread(training),
        "share_of_training": recomputation / (EVERY * step + recomputation),
        "errors": errors_of(load_minilm() if weights == "minilm" else params),
    }


def table(result: dict[str, Any]) -> str:
    """The result as plain text."""
    settings, tree, taking = result["settings"], result["tree"], result["recomputation_seconds"]
    ratio, training = result["between_to_plain"], result["training_step_seconds"]

    def row(*cells: str) -> str:
        return f"{cells[0]:<24}" + "".join(f"{cell:>18}" for cell in cells[1:])

    lines = [
        *reporting.header(result["environment"]),
        f"tree      {settings['scale']}: {tree['parameters']:,} parameters, spectra of "
        f"{tree['weights']} weights, float32",
        f"samples   {settings['samples']} of each update in turn",
        "",
        row("", "update [ms]", "quartiles", "temporaries [MB]"),
    ]
    for name, measured in result["updates"].items():
        step = measured["step_seconds"]
        lines.append(
            row(
                name,
                f"{1e3 * step['median']:.1f}",
                reporting.quartiles(step, 1e3, digits=1),
                reporting.megabytes(measured["temporary_bytes"], digits=0),
            )
        )
    lines += [
        "",
        f"Taking the spectra once: {taking['median']:.2f} s (quartiles "
        f"{reporting.quartiles(taking)}). An update that does not takes {ratio['median']:.2f} "
        f"(quartiles {reporting.quartiles(ratio)}) of Adam's time.",
        f"A training step on {settings['batch']} images: {training['median']:.2f} s. At "
        f"every={EVERY} the spectra are {result['share_of_training']:.2%} of the training time.",
        "",
        f"Largest error of α in float32, weights: {settings['weights']}",
        *(row(fit, f"{error:.1e}") for fit, error in result["errors"].items()),
    ]
    return "\n".join(line.rstrip() for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the arguments, measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.balancing", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--scale", choices=vit.SCALES, default="vit-b16", help="size of the ViT")
    add("--weights", choices=("random", "minilm"), default="random", help="for the errors")
    add("--batch", type=reporting.count, default=8, help="images in a training batch")
    add("--samples", type=reporting.count, default=8, help="timings of each update")
    reporting.run(parser, argv, compare, table)


if __name__ == "__main__":
    main()
