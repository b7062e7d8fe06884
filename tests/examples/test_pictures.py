"""The demo's pictures show the numbers they are given, and the sketch is computed."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text

from examples.demo import data, pictures, scores
from examples.demo.minilm import BLOCKS

REPOSITORY = Path(__file__).parents[2]
KERNELS = [f"block_{b}/{kernel}/kernel" for b in range(BLOCKS) for kernel in pictures.KERNELS]
TABLES = [f"{table}/embedding" for table in pictures.TABLES]
PATHS = [*TABLES, *KERNELS]


def score(accuracy, deviation=0.01, radius=None):
    radii = None if radius is None else {f"encoder/{path}": radius for path in PATHS}
    domains = dict.fromkeys(data.OUT_OF_DISTRIBUTION, accuracy) | {data.IN_DISTRIBUTION: 0.8}
    return scores.Score(
        accuracy=domains,
        auc=domains,
        correct={domain: np.ones(100, bool) for domain in domains},
        distance=1.0,
        relative_distance=0.1,
        deviation=dict.fromkeys(PATHS, deviation),
        seconds=1.0,
        radii=radii,
        relative_radii=radii,
    )


def texts(labels):
    return [label.get_text() for label in labels]


@pytest.mark.parametrize("seeds", [1, 3])
def test_bars_of_accuracies_are_what_the_label_says(seeds):
    results = {
        "adam": [score(0.5 + 0.1 * seed) for seed in range(seeds)],
        "spd": [score(0.7)] * seeds,
    }
    figure = pictures.accuracy_picture(results)
    inside, shifted = figure.axes
    assert texts(inside.get_yticklabels()) == ["Adam", "SPD"]
    bars = [bar.get_segments()[0] for bar in shifted.collections if hasattr(bar, "get_segments")]
    widths = [(right - left) / 2 for (left, _), (right, _) in bars]
    if seeds == 1:
        expected = [np.sqrt(p * (1 - p) / 100 / 3) for p in (0.5, 0.7)]
        assert "standard error" in figure.get_supxlabel()
    else:
        expected = [0.1, 0.0]
        assert "standard deviation over 3 training sets" in figure.get_supxlabel()
    np.testing.assert_allclose(widths, expected, atol=1e-12)


def test_pictures_have_no_background_and_no_black():
    results = {"adam": [score(0.7)], "tpgm": [score(0.7, radius=0.02)]}
    for draw in (pictures.accuracy_picture, pictures.deviation_picture, pictures.radius_picture):
        figure = pictures.on_any_page(draw(results))
        figure.canvas.draw()
        assert figure.patch.get_alpha() == 0
        assert not any(text.get_color() == "black" for text in figure.findobj(Text))


def test_radii_of_held_matrices_are_drawn_at_the_smallest_and_no_line_joins_blocks():
    results = {"adam": [score(0.7)], "tpgm": [score(0.7, radius=0.02)], "ftp": [score(0.7)]}
    results["ftp"] = [score(0.7, radius=1e-8)]
    (axes,) = pictures.radius_picture(results).axes
    heights = {float(y) for dots in axes.collections[::2] for y in dots.get_offsets()[:, 1]}
    assert heights == {0.02, pictures.SMALLEST_RADIUS}
    assert [text.get_text() for text in axes.texts] == ["TPGM", "FTP"]
    assert axes.lines == [] or len(axes.lines) == 0
    (empty,) = pictures.radius_picture({"adam": [score(0.7)]}).axes
    assert empty.get_title() == "No method of this run learns radii"


def test_the_sketch_is_computed_by_the_library(tmp_path, monkeypatch, capsys):
    picture = tmp_path / "path.png"
    monkeypatch.setattr(sys, "argv", ["path_sketch.py", str(picture)])
    found = runpy.run_path(str(REPOSITORY / "examples" / "path_sketch.py"))
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    adam, spd = capsys.readouterr().out.splitlines()
    assert adam.endswith("pulled back in 0 of 250 steps")
    ends = {name: np.asarray(found["train"](tx)[0][-1]) for name, tx in found["runs"].items()}
    losses = {name: float(found["shifted_loss"](end)) for name, end in ends.items()}
    assert losses["SPD"] < 0.6 * losses["Adam"]
    assert f"shifted {losses['SPD']:.2f}" in spd
