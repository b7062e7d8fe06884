"""A sharded step is the unsharded one; anchors in host memory stay there."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax_support import host_memory_works

import optax_spd

SPECS = {
    "rows": {"kernel": P("x", None), "blocks": P("x", None, None), "bias": P("x")},
    "columns": {"kernel": P(None, "x"), "blocks": P(None, None, "x"), "bias": P()},
    "both": {"kernel": P("x", "y"), "blocks": P("y", None, "x"), "bias": P(("x", "y"))},
}
LAYERS = {
    "per array": None,
    "stacked": optax_spd.stacked("blocks", 0),
    "two stacked axes": optax_spd.stacked("blocks", (0, 1)),
}
adam_ftp = functools.partial(optax_spd.adam_ftp, 0.1, radius_learning_rate=0.1)
RECIPES: dict[str, Any] = {
    "adam_spd": functools.partial(optax_spd.adam_spd, 0.1),
    "adam_ftp": adam_ftp,
    "adam_ftp in l2": functools.partial(adam_ftp, norm="l2"),
    "adam_tpgm": functools.partial(optax_spd.adam_tpgm, 0.1),
}
# Other recipes differ in what they compute from the same sums and the same kind of state.
CASES = [(specs, "adam_spd", layers) for layers in LAYERS for specs in SPECS]
CASES += [("rows", "adam_ftp", "stacked"), ("columns", "adam_ftp", "two stacked axes")]
CASES += [("both", recipe, "stacked") for recipe in RECIPES if recipe != "adam_spd"]


def start() -> Any:
    rng = np.random.default_rng(0)
    shapes = {"kernel": (8, 16), "blocks": (8, 4, 16), "bias": (16,)}
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}


def train(tx: Any, params: Any, state: Any = None) -> tuple[Any, Any, list[np.ndarray]]:
    """Pushes away and pulls back; SPD fires on the way, and radii grow and shrink."""
    state = tx.init(params) if state is None else state
    update, ratios, initial = jax.jit(tx.update), [], params
    for pull in (-1.0, -1.0, 0.2, 0.2, 0.2, -0.5):
        updates, state = update(optax.tree.scale(pull, initial), state, params)
        params = optax.apply_updates(params, updates)
        ratios.append(np.asarray(oracles.decisions(state)))
    return params, state, ratios


@functools.cache
def unsharded(recipe: str, layers: str) -> tuple[Any, list[np.ndarray]]:
    params, _, ratios = train(RECIPES[recipe](layers=LAYERS[layers]), start())
    return params, ratios


def parameter_shaped(state: Any) -> list[Any]:
    """What the method's own state holds that is as large as the parameters."""
    held = (getattr(state, field, None) for field in ("anchor", "ftp_deviation"))
    return [tree for tree in held if tree is not None]


def assert_same(actual: Any, desired: Any) -> None:
    jax.tree.map(
        lambda a, d: np.testing.assert_allclose(np.asarray(a), np.asarray(d), rtol=2e-5, atol=1e-6),
        actual,
        desired,
    )


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("specs", "recipe", "layers"), CASES)
def test_a_sharded_step_is_the_unsharded_one(
    specs: str, recipe: str, layers: str, axis_type: AxisType
) -> None:
    tx = RECIPES[recipe](anchor="initial", layers=LAYERS[layers])
    expected, ratios = unsharded(recipe, layers)
    assert np.mean(np.stack(ratios) > 0) > 0.2
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        params = {
            name: jax.device_put(array, NamedSharding(mesh, SPECS[specs][name]))
            for name, array in start().items()
        }
        first = tx.init(params)
        actual, last, new_ratios = train(tx, params, first)
    assert_same(actual, expected)
    np.testing.assert_allclose(np.stack(new_ratios), np.stack(ratios), rtol=1e-4, atol=1e-6)
    assert jax.tree.map(jax.typeof, first) == jax.tree.map(jax.typeof, last)
    for name, array in params.items():
        held = parameter_shaped(first[-1]) + parameter_shaped(last[-1])
        assert len(held) == (4 if "ftp" in recipe else 2)
        for tree in held:
            assert tree[name].sharding.is_equivalent_to(array.sharding, array.ndim)


def test_host_memory_is_tested_where_it_works() -> None:
    assert host_memory_works() or jax.__version_info__ < (0, 10, 2)


if host_memory_works():

    @pytest.mark.parametrize("donate", [(), (1,)])
    @pytest.mark.parametrize("spec", [P(), P("x", None)])
    def test_an_anchor_in_host_memory_stays_there(spec: P, donate: tuple[int, ...]) -> None:
        tx = optax_spd.adam_spd(0.1)
        mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
        on_host = NamedSharding(mesh, spec, memory_kind="pinned_host")
        params = {"kernel": jax.device_put(start()["kernel"], NamedSharding(mesh, spec))}
        expected, _, ratios = train(tx, params)
        assert (np.stack(ratios) > 0).any()

        state = optax_spd.set_anchor(tx.init(params), jax.device_put(params, on_host))
        step, initial = jax.jit(tx.update, donate_argnums=donate), params
        for pull in (-1.0, -1.0, 0.2, 0.2, 0.2, -0.5):
            updates, state = step(optax.tree.scale(pull, initial), state, params)
            params = optax.apply_updates(params, updates)
            assert state[1].anchor["kernel"].sharding.memory_kind == "pinned_host"
        assert_same(params, expected)
