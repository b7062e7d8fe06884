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
from optax_spd.sharding import placement

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
def test_what_is_tied_stays_the_same_to_the_bit(number: float) -> None:
    like = jnp.array([1.0, -0.0, jnp.inf, jnp.nan], jnp.float32)
    array = jnp.full(4, number, jnp.float32)
    tied = jax.jit(placement.with_sharding_of)(array, like)
    assert np.asarray(tied).tobytes() == np.asarray(array).tobytes()


def test_only_arrays_of_the_parameters_shape_are_tied() -> None:
    def init(params: Any) -> Any:
        state = {"w": jnp.zeros(3), "inner": {"w": jnp.zeros((2, 2))}, "count": jnp.zeros(())}
        return placement.shard_like_params(state, params)

    equations = jax.make_jaxpr(init)({"w": jnp.zeros((2, 2))}).eqns
    assert sum(e.primitive.name == "is_finite" for e in equations) == 1


def test_outside_of_a_program_nothing_happens() -> None:
    params = {"w": jnp.ones(2)}
    state = optax.adam(0.1).init(params)
    assert placement.shard_like_params(state, params) is state
    assert placement.with_sharding_of(state[0].mu["w"], params["w"]) is state[0].mu["w"]


def test_only_floating_numbers_are_tied() -> None:
    like = {"b": jnp.ones((2, 2)), "k": jnp.ones((2, 2)), "f": jnp.ones((2, 2))}

    def init(params: Any) -> Any:
        keys = jax.random.split(jax.random.key(0), (2, 2))
        state = {"b": jnp.zeros((2, 2), bool), "k": keys, "f": jnp.zeros((2, 2), jnp.bfloat16)}
        return placement.shard_like_params(state, params)

    tied, plain = jax.eval_shape(init, like), init(like)
    assert jax.tree.map(jnp.shape, tied) == jax.tree.map(jnp.shape, plain)
    assert [x.dtype for x in jax.tree.leaves(tied)] == [x.dtype for x in jax.tree.leaves(plain)]


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
        state = jax.jit(optax_spd.adam_spd(0.1, anchor=host).init)(params)
        np.testing.assert_array_equal(np.asarray(state[1].anchor["w"]), params["w"])
        state = jax.jit(optax_spd.adam_spd(0.1).init)(host)
        np.testing.assert_array_equal(np.asarray(state[1].anchor["w"]), params["w"])
