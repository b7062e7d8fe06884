"""Pictures of reports: what is drawn, how it is labelled, and that nothing global changes."""

import itertools
import math
import subprocess
import sys
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

import optax_spd


def report_of(values: dict[str, float], **columns: list[float]) -> optax_spd.LayerReport:
    """A report of layers with these deviations from anchors of norm 2, and columns of the state."""
    rows = tuple(
        optax_spd.LayerRow(name, (2,), 2, 2.0, x, {key: of[i] for key, of in columns.items()})
        for i, (name, x) in enumerate(values.items())
    )
    return optax_spd.LayerReport(rows, math.hypot(*values.values()))


def labels(ax: Any) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


def cells(ax: Any) -> np.ma.MaskedArray:
    (mesh,) = ax.collections
    return mesh.get_array()


def marks(ax: Any) -> dict[str, list[tuple[float, float]]]:
    """The points drawn, by marker."""
    return {line.get_marker(): line.get_xydata().tolist() for line in ax.lines}


def test_a_heat_map_has_layers_in_natural_order_and_reports_by_step() -> None:
    reports = {
        200: report_of({"layer_10": 3.0, "layer_2": 4.0}),
        0: report_of({"layer_10": 0.0, "layer_2": 1.0}),
        100: report_of({"layer_10": 1.0, "layer_2": 2.0}),
    }
    ax = optax_spd.plot_layers(reports, "deviation")
    assert labels(ax) == ["layer_2", "layer_10"]
    np.testing.assert_array_equal(cells(ax), [[1, 2, 4], [0, 1, 3]])
    # The first layer is at the top; a column's borders are half way between the steps.
    assert ax.get_ylim() == (1.5, -0.5)
    (mesh,) = ax.collections
    assert mesh.get_coordinates()[0, :, 0].tolist() == [-50, 50, 150, 250]
    bar = mesh.colorbar.ax
    assert ax.get_xlabel() == "step"
    assert bar.get_ylabel() == "deviation  ‖θ - θ₀‖"
    assert len([x for x in bar.get_yticks() if 0 <= x <= 4]) >= 3
    relative = optax_spd.plot_layers(list(reports.values()))
    np.testing.assert_array_equal(cells(relative), [[2, 0.5, 1], [1.5, 0, 0.5]])
    assert relative.get_xlabel() == "report"


def test_colours_of_radii_are_logarithmic_and_small_ones_and_zeros_have_the_darkest() -> None:
    radii = [1.0, 0.1, 1e-8, 0.0, math.nan]
    names = {f"layer_{i}": 1.0 for i in range(5)}
    ax = optax_spd.plot_layers([report_of(names, ftp_radii=radii)], "ftp_radii")
    (mesh,) = ax.collections
    assert (mesh.norm.vmin, mesh.norm.vmax) == (0.01, 1.0)
    drawn = mesh.to_rgba(mesh.get_array())[:, 0]
    darkest, brightest = mesh.cmap(0.0), mesh.cmap(1.0)
    assert [tuple(x) for x in drawn[2:4]] == [darkest] * 2
    assert tuple(drawn[0]) == brightest
    assert tuple(drawn[4]) == (0.8, 0.8, 0.8, 1.0)
    assert mesh.colorbar.extend == "min"
    texts = [x.get_text() for x in mesh.colorbar.ax.get_yticklabels()]
    assert {"0.02", "0.1", "0.5"} <= set(texts)
    # Values alike, or all zero, have a linear scale from 0.
    (mesh,) = optax_spd.plot_layers([report_of({"a": 0.0, "b": 0.0})]).collections
    assert (mesh.norm.vmin, mesh.norm.vmax) == (0, 1)


def test_the_share_of_steps_that_fired_is_that_since_the_report_before() -> None:
    def at(*counts: int) -> optax_spd.LayerReport:
        return report_of({"a": 1.0, "b": 1.0}, spd_fired=[*counts])

    reports = {0: at(0, 0), 10: at(10, 0), 30: at(15, 20)}
    found = cells(optax_spd.plot_layers(reports, "fired_share"))
    np.testing.assert_array_equal(found[:, 1:], [[1, 0.25], [0, 1]])
    assert found.mask[:, 0].all()  # before step 0 there is none
    with pytest.raises(ValueError, match="needs the steps: pass a mapping"):
        optax_spd.plot_layers([at(0, 0)], "fired_share")
    with pytest.raises(ValueError, match="use plot_layers"):
        optax_spd.plot_report(at(0, 0), "fired_share")


