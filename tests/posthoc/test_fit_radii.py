"""fit_radii(): TPGM's learning step for a pair of checkpoints."""

import functools
from typing import Any

import ball_oracles
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tpgm_steps import (
    LAYERS,
    SHAPES,
    Counter,
    arrays,
    assert_close,
    assert_same_bits,
    half_distance,
    stepper,
)

import optax_spd

ADAM = optax.adam(0.05)


@pytest.mark.parametrize(
    ("layers", "norm", "steps"),
    [
        ("per array", "l2", 5),
        ("per array", "l2", 1),  # no loop
        ("stacked", "mars", 5),
        ("by module", "l2", 5),
        ("by module", "mars", 5),
        ("torch", "mars", 5),
    ],
)
def test_equals_the_learning_step_of_tpgm_and_numpy(layers: str, norm: str, steps: int) -> None:
    params, anchor, batches = arrays(0), arrays(1), arrays(2, steps)
    mask = {path: path != "dense/bias" for path in SHAPES}
    sgd = optax.sgd(0.02)
    options = {"norm": norm, "layers": LAYERS[layers], "mask": mask}
    fitted = optax_spd.fit_radii(
        params, anchor, half_distance, batches, radius_optimizer=sgd, **options
    )
    tx = optax_spd.tpgm(sgd, anchor=anchor, **options)
    zeros = jax.tree.map(np.zeros_like, params)
    projected, state = stepper(tx)(params, tx.init(params), zeros, batches)
    names = optax_spd.layer_names(params, layers=LAYERS[layers], mask=mask)
    assert fitted.radii.shape == (len(names),)
    assert_close(fitted.params, projected)
    np.testing.assert_allclose(fitted.radii, state.tpgm_radii, rtol=1e-6)

    reference = ball_oracles.Tpgm(anchor, norm, 0.02, LAYERS[layers], mask)
    assert_close(fitted.params, reference.step(params, zeros, batches), atol=1e-5)
    np.testing.assert_allclose(fitted.radii, list(reference.radii.values()), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(fitted.params["dense/bias"], params["dense/bias"])


def test_identical_checkpoints_and_sick_layers_come_back() -> None:
    params = arrays(0)
    fitted = optax_spd.fit_radii(params, params, half_distance, arrays(2, 3))
    assert_same_bits(fitted.params, params)
    np.testing.assert_array_equal(fitted.radii, np.zeros(5))

    sick = arrays(0)
    sick["dense/kernel"][0, 0] = np.nan
    others = lambda tree: {p: x for p, x in tree.items() if p != "dense/kernel"}
    loss = lambda now, batch: half_distance(others(now), others(batch))
    fitted = optax_spd.fit_radii(sick, arrays(1), loss, arrays(2, 3))
    healthy = optax_spd.fit_radii(params, arrays(1), loss, arrays(2, 3))
    np.testing.assert_array_equal(fitted.params["dense/kernel"], sick["dense/kernel"])
    assert np.isfinite(fitted.radii).all()
    assert_close(others(fitted.params), others(healthy.params))


def test_a_second_call_compiles_nothing() -> None:
    count = Counter()
    fit = functools.partial(optax_spd.fit_radii, validation_fn=count, radius_optimizer=ADAM)
    fit(arrays(0), arrays(1), validation_batches=arrays(2, 3))
    traces = count.traces
    assert traces > 0
    second = fit(arrays(3), arrays(4), validation_batches=arrays(5, 3))
    # New descriptions of layers with the same meaning compile nothing either.
    fit(arrays(0), arrays(1), validation_batches=arrays(2, 3), layers=optax_spd.stacked("^none"))
    assert count.traces == traces
    assert count.taken() == 9
    alone = optax_spd.fit_radii(
        arrays(3), arrays(4), half_distance, arrays(5, 3), radius_optimizer=ADAM
    )
    np.testing.assert_allclose(second.radii, alone.radii, rtol=1e-6)


SPECS = {"blocks": P(None, "x", "y"), "dense": P("x", "y"), "head": P(None, ("x", "y"))}


@pytest.mark.parametrize(
    ("axis_type", "norm"), [(AxisType.Auto, "mars"), (AxisType.Explicit, "l2")], ids=str
)
def test_sharded_checkpoints_stay_sharded(axis_type: AxisType, norm: str) -> None:
    draw = np.random.default_rng(0)
    shapes = {"blocks": (3, 8, 4), "dense": (8, 4), "head": (4, 8)}
    tree = lambda *lead: {
        name: draw.normal(size=(*lead, *shape)).astype(np.float32) for name, shape in shapes.items()
    }
    params, anchor, batches = tree(), tree(), tree(4)
    fit = functools.partial(
        optax_spd.fit_radii,
        validation_fn=half_distance,
        norm=norm,
        layers=optax_spd.stacked("blocks"),
        radius_optimizer=ADAM,
    )
    expected = fit(params, anchor, validation_batches=batches)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    place = lambda tree, *lead: {
        name: jax.device_put(x, NamedSharding(mesh, P(*lead, *SPECS[name])))
        for name, x in tree.items()
    }
    with jax.set_mesh(mesh):
        found = fit(place(params), place(anchor), validation_batches=place(batches, None))
    assert_close(tuple(found), tuple(expected), atol=1e-5)
    for name, x in found.params.items():
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, SPECS[name]), x.ndim), name


