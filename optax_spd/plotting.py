"""Pictures of layer reports. They need matplotlib, which is imported when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from optax_spd.layers import plans
from optax_spd.report import LayerReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

FIRED_SHARE = "fired_share"
TITLES = {
    "anchor_norm": "norm of the anchor  ‖θ₀‖",
    "deviation": "deviation  ‖θ - θ₀‖",
    "relative_deviation": "relative deviation  ‖θ - θ₀‖ / ‖θ₀‖",
    FIRED_SHARE: "share of steps pulled back",
}
# Colours and axes are logarithmic if the values span more than this factor, and show no more than
# the decades below the largest value: a radius may be 1e-8, and what moves starts at 0.
LOGARITHMIC_FROM = 30
DECADES = 2


def plot_layers(
    reports: Mapping[int, LayerReport] | Sequence[LayerReport],
    column: str = "relative_deviation",
    *,
    ax: Axes | None = None,
) -> Axes:
    """Draws one column of a run's layer reports as a heat map: a row a layer, a column a report.

    Layers stand in natural order, "layer_2" before "layer_10". With many layers only some are
    labelled. Where the values span more than a factor of 30, the colours are logarithmic, and what
    is 0 or smaller than 1 % of the largest has the darkest colour. Grey: no finite number. Nothing
    is shown on a screen, and no global state of matplotlib changes.

    Args:
      reports: the reports by step, or in order; all of the same layers.
      column: ``"deviation"``, ``"relative_deviation"``, ``"anchor_norm"``, any column that the
        optimizer's state gives the reports, such as ``"spd_ratio"`` or ``"ftp_radii"``, or
        ``"fired_share"``: in what share of the steps since the report before SPD pulled the layer
        back. That needs the reports by step, where a step is one update.
      ax: matplotlib axes to draw in; by default those of a new figure.

    Returns:
      The axes. ``ax.figure.savefig("layers.png")`` writes them to a file.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError: something in ``reports`` is no :class:`LayerReport`.
      ValueError: no reports, reports of different layers, a column that none of them has, or one
        without a finite number.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_spd
      >>> params = {"layer_2": jnp.ones(3), "layer_10": jnp.ones(3)}
      >>> tx = optax_spd.adam_spd(0.1)
      >>> state = tx.init(params)
      >>> reports = {}
      >>> for step in range(1, 4):
      ...     updates, state = tx.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     reports[step] = optax_spd.layer_report(params, state=state)
      >>> ax = optax_spd.plot_layers(reports, "deviation")
      >>> [label.get_text() for label in ax.get_yticklabels()]
      ['layer_2', 'layer_10']
    """
    _require_matplotlib("plot_layers")
    from matplotlib import colormaps, colors, ticker

    steps, names, values = _table(reports, column)
    finite = values[np.isfinite(values)]
    if not finite.size:
        mend = "; where the anchor is zero, plot 'deviation'" if "relative" in column else ""
        raise ValueError(f"column {column!r} has no finite number to draw{mend}.")
    top = float(finite.max())
    low = _smallest(finite)
    logarithmic = finite.min() >= 0 and top > LOGARITHMIC_FROM * low
    norm = (
        colors.LogNorm(low, top, clip=True)  # without clip= a 0 would count as missing
        if logarithmic
        else colors.Normalize(min(0.0, float(finite.min())), top or 1.0)
    )
    ax = _axes(len(names), 7.0) if ax is None else ax
    mesh = ax.pcolormesh(
        _edges(steps),
        np.arange(len(names) + 1) - 0.5,
        np.ma.masked_invalid(values),
        norm=norm,
        cmap=colormaps["cividis"].with_extremes(bad="0.8"),
    )
    _label_layers(ax, names)
    ax.set_xlabel("step" if isinstance(reports, Mapping) else "report")
    ax.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    bar = ax.figure.colorbar(
        mesh, ax=ax, extend="min" if logarithmic and finite.min() < low else "neither"
    )
    bar.set_label(TITLES.get(column, column))
    if logarithmic:
        _number(bar.ax.yaxis, low, top)
    _in_percent(bar.ax.yaxis, column)
    return ax


def plot_report(
    report: LayerReport, column: str = "relative_deviation", *, ax: Axes | None = None
) -> Axes:
    """Draws one report: a mark a layer, from the first layer down to the last, on a log axis.

    Layers stand in natural order, "layer_2" before "layer_10". With many layers only some are
    labelled. Layers at 0 stand as open triangles at the left edge, infinite ones (such as the
    relative deviation from an anchor of zeros) at the right. Nothing is shown on a screen, and no
    global state of matplotlib changes.

    Args:
      report: what :func:`layer_report` gave.
      column: ``"relative_deviation"``, ``"deviation"``, ``"anchor_norm"``, or any column that the
        optimizer's state gives the report, such as ``"ftp_radii"``; its numbers must not be
        negative.
      ax: matplotlib axes to draw in; by default those of a new figure.

    Returns:
      The axes. ``ax.figure.savefig("report.png")`` writes them to a file.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError: ``report`` is no :class:`LayerReport`.
      ValueError: a column that the report has not, or has a negative number in.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_spd
      >>> pretrained = {"layer_2": jnp.ones(4), "layer_10": jnp.ones(4)}
      >>> tuned = {"layer_2": jnp.full(4, 1.5), "layer_10": jnp.full(4, 1.1)}
      >>> ax = optax_spd.plot_report(optax_spd.layer_report(tuned, pretrained))
      >>> ax.get_xscale()
      'log'
      >>> [label.get_text() for label in ax.get_yticklabels()]
      ['layer_2', 'layer_10']
    """
    _require_matplotlib("plot_report")
    if column == FIRED_SHARE:
        raise ValueError(f"column {column!r} needs several reports: use plot_layers.")
    _, names, table = _table([report], column)
    values = table[:, 0]
    if np.any(values < 0):
        raise ValueError(f"column {column!r} has negative numbers, for which there is no log axis.")
    ax = _axes(len(names), 6.0) if ax is None else ax
    depth = np.arange(len(names))
    drawn = np.isfinite(values) & (values > 0)
    ax.plot(values[drawn], depth[drawn], "o", color="#0072b2")
    ax.set_xscale("log")
    low, top = (values[drawn].min(), values[drawn].max()) if drawn.any() else (1e-3, 1.0)
    low, top = _round_outward(float(low), float(top))
    ax.set_xlim(low / 1.15, top * 1.15)
    _number(ax.xaxis, low, top)
    _in_percent(ax.xaxis, column)
    for edge, marker, missing in ((0.015, "<", values == 0), (0.985, ">", np.isinf(values))):
        ax.plot(
            np.full(missing.sum(), edge),
            depth[missing],
            marker,
            color="#d55e00",
            markerfacecolor="none",
            transform=ax.get_yaxis_transform(),
            label=("0" if marker == "<" else "infinite") if missing.any() else "_",
        )
    if not drawn.all():
        ax.legend(loc="best")
    _label_layers(ax, names)
    ax.grid(axis="x", alpha=0.3)
    ax.set_xlabel(TITLES.get(column, column))
    return ax


def _require_matplotlib(name: str) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{name} needs matplotlib, which is not installed: pip install matplotlib. "
            "layer_report itself prints a table without it."
        ) from error


def _table(
    reports: Mapping[int, LayerReport] | Sequence[LayerReport], column: str
) -> tuple[list[int], list[str], np.ndarray]:
    """Steps, names in natural order, and the column's values (layers, reports); NaN: not there."""
    by_step = reports if isinstance(reports, Mapping) else dict(enumerate(reports))
    if not by_step:
        raise ValueError("reports is empty: there is nothing to draw.")
    for report in by_step.values():
        if not isinstance(report, LayerReport):
            raise TypeError(
                f"expected what layer_report returns, got a {type(report).__name__}; plot_layers "
                "takes a mapping of step to report or a sequence of reports, plot_report one."
            )
    steps = sorted(by_step)
    names = sorted((row.name for row in by_step[steps[0]].rows), key=plans.natural_key)
    for step in steps:
        differing = {row.name for row in by_step[step].rows} ^ set(names)
        if differing:
            raise ValueError(
                f"the reports are of different layers: {min(differing)!r} is in only one of those "
                f"at {steps[0]} and {step}."
            )
    found = [by_step[step].as_dict() for step in steps]

    def values_of(column: str) -> np.ndarray:
        cells = [[scalars.get(f"{name}/{column}", math.nan) for scalars in found] for name in names]
        return np.array(cells, float).reshape(len(names), len(steps))

    if column == FIRED_SHARE:
        if not isinstance(reports, Mapping):
            raise ValueError(f"{FIRED_SHARE!r} needs the steps: pass a mapping of step to report.")
        _check_column("spd_fired", found)
        updates = np.diff(steps, prepend=0.0)
        # No step before a report at step 0: no share.
        updates = np.where(updates > 0, updates, math.nan)
        return steps, names, np.diff(values_of("spd_fired"), axis=1, prepend=0.0) / updates
    _check_column(column, found)
    return steps, names, values_of(column)


