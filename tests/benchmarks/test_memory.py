"""The benchmark of memory: what it counts is what the buffers hold, and what XLA's account says."""

import json
import pathlib
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax_support import host_memory_works

from benchmarks import measuring, memory

# Counts and per-layer vectors are bytes too, of a tree as small as these tests'.
SMALL = 0.06


def test_a_run_counts_the_bytes_of_training(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    memory.main(["--scale", "small", "--json", str(file)])
    result = json.loads(file.read_text())
    assert capsys.readouterr().out.strip() == memory.table(result)
    counted = result["bytes_per_parameter"]
    assert [*counted] == [name for name in memory.OPTIMIZERS if name not in result["left_out"]]
    assert result["largest_array"] == pytest.approx(4 * 32 * 128 / result["parameters"])
    frozen = result["frozen"]
    assert 0.1 < frozen < 0.5
    exact = {
        memory.BASELINE: 16,
        "sgd_freeze_embed": 12 - 4 * frozen,
        "sgd_freeze_embed, no momentum": 8,
        "with_frozen(adamw, embedding)": 16 - 8 * frozen,
        "adam + temp_balance": 16,
        "adamw + layerwise_lr_decay": 16,
        "adam_spd": 20,
        "adam_spd, bfloat16 anchor": 18,
        memory.HOST: 16,
        memory.ZERO: 16,
        "adam_tpgm": 20,
        "adam_ftp": 24,
    }
    assert set(exact) == set(memory.OPTIMIZERS)
    unread = {name: 4 * frozen for name in exact if "freeze" in name or "frozen" in name}
    for name, found in counted.items():
        step = found["step"]
        on_host = 4 if name == memory.HOST else 0
        assert found["training"] == pytest.approx(exact[name], abs=SMALL), name
        assert found["state"] == pytest.approx(exact[name] - 8, abs=SMALL), name
        assert found["state_on_host"] == step["host_peak"] == on_host, name
        # The frozen arrays' gradients are not read.
        assert step["arguments"] == pytest.approx(exact[name] - unread.get(name, 0), abs=SMALL)
        # All that is as large as the parameters is written into what was donated.
        assert step["outputs"] - step["aliased"] < SMALL, name
        whole = step["arguments"] + step["outputs"] - step["aliased"] + step["temporaries"]
        assert step["peak"] == pytest.approx(whole), name
    assert counted[memory.BASELINE]["step"]["temporaries"] < SMALL
    text = memory.table(result)
    assert f"{counted['adam_spd']['step']['peak']:.2f}" in text
    assert (memory.HOST in counted) == ("counts arguments in host memory" in text)


def test_the_anchor_is_in_host_memory_where_that_works() -> None:
    assert (memory.host_memory_missing() is None) == host_memory_works()


def account(device: tuple[int, ...], host: tuple[int, ...]) -> Any:
    """A compiled step with these sizes in XLA's account."""
    names = ("argument", "output", "alias", "temp")
    found = {f"{n}_size_in_bytes": size for n, size in zip(names, device, strict=True)}
    found |= {f"host_{n}_size_in_bytes": size for n, size in zip(names, host, strict=True)}
    return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**found))


@pytest.mark.parametrize(
    ("device", "host", "misplaced"),
    [((100, 50, 48, 7), (0, 0, 0, 0), 20), ((80, 30, 28, 7), (20, 20, 20, 0), 0)],
    ids=["counted_as_the_devices", "counted_as_the_hosts"],
)
def test_arguments_in_host_memory_are_not_the_devices(
    device: tuple[int, ...], host: tuple[int, ...], misplaced: int
) -> None:
    step = memory.step_memory(account(device, host), host_bytes=20)
    assert step is not None
    assert step["peak"] == 80 + 2 + 7
    assert step["host_peak"] == 20
    assert step["misplaced"] == misplaced


def test_a_backend_that_tells_nothing_is_shown_as_unknown() -> None:
    assert memory.step_memory(SimpleNamespace(memory_analysis=lambda: None), 0) is None
    counted = {"state": 8.0, "state_on_host": 0.0, "training": 16.0, "step": None}
    result = {
        "environment": dict.fromkeys(("device", "cpu", "cores", "jax", "jaxlib", "optax"), "")
        | {"load_average": 0.0, "optax_spd": ""},
        "settings": {"scale": "small"},
        "parameters": 10,
        "largest_array": 1.0,
        "frozen": 0.1,
        "left_out": {memory.HOST: "it does not work here"},
        "bytes_per_parameter": {memory.BASELINE: counted, memory.ZERO: counted},
    }
    text = memory.table(result)
    row = next(line for line in text.splitlines() if line.startswith(memory.BASELINE))
    assert row.split()[1:] == ["8.00", "0.00", "16.00", *["unknown"] * 4]
    assert f"Left out: {memory.HOST}: it does not work here." in text


def test_bytes_are_split_by_memory_kind() -> None:
    on_host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    tree = {"device": jnp.ones(3), "host": jax.device_put(jnp.ones(5), on_host)}
    assert measuring.bytes_by_memory(tree) == (12, 20)
    assert measuring.bytes_by_memory(tree["device"]) == (12, 0)
