"""set_anchor and drop_anchor, through every wrapper and container."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
from jax_support import host_memory_works

import optax_spd
from optax_spd.layers import trees

PARAMS = {
    "dense": {"bias": jnp.arange(3.0), "kernel": jnp.arange(6.0).reshape(2, 3) - 2},
    "head": jnp.ones(2),
}
PRETRAINED = jax.tree.map(lambda x: 0.5 * x + 1, PARAMS)
HEAD_ONLY = {"dense": {"bias": False, "kernel": False}, "head": True}
NOT_HEAD = jax.tree.map(lambda x: not x, HEAD_ONLY)


def labels(params: Any) -> Any:
    del params
    return {"dense": {"bias": "body", "kernel": "body"}, "head": "head"}


def stages() -> optax.GradientTransformation:
    return optax_spd.chain(optax.sgd(0.2, momentum=0.9), optax_spd.spd(1.0))


WRAPPED: dict[str, Callable[[], Any]] = {
    "stage": lambda: optax_spd.with_gradient(optax_spd.spd()),
    "chain": stages,
    "two stages": lambda: optax_spd.chain(optax_spd.l2_sp(0.1), optax.sgd(0.1), optax_spd.spd()),
    "with_anchor": lambda: optax_spd.with_gradient(
        optax_spd.with_anchor(
            optax.chain(
                optax_spd.l2_sp(0.1, anchor="argument"),
                optax.sgd(0.1),
                optax_spd.spd(anchor="argument"),
                optax_spd.spd(0.5),
            )
        )
    ),
    "masked": lambda: optax.masked(stages(), NOT_HEAD),
    "own mask": lambda: optax_spd.chain(optax.sgd(0.1), optax_spd.spd(mask=NOT_HEAD)),
    "partition": lambda: optax.partition({"body": stages(), "head": stages()}, labels),
    "frozen head": lambda: optax.partition({"body": stages(), "head": optax.set_to_zero()}, labels),
    "MultiSteps": lambda: optax.MultiSteps(stages(), 2),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax_spd.adam_spd)(0.1),
    "apply_if_finite": lambda: optax.apply_if_finite(stages(), 3),
    "all at once": lambda: optax.MultiSteps(
        optax.apply_if_finite(
            optax.partition(
                {
                    "body": optax.inject_hyperparams(optax_spd.adam_spd)(0.1),
                    "head": optax.masked(stages(), HEAD_ONLY),
                },
                labels,
            ),
            3,
        ),
        2,
    ),
}
BOXES: dict[str, Callable[[Any], Any]] = {
    "dict": lambda tree: tree,
    "FrozenDict": flax.core.freeze,
    "nnx.State": lambda tree: nnx.State(jax.tree.map(nnx.Param, tree)),
    "partitioned": functools.partial(
        jax.tree.map, lambda x: nn.Partitioned(x, names=(None,) * x.ndim)
    ),
    "numpy": functools.partial(jax.tree.map, np.asarray),
}


def anchors_in(state: Any) -> dict[str, list[np.ndarray]]:
    """Every anchor array in a state, by the parameter's path."""
    found: dict[str, list[np.ndarray]] = {}
    for _, anchor in optax.tree.get_all_with_path(state, "anchor"):
        if isinstance(anchor, optax.EmptyState):
            continue
        flat = trees.flatten(anchor)
        for path, leaf in zip(flat.paths, flat.leaves, strict=True):
            if hasattr(leaf, "shape"):
                found.setdefault(trees.path_name(path), []).append(np.asarray(leaf))
    return found


