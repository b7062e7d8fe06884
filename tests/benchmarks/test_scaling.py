"""The benchmark of scaling: what it builds, writes and draws. Never how long anything takes."""

import argparse
import json
import pathlib
import sys
from typing import Any

import numpy as np
import pytest

from benchmarks import reporting, scaling

PNG = b"\x89PNG\r\n\x1a\n"


def test_a_run_writes_what_its_table_shows_and_draws_it(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / f"result.{name}" for name in ("json", "png")}
    sizes = ["--quick", "--samples", "2"]
    scaling.main([*sizes, "--json", str(files["json"]), "--plot", str(files["png"])])
    result: dict[str, Any] = json.loads(files["json"].read_text())
    text = capsys.readouterr().out
    assert text.strip() == scaling.table(result)
    assert files["png"].read_bytes().startswith(PNG)
    assert result["settings"] == {"quick": True, "samples": 2, "compilations": 1}
    for name, sizes_of in scaling.QUICK_SWEEPS.items():
        points = result["sweeps"][name]
        assert [(p["arrays"], p["parameters"]) for p in points] == sizes_of
        for point in points:
            assert list(point["optimizers"]) == ["adamw", "adam_spd"]
            spd = point["optimizers"]["adam_spd"]
            assert spd["share_of_layers_fired"] == 0.5
            assert spd["state_bytes_per_parameter"] == 12
            assert spd["ready_seconds"]["median"] == pytest.approx(
                spd["trace_seconds"] + spd["compile_seconds"]
            )
            assert f"{point['ready_ratio']['median']:.2f}" in text
    last = result["sweeps"]["arrays"][-1]
    assert f"{last['arrays']} arrays takes {last['ready_ratio']['median']:.2f} of adamw" in text


def test_full_sweeps_change_one_thing_at_a_time() -> None:
    arrays, parameters = scaling.SWEEPS["arrays"], scaling.SWEEPS["parameters"]
    assert [size[0] for size in arrays] == [10, 100, scaling.GOAL_ARRAYS]
    assert len({size[1] for size in arrays}) == 1
    assert [size[1] for size in parameters] == [10**6, 10**7, 10**8]
    assert len({size[0] for size in parameters}) == 1


@pytest.mark.parametrize("size", scaling.SWEEPS["arrays"] + scaling.SWEEPS["parameters"])
def test_trees_have_the_arrays_and_about_the_parameters_asked_for(size: scaling.Size) -> None:
    shapes = scaling.shapes_of(size)
    assert len(shapes) == size[0]
    assert sum(map(np.prod, shapes.values())) == pytest.approx(size[1], rel=0.01)
    assert sorted(shapes) == list(shapes)  # the order that JAX gives a dictionary's arrays


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "at least 1 is needed, got 0"),
        (["--compilations", "x"], "invalid count value: 'x'"),
        (["--plot", "no/such/folder/file.png"], "there is no folder 'no/such/folder'"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        scaling.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_drawing_without_matplotlib_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        scaling.main(["--plot", str(tmp_path / "file.png")])
    assert "pip install matplotlib" in capsys.readouterr().err


def test_benchmarks_without_a_picture_have_no_such_option(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = argparse.ArgumentParser()
    with pytest.raises(SystemExit):
        reporting.run(parser, ["--plot", "file.png"], dict, str)
    assert "unrecognized arguments: --plot" in capsys.readouterr().err
