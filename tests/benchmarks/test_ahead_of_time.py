"""The benchmark of steps compiled ahead of time, with the one compiler that is always there."""

import dataclasses
import json
import os
import pathlib
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec as P

from benchmarks import ahead_of_time, memory, vit

# Counts and per-layer vectors are bytes too, of a tree as small as these tests'.
SMALL = 0.06


def test_a_run_counts_the_bytes_of_one_devices_share(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_blocks = dataclasses.replace(vit.SCALES["small"], depth=0)
    monkeypatch.setitem(vit.SCALES, "small", without_blocks)
    file = tmp_path / "result.json"
    sizes = ["cpu", "cpu", "--scale", "small", "--devices", "2"]
    ahead_of_time.main([*sizes, "--only", "adam_spd", memory.HOST, "--json", str(file)])
    result = json.loads(file.read_text())
    text = capsys.readouterr().out
    assert text.strip() == ahead_of_time.table(result)
    own, counted = result["parameters_of_one_device"], result["optimizers"]
    assert result["parameters"] / 2 < own < 0.6 * result["parameters"]
    assert [*counted] == [
        name
        for name in (memory.BASELINE, "adam_spd", memory.HOST)
        if name not in result["left_out"]
    ]
    exact = {memory.BASELINE: (16, 28), "adam_spd": (20, 32), memory.HOST: (16, 28)}
    for name, found in counted.items():
        arguments, least_moved = exact[name]
        step = found["step"]
        assert step["arguments"] / own == pytest.approx(arguments, abs=SMALL), name
        # Addresses of the results; the parameters in new buffers would be 4 bytes each.
        assert step["outputs"] - step["aliased"] < own, name
        assert found["moved"] / own >= least_moved, name
        assert found["temporaries_in_main_memory"] <= step["temporaries"], name
        assert step["host_peak"] == (4 * own if name == memory.HOST else 0), name
    assert counted[memory.BASELINE]["collectives"] == {}
    (all_reduce,) = counted["adam_spd"]["collectives"].items()
    assert all_reduce[0] == "all-reduce"
    assert len(all_reduce[1]) == 1
    ratio = counted["adam_spd"]["moved"] / counted[memory.BASELINE]["moved"]
    row = next(line for line in text.splitlines() if line.startswith("adam_spd "))
    assert row.split()[-6] == f"{ratio:.2f}"
    assert row.endswith(f"1 all-reduce ({all_reduce[1][0]:,} B)")


def test_an_optimizer_is_compared_with_the_first() -> None:
    assert next(iter(ahead_of_time.OPTIMIZERS)) == memory.BASELINE
    assert {memory.HOST, memory.ZERO, ahead_of_time.CHAIN} < set(ahead_of_time.OPTIMIZERS)


@pytest.mark.parametrize(
    ("shape", "devices", "spec"),
    [
        ((8, 16), 2, P(None, "data")),
        ((16, 8), 2, P("data")),
        ((8, 8), 2, P("data")),
        ((15, 8), 4, P(None, "data")),
        ((4, 4, 3, 8), 8, P(None, None, None, "data")),
        ((15, 9), 2, P()),
        ((16,), 2, P()),
        ((), 2, P()),
        ((8, 16), 1, P()),
    ],
)
def test_arrays_are_split_along_the_longest_axis_that_divides(
    shape: tuple[int, ...], devices: int, spec: P
) -> None:
    assert ahead_of_time.spec_of(shape, devices) == spec


def test_a_share_is_what_one_device_holds() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    arrays = {"kernel": jnp.ones((8, 16), jnp.bfloat16), "bias": jnp.ones(16)}
    tree = ahead_of_time.placed(arrays, mesh)
    assert ahead_of_time.share(tree) == (8 * 4 + 16, 2 * 8 * 4 + 4 * 16)


def refuse(error: Exception) -> Any:
    def get_topology_desc(*args: Any, **kwargs: Any) -> Any:
        raise error

    return SimpleNamespace(get_topology_desc=get_topology_desc)


@pytest.mark.parametrize(
    ("platform", "topology", "error", "message"),
    [
        ("tpu", "v5e:2x2", RuntimeError("none"), 'for tpu here (none): pip install "jax[tpu]"'),
        ("cuda", "h100", NotImplementedError("none"), 'pip install "jax[cuda12]"'),
        ("tpu", "v5e:7x9", jax.errors.JaxRuntimeError("odd"), "topology 'v5e:7x9': odd"),
    ],
)
def test_a_missing_compiler_and_a_wrong_topology_are_told_apart(
    platform: str, topology: str, error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_libtpu_variables(monkeypatch)
    monkeypatch.setattr(ahead_of_time, "topologies", refuse(error))
    with pytest.raises(SystemExit) as raised:
        ahead_of_time.main([platform, topology, "--scale", "small"])
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cuda", "z80"], "for cuda the topology is one of ['h100'], got 'z80'"),
        (["cpu", "h100"], "for cpu the topology is one of ['cpu'], got 'h100'"),
        (["cpu", "cpu", "--devices", "99"], "set JAX_NUM_CPU_DEVICES=99"),
    ],
)
def test_devices_that_do_not_exist_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as raised:
        ahead_of_time.main([*arguments, "--scale", "small"])
    assert message in str(raised.value)


def without_libtpu_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ahead_of_time.LIBTPU:
        monkeypatch.setenv(name, "")  # so that what the benchmark sets is undone after the test
        monkeypatch.delenv(name)


def test_the_variables_that_libtpu_reads_are_set_unless_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_libtpu_variables(monkeypatch)
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v4-8")
    found: dict[str, str] = {}

    def get_topology_desc(*args: Any) -> Any:
        found.update({name: os.environ[name] for name in ahead_of_time.LIBTPU})
        return SimpleNamespace(devices=["first", "second"])

    topologies = SimpleNamespace(get_topology_desc=get_topology_desc)
    monkeypatch.setattr(ahead_of_time, "topologies", topologies)
    assert ahead_of_time.devices_of("tpu", "v5e:2x2", 1) == ["first"]
    assert found == ahead_of_time.LIBTPU | {"TPU_ACCELERATOR_TYPE": "v4-8"}


def test_a_backend_that_tells_nothing_is_shown_as_unknown() -> None:
    counted = {
        "step": None,
        "temporaries_in_main_memory": 5,
        "moved": 280,
        "collectives": {},
        "compile_seconds": 2.0,
    }
    result = {
        "environment": dict.fromkeys(("device", "cpu", "cores", "jax", "jaxlib", "optax"), "")
        | {"load_average": 0.0, "optax_spd": ""},
        "settings": {"platform": "cpu", "topology": "cpu", "devices": 1, "scale": "small"},
        "device_kind": "cpu",
        "parameters": 10,
        "parameters_of_one_device": 10,
        "left_out": {memory.HOST: "it does not work here"},
        "optimizers": {memory.BASELINE: counted},
    }
    text = ahead_of_time.table(result)
    row = next(line for line in text.splitlines() if line.startswith(memory.BASELINE))
    assert row.split()[1:] == [*["unknown"] * 3, "0.50", "28.00", "1.00", "2.0", "none"]
    assert f"Left out: {memory.HOST}: it does not work here." in text
