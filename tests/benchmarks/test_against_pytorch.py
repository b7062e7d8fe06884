"""The comparison with PyTorch: the JAX side, the arithmetic, and a whole run where torch is."""

import importlib.util
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_spd
from benchmarks import against_pytorch, one_optimizer, reporting, vit
from benchmarks.one_optimizer import JAX_SPD, RUNS, TORCH_SPD

TINY = vit.Scale(8, 16, 0, 2, 5, 3)


def fake_round(slower: float) -> dict[str, dict[str, Any]]:
    """What the processes of one round might print; the median step of the n-th takes n seconds."""
    return {
        name: {
            "seconds": [slower * n, slower * 0.5 * n, slower * 9 * n],
            "fired": 0.5 if "spd" in name.lower() else None,
        }
        for n, name in enumerate(RUNS, start=1)
    }


def test_without_pytorch_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match=r"^benchmarks.against_pytorch .*: pip install torch$"):
        against_pytorch.main(["--scale", "small"])


def test_the_process_for_jax_times_the_steps_asked_for(tmp_path: pathlib.Path) -> None:
    assert len(against_pytorch.save_trees(tmp_path, TINY)) == 8
    arguments = ["--learning-rate=1e-6", "--steps=3", "--warm-up=1"]
    found = against_pytorch.run_child(JAX_SPD, tmp_path, 1, *arguments)
    assert (found["version"], found["device"], found["fired"]) == (jax.__version__, "cpu", 0.5)
    assert [seconds > 0 for seconds in found["seconds"]] == [True] * 3


def test_jax_steps_on_the_multiples_of_the_gradients(tmp_path: pathlib.Path) -> None:
    against_pytorch.save_trees(tmp_path, TINY)
    names = (one_optimizer.ANCHOR, one_optimizer.PARAMS, one_optimizer.GRADS)
    anchor, params, grads = (one_optimizer.load_arrays(tmp_path, name) for name in names)
    after = one_optimizer.stepped(RUNS[JAX_SPD](JAX_SPD, tmp_path, 1e-3), grads, (1.0, -0.5))
    tx = optax_spd.adam_spd(1e-3)
    state, update = tx.init(anchor), jax.jit(tx.update)
    for factor in (1.0, -0.5):
        scaled = [jnp.asarray(grad * np.float32(factor)) for grad in grads]
        updates, state = update(scaled, state, params)
        params = optax.apply_updates(params, updates)
    for ours, expected in zip(after, params, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-7)


def test_ratios_are_of_the_medians_of_a_round() -> None:
    # The second round is slower throughout, which no ratio shows.
    found = against_pytorch.summarize([fake_round(1), fake_round(3)])
    for n, measured in enumerate(found.values(), start=1):
        # PyTorch's AdamSPD is the second.
        assert measured["ratio"] == pytest.approx(dict.fromkeys(measured["ratio"], n / 2))
        seconds = [n, 0.5 * n, 9 * n, 3 * n, 1.5 * n, 27 * n]
        assert measured["step_seconds"]["median"] == pytest.approx(np.median(seconds))
    result = {
        "environment": reporting.environment() | {"torch": "1.2.3"},
        "settings": {"scale": "small", "rounds": 2, "steps": 3, "warm_up": 1, "threads": 2},
        "tree": {"arrays": 20, "parameters": 16778},
        "checks": [],
        "optimizers": found,
    }
    rows = {x[:28].strip(): x[28:].split() for x in against_pytorch.table(result).splitlines()}
    assert rows[JAX_SPD] == ["2250.0", "1125.0-7500.0", "0.50", "0.50-0.50", "50%"]


def test_differences_are_found_and_refused() -> None:
    before = np.zeros(3, np.float32)
    after = {name: np.array([0.1, -0.2, 0.0], np.float32) for name in RUNS}
    same = against_pytorch.compared(JAX_SPD, TORCH_SPD, before, after)
    assert same["largest_difference"] == 0
    assert same["largest_move"] == pytest.approx(0.2)
    for wrong in (1e-4, np.nan):
        after[TORCH_SPD] = after[JAX_SPD] + np.array([0, 0, wrong], np.float32)
        other = against_pytorch.compared(JAX_SPD, TORCH_SPD, before, after)
        with pytest.raises(SystemExit, match="adam_spd and AdamSPD in plain PyTorch differ by"):
            against_pytorch.refuse_differences([same, other])


if importlib.util.find_spec("torch") is not None:

    def test_a_run_with_pytorch(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "result.json"
        sizes = ["--scale", "small", "--rounds", "1", "--steps", "2", "--warm-up", "1"]
        against_pytorch.main([*sizes, "--json", str(file)])
        result = json.loads(file.read_text())
        assert capsys.readouterr().out.strip() == against_pytorch.table(result)
        assert result["optimizers"][JAX_SPD]["fired"] == 0.5
        assert result["optimizers"][TORCH_SPD]["fired"] == 0.5
        for found in result["checks"]:
            assert found["largest_difference"] < 1e-6 < found["largest_move"]
