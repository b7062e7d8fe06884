"""The benchmark of memory: what it counts is what the buffers hold."""

import json
import pathlib

import pytest

from benchmarks import memory


def test_a_run_counts_the_bytes_of_training(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    memory.main(["--scale", "small", "--json", str(file)])
    result = json.loads(file.read_text())
    assert capsys.readouterr().out.strip() == memory.table(result)
    counted = {name: found["training"] for name, found in result["bytes_per_parameter"].items()}
    assert list(counted) == list(memory.OPTIMIZERS)
    frozen = result["frozen"]
    assert 0.1 < frozen < 0.5
    # Counts and per-layer vectors are bytes too, of a tree as small as this.
    exact = {
        "adamw": 16,
        "sgd_freeze_embed": 12 - 4 * frozen,
        "sgd_freeze_embed, no momentum": 8,
        "with_frozen(adamw, embedding)": 16 - 8 * frozen,
        "adam + temp_balance": 16,
        "adam_spd": 20,
        "adam_spd, bfloat16 anchor": 18,
        "adam_tpgm": 20,
        "adam_ftp": 24,
    }
    for name, expected in exact.items():
        assert counted[name] == pytest.approx(expected, abs=0.05), name
