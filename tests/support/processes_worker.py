"""One of the processes of test_processes.py: trains on all of their devices, saves, and reports.

Run as ``python processes_worker.py PORT PROCESS_ID FOLDER``. The test imports it too, for what it
compares with.
"""

import faulthandler
import functools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import optax_spd

PROCESSES, DEVICES_EACH = 2, 4
# After so long a process shows where it hangs and ends, even if the test that started it is gone.
SECONDS = 240

# FSDP: every array is split over all devices, on one axis or another, but for a small one.
SHAPES = {"bias": (16,), "blocks": (2, 16, 8), "head": (24, 8), "scale": (5,)}
SPECS = {"bias": P("x"), "blocks": P(None, "x"), "head": P(None, "x"), "scale": P()}
STACKED = optax_spd.stacked("blocks")
OPTIMIZERS = {
    "spd and others": optax_spd.chain(
        optax_spd.l2_sp(0.1),
        optax.adam(0.1),
        optax_spd.temp_balance(every=3, min_eigenvalues=8, layers=STACKED),
        optax_spd.spd(1.0, anchor_dtype=jnp.bfloat16, layers=STACKED),
    ),
    "adam_ftp": optax_spd.adam_ftp(0.1, k=0.5, radius_learning_rate=0.1, layers=STACKED),
    "adam_tpgm": optax_spd.adam_tpgm(
        0.1, radius_optimizer=optax.adam(0.2), norm="l2", layers=STACKED
    ),
}
# The gradients turn round, and momentum does so later: that is when SPD acts.
SIGNS = (1.0, 1.0, -1.0, -1.0, -1.0, 1.0, 1.0, -1.0)
STOP = 4
FIELDS = ("spd_ratio", "ftp_radii", "tpgm_radii", "temp_balance_alpha", "temp_balance_scale")


def arrays(seed: int) -> dict[str, np.ndarray]:
    """Like the parameters, and the same in every process."""
    draw = np.random.default_rng(seed)
    return {name: draw.normal(size=s).astype(np.float32) for name, s in SHAPES.items()}


PRETRAINED, PULL = arrays(0), arrays(1)


def validation_loss(params: Any, batch: Any) -> jax.Array:
    losses = [jnp.sum((params[name] - batch[name]) ** 2) for name in SHAPES]
    return jnp.sum(jnp.stack(losses))


@functools.cache
def step_of(name: str) -> Any:
    """A jitted step that uses up parameters and state."""
    tx = OPTIMIZERS[name]

    def step(params: Any, state: Any, pull: Any, sign: Any) -> Any:
        extra: Any = {}
        if name == "adam_tpgm":
            batches = jax.tree.map(lambda x: jnp.stack([x, -x / 2]), pull)
            extra = {"validation_fn": validation_loss, "validation_batches": batches}
        grads = jax.tree.map(lambda x: sign * x, pull)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def train(name: str, params: Any, state: Any, pull: Any, steps: range) -> Any:
    """Trains on; parameters, state, and what the stages decided at each step."""
    seen: dict[str, list[np.ndarray]] = {}
    for index in steps:
        params, state = step_of(name)(params, state, pull, SIGNS[index])
        for field in FIELDS:
            vector = optax.tree.get(state, field)
            if vector is not None:
                seen.setdefault(field, []).append(np.array(vector))
    return params, state, {field: np.stack(vectors) for field, vectors in seen.items()}


def begin(name: str, params: Any, place: Any = None) -> Any:
    """The state before the first step, by each of the ways that people make one.

    Args:
      name: of the optimizer.
      params: the parameters.
      place: the state's shardings, if there are any.
    """
    tx = OPTIMIZERS[name]
    if name == "adam_ftp":
        return tx.init(params)  # not jitted
    state = jax.jit(tx.init, out_shardings=place)(params)
    if name == "spd and others":
        # The pretrained weights come late, in host memory, and each process has all of them.
        return optax_spd.set_anchor(state, {name: 0.9 * x for name, x in PRETRAINED.items()})
    return state


def sharded(mesh: Mesh, tree: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Each process makes the shards that its devices hold."""

    def made(name: str) -> jax.Array:
        whole = tree[name]
        sharding = NamedSharding(mesh, SPECS[name])
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return {name: made(name) for name in tree}


def split(mesh: Mesh, name: str) -> tuple[Any, Any]:
    """The shardings of parameters and state: what is like a parameter lies where that does."""
    tx = OPTIMIZERS[name]
    params = {key: NamedSharding(mesh, spec) for key, spec in SPECS.items()}
    state = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, PRETRAINED),
        params,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )
    return params, state


def check_placement(tree: Any, wanted: Any) -> None:
    """Every array lies where it should, so nothing as large as the parameters is everywhere."""
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(wanted), strict=True
    ):
        where = f"{jax.tree_util.keystr(path)}: {leaf.sharding}, not {sharding}"
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), where


def main(port: str, process_id: int, folder: pathlib.Path) -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES_EACH)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, process_id)
    assert jax.process_count() == PROCESSES
    mesh = jax.make_mesh((PROCESSES * DEVICES_EACH,), ("x",), axis_types=(AxisType.Auto,))
    pull = sharded(mesh, PULL)
    report: dict[str, np.ndarray] = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for name in OPTIMIZERS:
            params, place = sharded(mesh, PRETRAINED), split(mesh, name)
            state = begin(name, params, place[1])
            params, state, before = train(name, params, state, pull, range(STOP))
            check_placement((params, state), place)
            # Written in the background while training goes on, in the same buffers.
            checkpointer.save(folder / name, (params, state))
            params, state, after = train(name, params, state, pull, range(STOP, len(SIGNS)))
            check_placement((params, state), place)
            whole = multihost_utils.process_allgather(params, tiled=True)
            report |= {f"{name}/{key}": np.asarray(whole[key]) for key in SHAPES}
            report |= {f"{name}/{f}": np.concatenate([before[f], after[f]]) for f in before}
        checkpointer.wait_until_finished()
    np.savez(folder / f"{process_id}.npz", **report)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]))