def plain(tree: Any) -> dict[str, np.ndarray]:
    """A tree as a flat dict of arrays, whatever its containers and boxes."""
    flat = trees.flatten(tree)
    return {trees.path_name(p): np.asarray(x) for p, x in zip(flat.paths, flat.leaves, strict=True)}


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_set_anchor_reaches_every_anchor(wrapped: str, box: str) -> None:
    tx = WRAPPED[wrapped]()
    state = tx.init(PARAMS)
    before = anchors_in(state)
    new_state = optax_spd.set_anchor(state, BOXES[box](PRETRAINED))
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    after, wanted = anchors_in(new_state), plain(PRETRAINED)
    assert before
    assert {name: len(copies) for name, copies in after.items()} == {
        name: len(copies) for name, copies in before.items()
    }
    for name, copies in after.items():
        for copy in copies:
            np.testing.assert_array_equal(copy, wanted[name])
    tx.update(PARAMS, new_state, PARAMS)


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_drop_then_set_restores_the_state(wrapped: str) -> None:
    tx = WRAPPED[wrapped]()
    state = optax_spd.set_anchor(tx.init(PARAMS), PRETRAINED)
    dropped = optax_spd.drop_anchor(state)
    assert not anchors_in(dropped)
    with pytest.raises(ValueError, match="the anchor was dropped; call set_anchor"):
        tx.update(PARAMS, dropped, PARAMS)
    with pytest.raises(ValueError, match="the anchor was dropped; call set_anchor"):
        jax.jit(tx.update)(PARAMS, dropped, PARAMS)
    restored = optax_spd.set_anchor(dropped, PRETRAINED)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize("box", ["FrozenDict", "nnx.State", "partitioned"])
def test_boxed_states_take_plain_anchors(box: str) -> None:
    params = BOXES[box](PARAMS)
    tx = stages()
    state = tx.init(params)
    new_state = optax_spd.set_anchor(state, PRETRAINED)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert {k: len(v) for k, v in anchors_in(new_state).items()} == dict.fromkeys(plain(PARAMS), 1)
    for name, copies in anchors_in(new_state).items():
        np.testing.assert_array_equal(copies[0], plain(PRETRAINED)[name])
    again = optax_spd.set_anchor(optax_spd.drop_anchor(new_state), PRETRAINED)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    updates, _ = tx.update(params, again, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_setting_the_anchor_after_init_trains_as_if_it_had_been_given() -> None:
    def train(tx: Any, state: Any) -> Any:
        params, ratios = PARAMS, []
        for pull in (-1.0, -1.0, 0.2, 0.2, -1.0, 0.3):
            grads = optax.tree.scale(pull, jax.tree.map(lambda p: p + 0.1, PARAMS))
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            ratios.append(optax.tree.get(state, "spd_ratio"))
        return params, jnp.stack(ratios)

    given = optax_spd.adam_spd(0.3, anchor=PRETRAINED)
    late = optax_spd.adam_spd(0.3)
    expected, ratios = train(given, given.init(PARAMS))
    assert (ratios > 0).any()
    actual, new_ratios = train(late, optax_spd.set_anchor(late.init(PARAMS), PRETRAINED))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    np.testing.assert_array_equal(new_ratios, ratios)
    without, _ = train(late, late.init(PARAMS))
    kernels = [tree["dense"]["kernel"] for tree in (without, expected)]
    assert not np.allclose(*kernels, atol=1e-4)


def test_it_copies() -> None:
    state = optax_spd.set_anchor(stages().init(PARAMS), PRETRAINED)
    pointers = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(PRETRAINED)}
    assert not pointers & {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)}


def test_dtypes() -> None:
    state = optax_spd.spd(anchor_dtype=jnp.bfloat16).init(PARAMS)
    dtypes = lambda state: {str(x.dtype) for x in jax.tree.leaves(state.anchor)}
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), PRETRAINED)
    assert dtypes(optax_spd.set_anchor(state, wide)) == {"bfloat16"}
    assert dtypes(optax_spd.set_anchor(state, wide, anchor_dtype=jnp.float16)) == {"float16"}
    dropped = optax_spd.drop_anchor(state)
    assert dtypes(optax_spd.set_anchor(dropped, PRETRAINED)) == {"float32"}
    assert dtypes(optax_spd.set_anchor(dropped, PRETRAINED, anchor_dtype="bfloat16")) == {
        "bfloat16"
    }
    with pytest.raises(ValueError, match="anchor_dtype must be a floating dtype, got int32"):
        optax_spd.set_anchor(state, PRETRAINED, anchor_dtype=jnp.int32)