def _check_column(column: str, found: Iterable[Mapping[str, float]]) -> None:
    there = dict.fromkeys(key.rpartition("/")[2] for scalars in found for key in scalars)
    there.pop("total", None)
    if column not in there:
        state = (
            "" if "/" in column else " Columns of the state need layer_report(..., state=state)."
        )
        raise ValueError(f"no report has a column {column!r}; there are {', '.join(there)}.{state}")


def _smallest(values: np.ndarray) -> float:
    """The smallest positive value that a logarithmic scale shows."""
    positive = values[values > 0]
    return float(max(positive.min(), positive.max() / 10**DECADES)) if positive.size else 1.0


def _edges(steps: Sequence[float]) -> np.ndarray:
    """The borders of the heat map's columns, half way from step to step."""
    places = np.asarray(steps, float)
    if len(places) == 1:
        return np.array([places[0] - 0.5, places[0] + 0.5])
    middles = (places[1:] + places[:-1]) / 2
    first, last = 2 * places[0] - middles[0], 2 * places[-1] - middles[-1]
    edges: np.ndarray = np.concatenate([[first], middles, [last]])
    return edges


def _axes(layers: int, width: float) -> Axes:
    """The axes of a new figure, which pyplot does not know, as high as the layers' labels need."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, min(max(3.0, 1.0 + 0.17 * layers), 9.0)), layout="constrained")
    return figure.add_subplot()


def _label_layers(ax: Axes, names: Sequence[str]) -> None:
    """Layers from top to bottom; every second, third, ... is labelled if not all labels fit."""
    size = 8.0  # points
    fitting = max(1, int(72 * ax.bbox.height / ax.figure.dpi / (1.25 * size)))
    every = math.ceil(len(names) / fitting) or 1
    shown = [name if len(name) <= 45 else f"…{name[-44:]}" for name in names]
    ax.set_yticks(range(0, len(names), every), shown[::every], fontsize=size)
    ax.set_ylim(len(names) - 0.5, -0.5)


def _round_outward(low: float, top: float) -> tuple[float, float]:
    """The nearest numbers 1, 2 or 5 times a power of ten, below and above."""
    below, above = (10.0 ** math.floor(math.log10(x)) for x in (low, top))
    return (
        max(m * below for m in (1, 2, 5) if m * below <= low),
        min(m * above for m in (1, 2, 5, 10) if m * above >= top),
    )


def _number(axis: Axis, low: float, top: float) -> None:
    """Round numbers on a logarithmic axis: 1, 2, 5, 10, ... or powers of ten alone."""
    from matplotlib import ticker

    decades = math.log10(top / low)
    subs = (1.0, 2.0, 5.0) if decades <= 2.5 else (1.0,)
    axis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def _in_percent(axis: Axis, column: str) -> None:
    """Writes relative deviations in percent."""
    from matplotlib import ticker

    if column == "relative_deviation":
        axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{100 * x:.4g} %"))