def test_a_report_has_a_mark_a_layer_on_a_log_axis_with_numbers() -> None:
    values = {"layer_10": 0.6, "layer_2": 0.4, "layer_1": 0.5}
    ax = optax_spd.plot_report(report_of(values), "deviation")
    assert labels(ax) == ["layer_1", "layer_2", "layer_10"]
    assert marks(ax)["o"] == [[0.5, 0], [0.4, 1], [0.6, 2]]
    assert ax.get_xscale() == "log"
    low, high = ax.get_xlim()
    assert low < 0.4 < 0.6 < high
    numbers = [x for x in ax.get_xticks() if low <= x <= high]
    assert len(numbers) >= 2  # also where all are within one decade
    formatter = ax.xaxis.get_major_formatter()
    assert [formatter(x, 0) for x in (0.2, 1e-5)] == ["0.2", "1e-05"]
    assert ax.get_xlabel() == "deviation  ‖θ - θ₀‖"


def test_relative_deviations_are_in_percent() -> None:
    for values in ({"a": 2e-4, "b": 0.04}, {"a": 0.03, "b": 0.04}):  # of norm 2
        report = report_of(values)
        bar = optax_spd.plot_layers([report]).collections[0].colorbar
        for axis in (bar.ax.yaxis, optax_spd.plot_report(report).xaxis):
            shown = axis.get_major_formatter().format_ticks([0.015])
            assert shown == ["1.5 %"]
    absolute = optax_spd.plot_report(report, "deviation").xaxis
    assert absolute.get_major_formatter().format_ticks([0.015]) == ["0.015"]


def test_zero_and_infinite_deviations_stand_at_the_edges() -> None:
    rows = report_of({"a": 0.0, "b": 1.0, "c": 1.0}).rows
    report = optax_spd.LayerReport((*rows[:2], rows[2]._replace(anchor_norm=0.0)), 1.0)
    ax = optax_spd.plot_report(report)
    found = marks(ax)
    assert found["o"] == [[0.5, 1]]
    assert found["<"][0][1] == 0
    assert found[">"][0][1] == 2
    assert [x.get_text() for x in ax.get_legend().get_texts()] == ["0", "infinite"]
    at_anchor = optax_spd.plot_report(report_of({"a": 0.0, "b": 0.0}))
    at_anchor.figure.canvas.draw()
    assert marks(at_anchor)["o"] == []
    with pytest.raises(ValueError, match=r"no finite number to draw; .* plot 'deviation'"):
        optax_spd.plot_layers([optax_spd.LayerReport((rows[2]._replace(anchor_norm=0.0),), 1.0)])


def test_labels_of_two_hundred_layers_do_not_overlap() -> None:
    report = report_of({f"block_{i}/{'long' * 20}": 1.0 for i in range(200)})
    for ax in (optax_spd.plot_report(report), optax_spd.plot_layers([report])):
        ax.figure.canvas.draw()
        boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
        assert 20 < len(boxes) < 200
        assert all(a.y0 >= b.y1 for a, b in itertools.pairwise(boxes))
        assert max(len(text) for text in labels(ax)) <= 45


def test_axes_may_be_given_and_nothing_global_changes() -> None:
    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    left, right = Figure().subplots(1, 2)
    report = report_of({"a": 1.0})
    assert optax_spd.plot_layers({1: report}, ax=left) is left
    assert optax_spd.plot_report(report, ax=right) is right
    assert isinstance(optax_spd.plot_report(report).figure, Figure)
    assert (dict(matplotlib.rcParams), matplotlib.get_backend()) == (before, backend)


ONE = report_of({"a": 1.0}, spd_ratio=[0.5])


@pytest.mark.parametrize(
    ("draw", "arguments", "message"),
    [
        (optax_spd.plot_layers, ([ONE], "ftp_radii"), "no report has a column 'ftp_radii'; there"),
        (optax_spd.plot_layers, ({},), "reports is empty"),
        (optax_spd.plot_layers, (ONE,), r"what layer_report returns, got a tuple; .*plot_report"),
        (optax_spd.plot_report, ({1: ONE},), "got a dict"),
        (
            optax_spd.plot_layers,
            ([ONE, report_of({"a": 1.0, "b": 1.0})],),
            "different layers: 'b' is in only one of those at 0 and",
        ),
        (optax_spd.plot_report, (report_of({"a": 1.0}, mine=[-1.0]), "mine"), "negative numbers"),
    ],
)
def test_errors_say_what_was_given_and_what_to_do(draw: Any, arguments: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        draw(*arguments)


def test_without_matplotlib_the_library_imports_and_the_error_says_what_to_install() -> None:
    program = """
import sys
sys.modules["matplotlib"] = None
import optax_spd
report = optax_spd.layer_report({"a": 1.0 * __import__("numpy").ones(2)}, "zero")
for draw in (optax_spd.plot_report, lambda report: optax_spd.plot_layers([report])):
    try:
        draw(report)
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert [line.split(" needs")[0] for line in lines] == ["plot_report", "plot_layers"], done
    assert all("pip install matplotlib" in line for line in lines)