def test_placement() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, columns = NamedSharding(mesh, P("x", None)), NamedSharding(mesh, P(None, "x"))
    params = {"kernel": jax.device_put(jnp.ones((8, 8)), rows)}
    state = optax_spd.spd().init(params)
    # host data goes where the old anchor was, a jax.Array stays where it is
    from_numpy = optax_spd.set_anchor(state, {"kernel": np.zeros((8, 8), np.float32)})
    assert from_numpy.anchor["kernel"].sharding == rows
    given = jax.device_put(jnp.zeros((8, 8)), columns)
    assert optax_spd.set_anchor(state, {"kernel": given}).anchor["kernel"].sharding == columns


if host_memory_works():

    def test_an_anchor_given_in_host_memory_stays_there() -> None:
        mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        sharding = NamedSharding(mesh, P(None, "x"), memory_kind="pinned_host")
        state = optax_spd.spd().init({"kernel": jnp.ones((8, 8))})
        on_host = jax.device_put(jnp.zeros((8, 8)), sharding)
        kept = optax_spd.set_anchor(state, {"kernel": on_host}).anchor["kernel"]
        assert kept.sharding == sharding


def test_none_leaves() -> None:
    params = {"kernel": jnp.ones(2), "static": None}
    tx = stages()
    state = tx.init(params)
    pretrained = {"kernel": jnp.zeros(2), "static": None}
    dropped = optax_spd.drop_anchor(state)
    assert dropped[1].anchor["static"] is None
    restored = optax_spd.set_anchor(dropped, pretrained)
    assert jax.tree.structure(restored) == jax.tree.structure(state)


def test_a_half_restored_anchor_is_an_error_until_it_is_set() -> None:
    tx = stages()
    state = tx.init(PARAMS)
    # What a partial restore leaves behind: None in place of one array.
    anchor = {"dense": {"bias": None, "kernel": PARAMS["dense"]["kernel"]}, "head": PARAMS["head"]}
    half = (state[0], state[1]._replace(anchor=anchor))
    with pytest.raises(ValueError, match=r"no anchor at 'dense/bias'.*call set_anchor"):
        tx.update(PARAMS, half, PARAMS)
    mended = optax_spd.set_anchor(half, PRETRAINED)
    np.testing.assert_array_equal(mended[1].anchor["dense"]["bias"], PRETRAINED["dense"]["bias"])
    tx.update(PARAMS, mended, PARAMS)


@pytest.mark.parametrize("anchor", ["zero", "argument"])
def test_a_state_without_anchor_is_an_error(anchor: str) -> None:
    state = optax_spd.adam_spd(0.1, anchor=anchor).init(PARAMS)
    with pytest.raises(ValueError, match="The state holds no anchor"):
        optax_spd.set_anchor(state, PRETRAINED)
    with pytest.raises(ValueError, match="The state holds no anchor"):
        optax_spd.drop_anchor(state)
    with pytest.raises(ValueError, match="The state holds no anchor"):
        optax_spd.set_anchor(optax.adam(0.1).init(PARAMS), PRETRAINED)


def test_a_parameter_called_anchor_is_no_anchor() -> None:
    class Detector(NamedTuple):
        anchor: Any
        kernel: Any

    params = Detector(anchor=jnp.ones(2), kernel=jnp.ones(3))
    state = optax_spd.adam_spd(0.1).init(params)
    new_state = optax_spd.set_anchor(state, Detector(jnp.zeros(2), jnp.zeros(3)))
    moments = new_state[0][0]
    jax.tree.map(np.testing.assert_array_equal, moments, state[0][0])
    np.testing.assert_array_equal(new_state[1].anchor.anchor, jnp.zeros(2))


