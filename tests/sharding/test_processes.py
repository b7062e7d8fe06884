"""Two processes with four devices each train as one process does, and save for one process."""

import os
import pathlib
import socket
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import processes_worker as worker
from jax.sharding import AxisType, SingleDeviceSharding

SECONDS = worker.SECONDS + 10
STEPS = len(worker.SIGNS)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_together(commands: list[list[str]], folder: pathlib.Path) -> None:
    """Runs commands side by side; when one fails, or time is up, all of them are ended."""
    kept = {name: x for name, x in os.environ.items() if not name.lower().endswith("_proxy")}
    environment = kept | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    logs = [folder / f"log_{i}.txt" for i in range(len(commands))]
    processes: list[subprocess.Popen[bytes]] = []
    deadline = time.monotonic() + SECONDS
    try:
        for command, log in zip(commands, logs, strict=True):
            with log.open("wb") as written:
                processes.append(
                    subprocess.Popen(
                        command, stdout=written, stderr=subprocess.STDOUT, env=environment
                    )
                )
        codes: list[int | None] = [None]
        while None in codes and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.05)
            codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    told = "\n---\n".join(log.read_text(errors="replace")[-4000:] for log in logs)
    assert codes == [0] * len(codes), told


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # An exponent is one over a mean of logarithms: eigenvalues' last digits count for more.
        rtol = 1e-4 if "temp_balance" in key.rpartition("/")[2] else 1e-5
        np.testing.assert_allclose(found[key], value, rtol=rtol, atol=5e-6, err_msg=key)


def on_one_device(name: str) -> dict[str, np.ndarray]:
    """The same run, unsharded: the final parameters, and what the stages decided at each step."""
    params = jax.tree.map(jnp.array, worker.PRETRAINED)
    state = worker.begin(name, params)
    params, _, seen = worker.train(name, params, state, worker.PULL, range(STEPS))
    for field, decided in seen.items():  # the run means something
        assert len(np.unique(decided, axis=0)) > 1, field
        assert len(np.unique(decided, axis=1)) > 1, field
    return jax.device_get(params) | seen


def restored(folder: pathlib.Path, name: str, place: Any) -> Any:
    """Parameters and state; the structure comes from init, the numbers from the checkpoint."""
    tx = worker.OPTIMIZERS[name]
    shapes = jax.eval_shape(lambda params: (params, tx.init(params)), worker.PRETRAINED)
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, place
    )
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / name, target)


def goes_on(name: str, params: Any, state: Any, pull: Any) -> dict[str, np.ndarray]:
    params, state, seen = worker.train(name, params, state, pull, range(worker.STOP, STEPS))
    return jax.device_get(params) | seen


def test_two_processes_are_one(tmp_path: pathlib.Path) -> None:
    port = str(free_port())
    run_together(
        [
            [sys.executable, worker.__file__, port, str(process_id), str(tmp_path)]
            for process_id in range(worker.PROCESSES)
        ],
        tmp_path,
    )
    reports = [dict(np.load(tmp_path / f"{i}.npz")) for i in range(worker.PROCESSES)]
    jax.tree.map(np.testing.assert_array_equal, *reports)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    here = SingleDeviceSharding(jax.devices()[0])
    for name in worker.OPTIMIZERS:
        expected = on_one_device(name)
        found = {key: x for key, x in reports[0].items() if key.startswith(f"{name}/")}
        assert_same(found, {f"{name}/{key}": x for key, x in expected.items()})

        # What both processes saved half way, one process restores, and goes on with.
        rest = {key: x if key in worker.SHAPES else x[worker.STOP :] for key, x in expected.items()}
        split = worker.split(mesh, name)
        whole = jax.tree.map(lambda _: here, split)
        saved = restored(tmp_path, name, whole)
        on_mesh = restored(tmp_path, name, split)
        jax.tree.map(np.testing.assert_array_equal, on_mesh, saved)
        worker.check_placement(on_mesh, split)
        # (On a mesh in one process: tests/compat/test_orbax.py.)
        assert_same(goes_on(name, *saved, worker.PULL), rest)
