"""Every benchmark runs on a tiny input and counts right. Never how long anything takes."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import pytest

from benchmarks import (
    ahead_of_time,
    balancing,
    measuring,
    memory,
    overhead,
    radii,
    report_cost,
    scaling,
    step_time,
    vit,
)
from examples.demo import minilm

Run = Callable[..., dict[str, Any]]
# Counts and per-layer vectors are bytes too, of trees as small as these.
SMALL = 0.1
# Bytes a parameter of the state beside Adam's 8: the anchor, and FTP's last deviation.
STATE = {"adamw": 8, "adam_ftp": 16, "chain(adam, ftp)": 16}


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ViT of 8 arrays, and the demo's encoder without blocks."""
    monkeypatch.setitem(vit.SCALES, "small", dataclasses.replace(vit.SCALES["small"], depth=0))
    sizes = {"VOCABULARY": 40, "POSITIONS": 16, "HIDDEN": 24, "INNER": 48, "BLOCKS": 0}
    for name, size in sizes.items():
        monkeypatch.setattr(minilm, name, size)
    monkeypatch.setattr(radii, "VOCABULARY", sizes["VOCABULARY"])


@pytest.fixture
def run(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a benchmark and returns the JSON it wrote; the printed table is that of the JSON."""

    def run(benchmark: ModuleType, *arguments: str) -> dict[str, Any]:
        file = tmp_path / "result.json"
        benchmark.main([*arguments, "--json", str(file)])
        result: dict[str, Any] = json.loads(file.read_text())
        assert capsys.readouterr().out.strip() == benchmark.table(result)
        return result

    return run


def test_step_time_compares_all_recipes_and_chains(run: Run) -> None:
    sizes = ["--scale", "small", "--samples", "2", "--steps", "2", "--compilations", "1"]
    result = run(step_time, *sizes, "--recipe", "all")
    found = result["optimizers"]
    assert [*found] == ["adamw", *measuring.RECIPES]
    assert set(step_time.NUMBERS_MOVED) == set(found)
    for name, optimizer in found.items():
        assert optimizer["state_bytes_per_parameter"] == STATE.get(name, 12), name
        assert optimizer["share_of_layers_fired"] == (0.5 if "spd" in name else None), name
    assert found["adamw"]["time_ratio"]["median"] == 1
    rows = {x[:36].strip(): x[36:].split() for x in step_time.table(result).splitlines()}
    spd, ftp = "1.14-1.71", "1.43-2.14"  # 8/7-12/7, 10/7-15/7
    assert rows["ratio by bytes that must move"] == ["1.00", *[spd] * 4, ftp, ftp, "1.14"]
    assert rows["must move [bytes/parameter]"][:2] == ["28", "32-48"]
    rate = 28 * result["tree"]["parameters"] / found["adamw"]["step_seconds"]["median"] / 1e9
    assert rows["that is [GB/s]"][0] == f"{rate:.1f}"


def test_spd_fires_in_the_share_of_layers_asked_for(run: Run) -> None:
    sizes = ["--scale", "small", "--samples", "2", "--compilations", "1"]
    found = run(step_time, *sizes, "--fire", "1")["optimizers"]
    assert [*found] == ["adamw", "adam_spd"]
    assert found["adam_spd"]["share_of_layers_fired"] == 1
    assert found["adam_spd"]["share_of_parameters_in_them"] == 1


def test_scaling_measures_its_sweeps_and_draws_them(run: Run, tmp_path: pathlib.Path) -> None:
    picture = tmp_path / "result.png"
    assert len(scaling.shapes_of((300, 3_000_000))) == 300
    assert set(scaling.shapes_of((300, 3_000_000)).values()) == {(100, 100)}
    result = run(scaling, "--quick", "--samples", "2", "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    for name, sizes in scaling.QUICK_SWEEPS.items():
        points = result["sweeps"][name]
        assert [(p["arrays"], p["parameters"]) for p in points] == sizes
        for point in points:
            adamw, spd = (point["optimizers"][name] for name in ("adamw", "adam_spd"))
            assert spd["share_of_layers_fired"] == 0.5
            cpu = [one["ready_cpu_seconds"]["median"] for one in (adamw, spd)]
            assert point["ready_cpu_ratio"]["median"] == pytest.approx(cpu[1] / cpu[0])
    assert result["trace_cpu_ratio"].keys() == scaling.TRACED.keys()


def test_memory_counts_the_bytes_of_training(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # It refuses a tree without blocks.
    monkeypatch.delitem(memory.OPTIMIZERS, "adamw + layerwise_lr_decay")
    result = run(memory, "--scale", "small")
    counted, frozen = result["bytes_per_parameter"], result["frozen"]
    assert [*counted] == [name for name in memory.OPTIMIZERS if name not in result["left_out"]]
    exact = dict.fromkeys(memory.OPTIMIZERS, 16) | {
        **{name: 8 + STATE.get(name, 12) for name in measuring.RECIPES},
        "sgd_freeze_embed": 12 - 4 * frozen,
        "sgd_freeze_embed, no momentum": 8,
        "with_frozen(adamw, embedding)": 16 - 8 * frozen,
        "adam_spd, bfloat16 anchor": 18,
        "with_sparse(adam, 0.05)": 8.6,
        "with_sparse(adam_spd, 0.05)": 8.8,
    }
    for name, found in counted.items():
        step, on_host = found["step"], 4 if name == memory.HOST else 0
        assert found["training"] == pytest.approx(exact[name], abs=SMALL), name
        assert found["state"] == pytest.approx(exact[name] - 8, abs=SMALL), name
        assert found["state_on_host"] == step["host_peak"] == on_host, name
        unread = 4 * frozen if "freeze" in name or "frozen" in name else 0  # their gradients
        assert step["arguments"] == pytest.approx(exact[name] - unread, abs=SMALL), name
        # All that is as large as the parameters is written into what was donated. XLA counts a
        # pointer to each output, of which with_sparse has most.
        assert step["outputs"] - step["aliased"] < 1.5 * SMALL, name


def test_ahead_of_time_counts_the_bytes_of_one_devices_share(run: Run) -> None:
    optimizers = ["adam_spd", memory.HOST]
    result = run(
        ahead_of_time, "cpu", "cpu", "--scale", "small", "--devices", "2", "--only", *optimizers
    )
    own, counted = result["parameters_of_one_device"], result["optimizers"]
    assert result["parameters"] / 2 < own < 0.6 * result["parameters"]
    bytes_of_arguments = {memory.BASELINE: 16, "adam_spd": 20, memory.HOST: 16}
    for name, found in counted.items():
        step, expected = found["step"], bytes_of_arguments[name]
        assert step["arguments"] / own == pytest.approx(expected, abs=SMALL), name
        # Addresses of the results; the parameters in new buffers would be 4 bytes each.
        assert step["outputs"] - step["aliased"] < own, name
        assert step["host_peak"] == (4 * own if name == memory.HOST else 0), name
        assert found["moved"] / own >= (32 if name == "adam_spd" else 28), name
    assert counted[memory.BASELINE]["collectives"] == {}
    assert [len(all_of) for all_of in counted["adam_spd"]["collectives"].values()] == [1]


def test_radii_compares_training_steps(run: Run) -> None:
    result = run(radii, "--batch", "2", "--length", "8", "--samples", "2")
    assert [*result["optimizers"]] == [radii.PLAIN, radii.FTP, radii.TPGM, radii.SELDOM]
    assert result["ratio_to_plain"][radii.PLAIN]["median"] == 1


def test_overhead_is_a_share_of_a_training_step(run: Run) -> None:
    result = run(overhead, "--batch", "2", "--length", "8", "--samples", "2", "--updates", "3")
    step, added = result["step_seconds"]["adam"]["median"], result["added_seconds"]["median"]
    assert result["share"]["median"] == pytest.approx(added / step)


def test_a_later_report_compiles_nothing(run: Run) -> None:
    sizes = ["--batch", "2", "--length", "8", "--images", "2", "--samples", "2"]
    result = run(report_cost, "--scale", "small", *sizes)
    for found in result["models"].values():
        assert found["compiled_by_first_report"] > 0
        assert found["compiled_by_later_reports"] == 0
        assert found["layers"] > 5


def test_balancing_takes_spectra_and_compares_exponents(run: Run) -> None:
    result = run(balancing, "--scale", "small", "--batch", "2", "--samples", "2")
    assert result["tree"]["weights"] == 2  # embeddings of patches (48 eigenvalues) and positions
    assert all(0 < error < 2e-3 for error in result["errors"].values())
    taking, step = (result[k]["median"] for k in ("recomputation_seconds", "training_step_seconds"))
    share = taking / (balancing.EVERY * step + taking)
    assert result["share_of_training"] == pytest.approx(share)
    assert not jax.config.jax_enable_x64