def test_mismatches_name_the_path() -> None:
    state = stages().init(PARAMS)
    with pytest.raises(ValueError, match="no leaf at 'head'"):
        optax_spd.set_anchor(state, {"dense": PRETRAINED["dense"]})
    with pytest.raises(ValueError, match="no leaf at 'head'"):
        optax_spd.set_anchor(optax_spd.drop_anchor(state), {"dense": PRETRAINED["dense"]})
    wrong = {**PRETRAINED, "head": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"'head': anchor has shape \(3,\)"):
        optax_spd.set_anchor(state, wrong)
    with pytest.raises(ValueError, match="a leaf at 'extra'"):
        optax_spd.set_anchor(state, {**PRETRAINED, "extra": jnp.ones(3)})
    masked = optax_spd.spd(mask=NOT_HEAD).init(PARAMS)
    optax_spd.set_anchor(masked, wrong)  # what the mask leaves out is not looked at
    dropped = optax_spd.drop_anchor(state)
    late = optax_spd.set_anchor(dropped, wrong)  # a dropped anchor has no shape; the update has
    with pytest.raises(ValueError, match=r"'head': anchor has shape \(3,\)"):
        stages().update(PARAMS, late, PARAMS)


class Model(nnx.Module):
    def __init__(self) -> None:
        self.dense = nnx.Linear(2, 3, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(x)


def test_nnx_optimizer_state() -> None:
    model = Model()
    optimizer = nnx.Optimizer(model, optax_spd.adam_spd(0.3), wrt=nnx.Param)
    pretrained = jax.tree.map(lambda x: x + 0.3, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    grad = nnx.grad(lambda model: (model(jnp.ones((4, 2))) ** 2).sum())

    optimizer.opt_state = nnx.data(optax_spd.set_anchor(optimizer.opt_state, pretrained))
    held = plain(optimizer.opt_state[1].anchor)
    for name, array in plain(pretrained).items():
        np.testing.assert_array_equal(held[name], array)
    for _ in range(3):
        optimizer.update(model, grad(model))
    assert (optimizer.opt_state[1].spd_ratio[...] > 0).any()

    optimizer.opt_state = nnx.data(optax_spd.drop_anchor(optimizer.opt_state))
    with pytest.raises(ValueError, match="the anchor was dropped; call set_anchor"):
        optimizer.update(model, grad(model))
    optimizer.opt_state = nnx.data(optax_spd.set_anchor(optimizer.opt_state, pretrained))
    optimizer.update(model, grad(model))


def test_a_whole_nnx_optimizer() -> None:
    model = Model()
    optimizer = nnx.Optimizer(model, optax_spd.adam_spd(0.3), wrt=nnx.Param)
    pretrained = jax.tree.map(lambda x: x + 0.3, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    with pytest.raises(ValueError, match=r"give optimizer.opt_state"):
        optax_spd.set_anchor(nnx.state(optimizer), pretrained)


def test_an_unfiltered_equinox_model_is_a_full_tree() -> None:
    model = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    state = stages().init(params)
    new_state = optax_spd.set_anchor(state, model)  # holds functions where params has None
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


def test_no_array_for_a_dropped_one_is_an_error() -> None:
    dropped = optax_spd.drop_anchor(stages().init(PARAMS))
    with pytest.raises(ValueError, match="anchor is None at 'head', where params has an array"):
        optax_spd.set_anchor(dropped, {**PRETRAINED, "head": None})


def test_a_lost_subtree_is_an_error() -> None:
    state = stages().init(PARAMS)
    for anchor in (None, {"dense": None, "head": PARAMS["head"]}):
        lost = (state[0], state[1]._replace(anchor=anchor))
        with pytest.raises(ValueError, match="the new anchor has a whole subtree"):
            optax_spd.set_anchor(lost, PRETRAINED)
