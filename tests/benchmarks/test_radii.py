"""The benchmark of learned radii, on a small model: what it counts and writes, not the times."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import optax
import pytest

from benchmarks import measuring, radii
from examples.demo import minilm

SIZES = {"VOCABULARY": 40, "POSITIONS": 16, "HIDDEN": 24, "INNER": 48, "BLOCKS": 0}


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in SIZES.items():
        monkeypatch.setattr(minilm, name, size)
    monkeypatch.setattr(radii, "VOCABULARY", SIZES["VOCABULARY"])


def test_a_run_writes_what_its_table_shows(
    small_model: None, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    radii.main(["--batch", "2", "--length", "8", "--samples", "2", "--json", str(file)])
    result: dict[str, Any] = json.loads(file.read_text())
    text = capsys.readouterr().out
    assert text.strip() == radii.table(result)
    assert list(result["optimizers"]) == [radii.PLAIN, radii.FTP, radii.TPGM, radii.SELDOM]
    assert result["settings"] == {"batch": 2, "length": 8, "samples": 2, "steps": radii.EVERY}
    assert result["environment"]["jax"] == jax.__version__
    assert result["ratio_to_plain"][radii.PLAIN]["median"] == 1
    for name, measured in result["optimizers"].items():
        step = measured["step_seconds"]
        assert 0 < step["lower_quartile"] <= step["median"] <= step["upper_quartile"]
        ratio = result["ratio_to_plain"][name]["median"]
        assert f"{ratio:.2f}" in next(x for x in text.splitlines() if x.startswith(f"{name} "))
    assert f"{1 - result['ftp_to_tpgm']['median']:.0%} less time than a TPGM step" in text
    assert f"{result['parameters']:,} parameters" in text


def test_tpgm_learns_as_often_as_its_name_says(small_model: None) -> None:
    params = radii.make_params()
    batch = radii.make_batch(2, 8, seed=1)
    validation = jax.tree.map(lambda x: x[None], radii.make_batch(2, 8, seed=2))
    learned: dict[str, list[bool]] = {}
    for name in (radii.TPGM, radii.SELDOM):
        tx = radii.make_optimizers()[name]
        step = jax.jit(radii.training_step(tx, validates=True))
        candidate = measuring.make_candidate(tx, params, params, step)
        learned[name] = []
        for _ in range(3):
            before = optax.tree.get(candidate.state, "radius_state")
            candidate.params, candidate.state = step(
                candidate.params, candidate.state, batch, validation
            )
            after = optax.tree.get(candidate.state, "radius_state")
            counts = [int(optax.tree.get(state, "count")) for state in (before, after)]
            learned[name].append(counts[1] == counts[0] + 1)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(candidate.params))
    assert learned == {radii.TPGM: [True] * 3, radii.SELDOM: [True, False, False]}


def test_wrong_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        radii.main(["--samples", "0"])
    assert "at least 1 is needed, got 0" in capsys.readouterr().err
