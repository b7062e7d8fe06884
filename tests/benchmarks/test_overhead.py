"""The benchmark of SPD's share of a training step, on a small model: not the times."""

import json
import pathlib

import pytest

from benchmarks import overhead, radii
from examples.demo import minilm

SIZES = {"VOCABULARY": 40, "POSITIONS": 16, "HIDDEN": 24, "INNER": 48, "BLOCKS": 0}


def test_a_run_writes_what_its_table_shows(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, size in SIZES.items():
        monkeypatch.setattr(minilm, name, size)
    monkeypatch.setattr(radii, "VOCABULARY", SIZES["VOCABULARY"])
    file = tmp_path / "result.json"
    sizes = ["--batch", "2", "--length", "8", "--samples", "2", "--updates", "3"]
    overhead.main([*sizes, "--json", str(file)])
    result = json.loads(file.read_text())
    text = capsys.readouterr().out
    assert text.strip() == overhead.table(result)
    assert result["settings"] == {"batch": 2, "length": 8, "samples": 2, "updates": 3}
    assert list(result["step_seconds"]) == list(result["update_seconds"]) == ["adam", "adam_spd"]
    step = result["step_seconds"]["adam"]["median"]
    share, added = result["share"]["median"], result["added_seconds"]["median"]
    assert share == pytest.approx(added / step)
    assert f"{share:.2%} of a training step" in text