class Unhashable:
    """A validation function that defines equality and no hash."""

    def __call__(self, params: Any, batch: Any) -> Any:
        return half_distance(params, batch)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"validation_fn": Unhashable()}, TypeError, "validation_fn must be hashable"),
        ({"validation_fn": 1.0}, TypeError, "validation_fn must be a function"),
        (
            {"validation_fn": lambda p, b: b["dense/bias"]},
            ValueError,
            "must return one real number",
        ),
        ({"validation_batches": arrays(2, 0)}, ValueError, "must have a leading axis"),
        ({"norm": "linf"}, ValueError, "norm must be 'l2' or 'mars'"),
        ({"radius_optimizer": 0.1}, TypeError, "radius_optimizer must be"),
        ({"anchor": {"scale": 1.0}}, ValueError, "anchor does not match params"),
        ({"params": arrays(0) | {"scale": 1j}}, TypeError, "'scale' is complex"),
        ({"layers": "dense"}, TypeError, "layers must be a function"),
        ({"mask": optax_spd.path_mask("embed")}, ValueError, "embed"),
    ],
)
def test_wrong_input_is_refused(change: Any, error: type[Exception], words: str) -> None:
    arguments = {
        "params": arrays(0),
        "anchor": arrays(1),
        "validation_fn": half_distance,
        "validation_batches": arrays(2, 3),
    }
    with pytest.raises(error, match=words) as raised:
        optax_spd.fit_radii(**(arguments | change))
    assert "update got" not in str(raised.value)  # there is no update here


def test_a_whole_model_is_fitted_as_its_parameters() -> None:
    """Functions and numbers, and leaves that are no layers, come back and are seen."""
    settings = {"activation": jnp.tanh, "name": "model", "rate": 0.5, "training": False}
    model = settings | {"empty": np.ones((0, 2)), "none": None, "steps": np.arange(3)}
    params, anchor, batches = arrays(0), arrays(1), arrays(2, 3)

    def loss(whole: Any, batch: Any) -> jax.Array:
        assert {key: whole[key] for key in settings} == settings
        assert (whole["none"], whole["steps"].dtype) == (None, jnp.int32)
        return whole["steps"][1] * half_distance({key: whole[key] for key in batch}, batch)

    fit = functools.partial(optax_spd.fit_radii, validation_batches=batches, radius_optimizer=ADAM)
    expected = fit(params, anchor, half_distance)
    for others in (dict.fromkeys(model), model):
        found = fit(params | model, anchor | others, loss)
        np.testing.assert_array_equal(found.params.pop("steps"), model["steps"])
        assert found.params.pop("empty").shape == (0, 2)
        back = {key: found.params.pop(key) for key in (*settings, "none")}
        assert back == settings | {"none": None}
        assert_same_bits(found, expected)


def test_a_deviation_whose_squares_overflow_is_fitted() -> None:
    params = {"w": jnp.full(4, 1e20)}
    fitted = optax_spd.fit_radii(
        params, {"w": jnp.zeros(4)}, lambda p, batch: jnp.mean(p["w"]) * 1e-20, jnp.ones((2, 1)),
        radius_optimizer=optax.sgd(0.1), norm="l2",
    )  # fmt: skip
    np.testing.assert_allclose(fitted.radii, 1e20, rtol=1e-5)  # half of the norm
    np.testing.assert_allclose(fitted.params["w"], 0.5e20, rtol=1e-5)


class Unhashable:
    """A setting that has no hash."""

    scale = 3.0
    __hash__ = None  # type: ignore[assignment]


def test_settings_that_are_equal_but_not_alike_are_told_apart() -> None:
    params, anchor = {"w": jnp.array([2.0])}, {"w": jnp.zeros(1)}

    def loss(model: Any, batch: Any) -> jax.Array:
        scale = getattr(model["c"], "scale", 2.0 if model["c"] is True else 1.0)
        return scale * jnp.mean(model["w"]) + 0 * jnp.sum(batch)

    fit = lambda c: optax_spd.fit_radii(
        params | {"c": c, "name": "model"}, anchor | {"c": None, "name": None}, loss,
        jnp.ones((1, 1)), radius_optimizer=ADAM,
    )  # fmt: skip
    found = [float(fit(c).losses[0]) for c in (1, True, Unhashable())]
    np.testing.assert_allclose(found, [1.0, 2.0, 3.0], rtol=1e-6)
