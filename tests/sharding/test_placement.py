"""In a jitted init every array of the state is split as the parameter it belongs to."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax_support import host_memory_works

import optax_spd

# All of one shape: zeros of one shape are one constant to XLA, whatever they belong to.
SPECS = {"a": P("x"), "b": P(None, "y"), "c": P(("x", "y")), "d": P(None, "x"), "e": P()}
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adam_spd": lambda: optax_spd.adam_spd(0.1),
    "adam_ftp": lambda: optax_spd.adam_ftp(0.1),
    "sgd_freeze_embed": lambda: optax_spd.sgd_freeze_embed(0.1, embedding="^a"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_arrays_of_one_shape_are_each_split_as_their_parameter(name: str) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    params = {
        key: jax.device_put(jnp.full((32, 16), -0.0), NamedSharding(mesh, spec))
        for key, spec in SPECS.items()
    }
    tx = OPTIMIZERS[name]()
    state = jax.jit(tx.init)(params)
    found = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if leaf.shape == (32, 16):
            assert leaf.sharding.is_equivalent_to(params[path[-1].key].sharding, 2), path
            found += 1
    assert found >= 4
    jax.tree.map(np.testing.assert_array_equal, state, tx.init(params))


@pytest.mark.parametrize("number", [1.5, -0.0, np.inf, -np.inf, np.nan])
def test_a_jitted_init_changes_no_bit(number: float) -> None:
    params = {"w": jnp.array([1.0, -0.0, jnp.inf, jnp.nan], jnp.float32)}
    for anchor in ({"w": np.full(4, number, np.float32)}, "initial"):
        tx = optax_spd.adam_spd(0.1, anchor=anchor)
        expected, found = tx.init(params), jax.jit(tx.init)(params)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_state_may_hold_arrays_that_are_no_floating_numbers() -> None:
    params = {"b": jnp.ones((2, 2)), "f": jnp.ones((2, 2)), "k": jnp.ones((2, 2)), "n": jnp.ones(3)}

    def init(params: Any) -> Any:
        keys = jax.random.split(jax.random.key(0), (2, 2))
        halves = jnp.zeros((2, 2), jnp.bfloat16)
        # And one that only has the path of a parameter.
        return {"b": jnp.zeros((2, 2), bool), "f": halves, "k": keys, "n": jnp.zeros(())}

    tx = optax_spd.with_gradient(optax.GradientTransformation(init, lambda u, s, p=None: (u, s)))
    assert jax.tree.map(jax.typeof, jax.jit(tx.init)(params)) == jax.tree.map(
        jax.typeof, init(params)
    )


def test_a_number_of_a_state_is_no_copy_of_a_bare_number() -> None:
    tx = optax_spd.with_gradient(optax.apply_if_finite(optax.sgd(0.1), 3))
    state = jax.jit(tx.init)(jnp.asarray(1.5))
    assert jax.tree.map(jnp.result_type, state) == jax.tree.map(
        jnp.result_type, tx.init(jnp.asarray(1.5))
    )


if host_memory_works():

    def test_a_jitted_init_takes_what_is_in_host_memory() -> None:
        params = {"w": jnp.full((8, 4), 2.0)}
        host = jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host), params)
        for anchor, given in ((host, params), ("initial", host)):
            state = jax.jit(optax_spd.adam_spd(0.1, anchor=anchor).init)(given)
            held = optax.tree.get(state, "anchor")["w"]
            np.testing.assert_array_equal(np.asarray(held), params["w"])


def test_a_traced_anchor_is_nothing_but_a_copy_of_its_parameter() -> None:
    """Anything more, XLA may fuse with an initializer in the same program and round differently."""
    tx, params = optax_spd.adam_spd(1e-3), {"w": jnp.ones((8, 16))}
    jaxpr = jax.make_jaxpr(lambda params: optax.tree.get(tx.init(params), "anchor"))(params).jaxpr
    (made,) = (eqn for eqn in jaxpr.eqns if jaxpr.outvars[0] in eqn.outvars)
    assert (made.primitive.name, *made.invars) == ("copy", *jaxpr.invars)
