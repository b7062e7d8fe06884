"""Memory of training, in bytes a parameter: ``python -m benchmarks.memory``.

Two measurements, for a ViT's tree in float32. First, the existing buffers: parameters, gradients,
and the optimizer's state after ``init``, in device and in host memory. Second, XLA's analysis of
the compiled step (``tx.update`` and ``optax.apply_updates`` in one jitted function that donates
parameters and state), whose peak is

    arguments + outputs - outputs written into donated arguments + temporaries

The arguments include the gradients, except those that the step does not read, such as a frozen
array's. No model runs, and TPGM gets no validation batch: the peaks are the optimizer's alone.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_spd
from benchmarks import measuring, reporting, vit

Tree = Any

LEARNING_RATE = 1e-3
EMBEDDING = optax_spd.path_mask(*optax_spd.DEFAULT_EMBEDDING_PATTERNS)
BASELINE, HOST, ZERO = (
    measuring.BASELINE,
    "adam_spd, anchor in host memory",
    'adam_spd, anchor "zero"',
)
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    BASELINE: lambda: optax.adamw(LEARNING_RATE),
    "sgd_freeze_embed": lambda: optax_spd.sgd_freeze_embed(LEARNING_RATE),
    "sgd_freeze_embed, no momentum": lambda: optax_spd.sgd_freeze_embed(
        LEARNING_RATE, momentum=None
    ),
    "with_frozen(adamw, embedding)": lambda: optax_spd.with_frozen(
        optax.adamw(LEARNING_RATE), EMBEDDING
    ),
    "with_sparse(adam, 0.05)": lambda: optax_spd.with_sparse(optax.adam(LEARNING_RATE), 0.05),
    "with_sparse(adam_spd, 0.05)": lambda: optax_spd.with_sparse(
        optax_spd.adam_spd(LEARNING_RATE), 0.05
    ),
    "adam + temp_balance": lambda: optax.chain(optax.adam(LEARNING_RATE), optax_spd.temp_balance()),
    "adamw + layerwise_lr_decay": lambda: optax.chain(
        optax.adamw(LEARNING_RATE), optax_spd.layerwise_lr_decay(0.75, r"block_(\d+)")
    ),
    **{
        name: functools.partial(recipe, LEARNING_RATE) for name, recipe in measuring.RECIPES.items()
    },
    "adam_spd, bfloat16 anchor": lambda: optax_spd.adam_spd(
        LEARNING_RATE, anchor_dtype=jnp.bfloat16
    ),
    HOST: lambda: optax_spd.adam_spd(LEARNING_RATE),
    ZERO: lambda: optax_spd.adam_spd(LEARNING_RATE, anchor="zero"),
}


def host_memory_missing() -> str | None:
    """Why an anchor cannot be kept in host memory here; None if it can."""
    device = jax.devices()[0]
    if "pinned_host" not in [memory.kind for memory in device.addressable_memories()]:
        return f"{device.platform} devices have no memory of the kind pinned_host"
    if device.platform == "cpu" and jax.__version_info__ < (0, 10, 2):
        return f"jax {jax.__version__} does not leave arrays there on CPU; 0.10.2 does"
    return None


def move_anchor_to_host(state: Tree, params: Tree) -> Tree:
    """The state with its anchor, here the parameters, in host memory."""
    on_host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    return optax_spd.set_anchor(state, jax.device_put(params, on_host))


def step_memory(compiled: Any, host_bytes: int) -> dict[str, int] | None:
    """XLA's memory analysis of a compiled step, in bytes; None if the backend has none.

    Args:
      compiled: the step.
      host_bytes: bytes of its arguments in host memory.

    Returns:
      For device memory: ``arguments``, ``outputs``, ``aliased`` (outputs that are written into
      donated arguments), ``temporaries`` and the ``peak``. For host memory: ``host_peak``. And
      ``misplaced``: the bytes of arguments in host memory that XLA attributes to the device, as its
      CPU backend does. ``arguments`` and the peaks are corrected for it.
    """
    found = compiled.memory_analysis()
    if found is None:
        return None
    misplaced = max(0, host_bytes - found.host_argument_size_in_bytes)
    arguments = found.argument_size_in_bytes - misplaced
    outputs, aliased = found.output_size_in_bytes, found.alias_size_in_bytes
    host_arguments = found.host_argument_size_in_bytes + misplaced
    host_outputs = found.host_output_size_in_bytes - found.host_alias_size_in_bytes
    return {
        "arguments": arguments,
        "outputs": outputs,
        "aliased": aliased,
        "temporaries": found.temp_size_in_bytes,
        "peak": arguments + outputs - aliased + found.temp_size_in_bytes,
        "host_peak": host_arguments + host_outputs + found.host_temp_size_in_bytes,
        "misplaced": misplaced,
    }


def count(name: str, params: Tree, grads: Tree) -> dict[str, Any]:
    """Both measurements for one optimizer, in bytes a parameter."""
    parameters = sum(x.size for x in jax.tree.leaves(params))
    candidate = measuring.make_candidate(OPTIMIZERS[name](), params, params)
    if name == HOST:
        candidate.state = move_anchor_to_host(candidate.state, params)
    state, state_on_host = measuring.bytes_by_memory(candidate.state)
    training = measuring.distinct_bytes((candidate.params, grads, candidate.state)) - state_on_host
    measuring.compile_step(candidate, grads)
    step = step_memory(candidate.step, state_on_host)
    return {
        "state": state / parameters,
        "state_on_host": state_on_host / parameters,
        "training": training / parameters,
        "step": None if step is None else {key: size / parameters for key, size in step.items()},
    }


def compare(*, scale: str) -> dict[str, Any]:
    """Measures everything that the table shows, as JSON values."""
    before = reporting.environment()
    anchor, _, _ = vit.make_trees(vit.SCALES[scale], fire=0)
    params = jax.tree.map(jnp.asarray, anchor)
    grads = jax.tree.map(jnp.ones_like, params)
    sizes = [x.size for x in jax.tree.leaves(params)]
    missing = host_memory_missing()
    return {
        "environment": before,
        "settings": {"scale": scale},
        "parameters": sum(sizes),
        "largest_array": max(x.nbytes for x in jax.tree.leaves(params)) / sum(sizes),
        "frozen": 1 - sum(x.size for x in _trained(params)) / sum(sizes),
        "left_out": {} if missing is None else {HOST: missing},
        "bytes_per_parameter": {
            name: count(name, params, grads)
            for name in OPTIMIZERS
            if name != HOST or missing is None
        },
    }


def _trained(params: Any) -> list[jax.Array]:
    frozen = jax.tree.leaves(EMBEDDING(params))
    return [
        x for x, is_frozen in zip(jax.tree.leaves(params), frozen, strict=True) if not is_frozen
    ]


def table(result: dict[str, Any]) -> str:
    """The result as plain text."""
    counted = result["bytes_per_parameter"]

    def row(label: str, *cells: str) -> str:
        return f"{label:<34}" + "".join(f"{cell:>13}" for cell in cells)

    lines = [
        *reporting.header(result["environment"]),
        f"tree      {result['settings']['scale']}: {result['parameters']:,} parameters, float32, "
        f"{result['frozen']:.1%} of them in the embedding",
        f"          its largest array takes {result['largest_array']:.2f} bytes a parameter of the "
        "tree",
        "",
        row("", "state", "state", "training", "step", "step", "step", "step"),
        row(
            "bytes a parameter",
            *("device", "host", "device", "new outputs", "temporaries", "peak", "peak, host"),
        ),
    ]
    for name, found in counted.items():
        cells = [f"{found[key]:.2f}" for key in ("state", "state_on_host", "training")]
        lines.append(row(name, *cells, *_step_cells(found["step"])))
    lines += [
        "",
        "training: parameters, gradients and state, from the buffers. step: XLA's account; new",
        "outputs are those not written into donated arguments, its peak counts the gradients too.",
    ]
    for name in (HOST, ZERO):
        if name in counted and counted[name]["step"] is not None:
            ratio = counted[name]["step"]["peak"] / counted[BASELINE]["step"]["peak"]
            lines.append(f"{name}: the step's peak on the device is {ratio:.3f} of {BASELINE}'s.")
    if any(found["step"] and found["step"]["misplaced"] for found in counted.values()):
        lines.append(
            "This backend counts arguments in host memory as the device's; the table gives them to "
            "the host."
        )
    lines += [f"Left out: {name}: {reason}." for name, reason in result["left_out"].items()]
    return "\n".join(line.rstrip() for line in lines)


def _step_cells(step: dict[str, float] | None) -> list[str]:
    if step is None:
        return ["unknown"] * 4
    return [
        f"{size:.2f}"
        for size in (
            step["outputs"] - step["aliased"],
            step["temporaries"],
            step["peak"],
            step["host_peak"],
        )
    ]


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
