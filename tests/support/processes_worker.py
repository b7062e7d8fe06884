"""One of the processes of test_processes.py: trains on all of their devices, saves, and reports.

Run as ``python processes_worker.py PORT PROCESS_ID FOLDER``. The runs are those of the contract
suite.
"""

import faulthandler
import pathlib
import sys
from typing import Any

import contract_methods
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from contract_runs import GRADS, PRETRAINED, STOP, jitted, run, state_like_params
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_spd

PROCESSES, DEVICES_EACH = 2, 4
# After so long a process shows where it hangs and ends, even if the test that started it is gone.
SECONDS = 240
NAMES = ("adam_spd, masked", "temp_balance", "adam_ftp", "adam_tpgm")
# FSDP: every array is split over all devices, on one axis or another, but for a small one.
SPECS = {
    "blocks": {"bias": P(), "kernel": P(None, "x")},
    "embed": {"embedding": P("x")},
    "head": {"kernel": P("x")},
}


def shardings(mesh: Any, name: str) -> tuple[Any, Any]:
    """Those of parameters and state: what is like a parameter lies where that does."""
    tx = contract_methods.optimizer(name)
    params = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    return params, state_like_params(tx, params, NamedSharding(mesh, P()))


def begin(name: str, params: Any, place: Any) -> Any:
    """The state before the first step, by each of the ways that people make one."""
    tx = contract_methods.optimizer(name)
    if name == "adam_ftp":
        return tx.init(params)  # not jitted
    state = jax.jit(tx.init, out_shardings=place)(params)
    if name == "adam_spd, masked":
        # The pretrained weights come late, in host memory, and each process has all of them.
        zeros = jax.tree.map(np.zeros_like, PRETRAINED)
        state = optax_spd.set_anchor(state, zeros, anchor_dtype=jnp.bfloat16)
        state = optax_spd.set_anchor(state, PRETRAINED)
    return state


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
    report: dict[str, np.ndarray] = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for name in NAMES:
            place, step = shardings(mesh, name), jitted(name)
            # Each process makes the shards that its devices hold.
            params = jax.tree.map(
                lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index]),
                PRETRAINED,
                place[0],
            )
            first = jax.tree.map(lambda g: g[:STOP], GRADS)
            params, state, before = run(name, step, params, begin(name, params, place[1]), first)
            check_placement((params, state), place)
            # Written in the background while training goes on, in the same buffers.
            checkpointer.save(folder / name, (params, state))
            params, state, after = run(name, step, params, state, start=STOP)
            check_placement((params, state), place)
            seen = {field: np.concatenate([before[field], after[field]]) for field in before}
            found = multihost_utils.process_allgather(params, tiled=True), seen
            report |= {f"{name}/{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(found))}
        checkpointer.wait_until_finished()
    np.savez(folder / f"{process_id}.npz", **report)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]))
