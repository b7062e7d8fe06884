"""Two processes with four devices each train as one process does, and save for one process."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import contract_methods
import jax
import numpy as np
import orbax.checkpoint as ocp
import processes_worker as worker
from contract_runs import PRETRAINED, STOP, assert_close, jitted, reference, run
from jax.sharding import SingleDeviceSharding

SECONDS = worker.SECONDS + 10


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
    here = SingleDeviceSharding(jax.devices()[0])
    for name in worker.NAMES:
        params, _, seen = reference(name)
        leaves, structure = jax.tree.flatten((params, seen))
        found = [reports[0][f"{name}/{i}"] for i in range(len(leaves))]
        assert_close(structure.unflatten(found), (params, seen), rtol=1e-4)

        # What both processes saved half way, one process restores, and goes on with.
        init = contract_methods.optimizer(name).init
        shapes = jax.eval_shape(lambda init=init: (PRETRAINED, init(PRETRAINED)))
        target = jax.tree.map(lambda x: x.update(sharding=here), shapes)
        with ocp.StandardCheckpointer() as checkpointer:
            saved = checkpointer.restore(tmp_path / name, target)
        end, _, rest = run(name, jitted(name), *saved, start=STOP)
        assert_close(end, params, rtol=1e-4)
        assert_close(rest, {field: x[STOP:] for field, x in seen.items()}, rtol=1e-4)
