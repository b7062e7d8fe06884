"""The examples inside other people's trainers run, and show what they promise.

Those whose packages are not installed are skipped. ``make test-clients`` installs all but MaxText's
many ones: examples/clients/maxtext_anchor.py says how.
"""

import importlib
import os
from pathlib import Path
from typing import Any

import pytest

os.environ["KERAS_BACKEND"] = "jax"  # heeded when Keras is first imported


def run(name: str, *packages: str, **options: Any) -> Any:
    for package in packages:
        pytest.importorskip(package)
    return importlib.import_module(f"examples.clients.{name}").main(**options)


def test_equinox() -> None:
    found = run("equinox_mlp")
    assert found["spd"]["distance"] < found["adam"]["distance"]
    assert found["spd"]["noisy"] > 0.8
    assert found["restart_equal"]


def test_fsdp_is_split_and_resumes_to_the_bit() -> None:
    found = run("fsdp")
    assert found["noisy"] > 0.8
    assert found["anchor_shard"] == (8, 64)
    assert found["restart_equal"]


def test_a_population_trains_as_its_members_alone() -> None:
    found = run("population")
    assert len(found["members"]) == 8
    assert found["apart"] < 1e-3
    plain, *pulled = found["members"][4:]
    assert all(member["distance"] < plain["distance"] for member in pulled)


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    found = run("tensorboard_log", "tensorboardX", logdir=str(tmp_path))
    assert any(tmp_path.iterdir())
    assert found["scalars"]["layers/total"] > 0
    assert "layers/hidden/kernel/spd_fired" in found["scalars"]


@pytest.mark.parametrize("use_qwix", [False, True])
def test_lora_holds_no_anchor(use_qwix: bool) -> None:
    packages = ("qwix",) if use_qwix else ("tunix",)  # minutes: only with the clients
    found = run("nnx_lora", *packages, use_qwix=use_qwix)
    assert found["spd"]["distance"] < found["adam"]["distance"]
    # Beside Adam's two moments there are a few numbers per layer.
    assert 0 < found["spd"]["state_bytes"] - found["adam"]["state_bytes"] < 1000
    assert found["spd"]["movie"] > found["before"]["movie"]


@pytest.mark.parametrize("kind", ["spd", "chain", "ftp", "lora"])
def test_tunix_runs_unchanged_and_restarts_to_the_bit(kind: str) -> None:
    found = run("tunix_peft", "tunix", kinds=(kind,))
    assert found[kind]["noisy"] > 0.8
    assert found[kind]["restart_equal"]


def test_kauldron() -> None:
    found = run("kauldron_config", "kauldron")
    assert found["noisy"] > 0.75
    assert found["frozen"]
    assert found["restart_equal"]


def test_haiku_names_its_layers() -> None:
    found = run("haiku_mlp", "haiku")
    assert found["layers"] == ["hidden/b", "hidden/w", "output/b", "output/w"]
    assert found["spd"]["distance"] < found["adam"]["distance"]
    assert found["spd"]["noisy"] > 0.8
    assert found["restart_equal"]


def test_penzai_runs_unchanged() -> None:
    found = run("penzai_mlp", "penzai")
    assert found["layers"] == [f"{index}/data_array" for index in range(4)]
    assert found["spd"]["distance"] < found["adam"]["distance"]
    assert found["spd"]["noisy"] > 0.8
    assert found["restart_equal"]


def test_keras_variables_get_their_names() -> None:
    found = run("keras_loop", "keras")
    names = ["hidden/bias", "hidden/kernel", "output/bias", "output/kernel"]
    assert found["layers"] == [f"mlp/{name}" for name in names]
    assert found["spd"]["distance"] < found["adam"]["distance"]
    assert found["spd"]["noisy"] > 0.8
    assert found["restart_equal"]


def test_maxtext_needs_set_anchor() -> None:
    found = run("maxtext_anchor", "maxtext")
    assert found["before_set_anchor"] > 1
    assert found["layers"] == 3 * 9 + 3
    assert found["restart_equal"]


def test_tpgm_learns_only_with_validation_data() -> None:
    with pytest.warns(UserWarning, match="got no validation data"):
        found = run("tpgm_in_trainer")
    without = found["tpgm without validation data"]
    assert without["distance"] < 0.2 * found["tpgm"]["distance"]
    assert found["tpgm"]["distance"] < found["adam"]["distance"]
    assert found["tpgm"]["noisy"] > without["noisy"] + 0.05


def test_each_is_short() -> None:
    for path in Path(importlib.import_module("examples.clients").__file__ or "").parent.glob(
        "*.py"
    ):
        assert len(path.read_text().splitlines()) <= 80, path.name
