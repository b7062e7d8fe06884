"""FSDP on eight devices: parameters and optimizer state are split, saved with Orbax, and resumed.

On a laptop they are virtual ones. docs/pod.md has more.
"""

import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_spd
from examples.clients import digits
from examples.clients.population import apply, loss_fn

tx = optax_spd.adam_spd(3e-3, weight_decay=2.0)


def place(tree: Any, mesh: Any) -> Any:
    """Splits each array's first axis that the mesh divides; all else is whole on every device."""

    def sharding(x: Any) -> NamedSharding:
        split = [axis for axis, size in enumerate(x.shape) if size % mesh.size == 0][:1]
        return NamedSharding(mesh, P(*("fsdp" if a in split else None for a in range(x.ndim))))

    return jax.tree.map(sharding, tree)


def main(steps: int = 200) -> dict[str, Any]:
    data = digits.load()
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    by_rows = NamedSharding(mesh, P("fsdp"))
    pretrained = jax.device_put(data.pretrained, place(data.pretrained, mesh))
    shapes = jax.eval_shape(tx.init, pretrained)
    where = place(pretrained, mesh), place(shapes, mesh)
    start = pretrained, jax.jit(tx.init, out_shardings=where[1])(pretrained)

    @jax.jit
    def step(run: Any, batch: Any) -> Any:
        params, state = run
        updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
        new = optax.apply_updates(params, updates), state
        return jax.lax.with_sharding_constraint(new, where)

    def train(run: Any, batches: list[digits.Batch]) -> Any:
        for batch in batches:
            # Virtual devices can wait for each other forever if several steps are under way.
            run = jax.block_until_ready(step(run, jax.device_put(batch, by_rows)))
        return run

    batches = digits.batches(data.train, steps)
    params, state = straight = train(start, batches)
    with tempfile.TemporaryDirectory() as directory, ocp.StandardCheckpointer() as checkpointer:
        path = pathlib.Path(directory) / "half"
        checkpointer.save(path, train(start, batches[: steps // 2]))
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, start)
        restored = checkpointer.restore(path, abstract)
    optax_spd.check_state(restored[1], restored[0])
    resumed = train(restored, batches[steps // 2 :])

    kernel = optax.tree.get(state, "anchor")["hidden"]["kernel"]
    same = map(np.array_equal, jax.tree.leaves(straight), jax.tree.leaves(resumed))
    result = {
        "noisy": digits.accuracy(apply(params, data.noisy["image"]), data.noisy),
        "distance": optax_spd.layer_report(params, state=state).total,
        "anchor_shard": kernel.addressable_shards[0].data.shape,
        "restart_equal": all(same),
    }
    print("  ".join(f"{key} {value}" for key, value in result.items()))
    return result


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
