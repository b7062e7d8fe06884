"""Bytes a parameter that training takes: ``python -m benchmarks.memory``.

Counted from the buffers that exist for a ViT's tree in float32, each once: parameters, gradients,
and the optimizer's state after ``init``. What a step needs besides is not in it (``step_time``).
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_spd
from benchmarks import measuring, reporting, vit

LEARNING_RATE = 1e-3
EMBEDDING = optax_spd.path_mask(*optax_spd.DEFAULT_EMBEDDING_PATTERNS)
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adamw": lambda: optax.adamw(LEARNING_RATE),
    "sgd_freeze_embed": lambda: optax_spd.sgd_freeze_embed(LEARNING_RATE),
    "sgd_freeze_embed, no momentum": lambda: optax_spd.sgd_freeze_embed(
        LEARNING_RATE, momentum=None
    ),
    "with_frozen(adamw, embedding)": lambda: optax_spd.with_frozen(
        optax.adamw(LEARNING_RATE), EMBEDDING
    ),
    "adam + temp_balance": lambda: optax.chain(optax.adam(LEARNING_RATE), optax_spd.temp_balance()),
    "adamw + layerwise_lr_decay": lambda: optax.chain(
        optax.adamw(LEARNING_RATE), optax_spd.layerwise_lr_decay(0.75, r"block_(\d+)")
    ),
    "adam_spd": lambda: optax_spd.adam_spd(LEARNING_RATE),
    "adam_spd, bfloat16 anchor": lambda: optax_spd.adam_spd(
        LEARNING_RATE, anchor_dtype=jnp.bfloat16
    ),
    "adam_tpgm": lambda: optax_spd.adam_tpgm(LEARNING_RATE),
    "adam_ftp": lambda: optax_spd.adam_ftp(LEARNING_RATE),
}


def compare(*, scale: str) -> dict[str, Any]:
    """Counts everything the table shows, as JSON values."""
    before = reporting.environment()
    anchor, _, _ = vit.make_trees(vit.SCALES[scale], fire=0)
    params = jax.tree.map(jnp.asarray, anchor)
    grads = jax.tree.map(jnp.ones_like, params)
    parameters = sum(x.size for x in jax.tree.leaves(params))
    training = {}
    for name, make in OPTIMIZERS.items():
        state = make().init(params)
        training[name] = {
            "state": measuring.distinct_bytes(state) / parameters,
            "training": measuring.distinct_bytes((params, grads, state)) / parameters,
        }
        del state  # before the next one is made
    return {
        "environment": before,
        "settings": {"scale": scale},
        "parameters": parameters,
        "frozen": 1 - sum(measuring.distinct_bytes(x) for x in _trained(params)) / 4 / parameters,
        "bytes_per_parameter": training,
    }


def _trained(params: Any) -> list[jax.Array]:
    frozen = jax.tree.leaves(EMBEDDING(params))
    return [
        x for x, is_frozen in zip(jax.tree.leaves(params), frozen, strict=True) if not is_frozen
    ]


def table(result: dict[str, Any]) -> str:
    """The result as plain text."""
    lines = [
        *reporting.header(result["environment"]),
        f"tree      {result['settings']['scale']}: {result['parameters']:,} parameters, float32, "
        f"{result['frozen']:.1%} of them in the embedding",
        "",
        f"{'bytes a parameter':<32}{'state':>10}{'with parameters and gradients':>32}",
    ]
    for name, counted in result["bytes_per_parameter"].items():
        lines.append(f"{name:<32}{counted['state']:>10.2f}{counted['training']:>32.2f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the arguments, counts, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--scale", choices=vit.SCALES, default="vit-b16", help="size of the ViT")
    reporting.run(parser, argv, compare, table)


if __name__ == "__main__":
    main()
