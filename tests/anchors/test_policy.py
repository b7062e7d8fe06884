"""Where the anchor lives: policies, copies, dtypes, placement, donation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import optax_spd
from optax_spd.anchors import policy

PARAMS = {"bias": jnp.arange(3.0), "kernel": jnp.arange(6.0).reshape(2, 3) - 2}
PRETRAINED = jax.tree.map(lambda x: 0.5 * x + 1, PARAMS)


def trajectory(tx: Any, params: Any = PARAMS, **extra: Any) -> tuple[Any, int]:
    """Pushes away from zero, then pulls back against the momentum; counts how often SPD fired."""
    start, state, update, fired = params, tx.init(params), jax.jit(tx.update), 0
    for pull in (-1.0, -1.0, -1.0, 0.2, 0.2, 0.2, -0.5, 0.2):
        grads = optax.tree.scale(pull, jax.tree.map(lambda p: p + 0.1, start))
        updates, state = update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
        ratios = optax.tree.get_all_with_path(state, "spd_ratio")
        fired += sum(int((ratio > 0).sum()) for _, ratio in ratios)
    return params, fired


def leaf_bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def assert_close(actual: Any, desired: Any, atol: float = 1e-6) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for a, d in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(d, np.float64), atol=atol)


def inner() -> optax.GradientTransformation:
    return optax.sgd(0.2, momentum=0.9)


STAGES: dict[str, Any] = {
    "spd": optax_spd.spd,
    "l2_sp": lambda **kw: optax_spd.l2_sp(0.1, **kw),
    "tpgm": lambda **kw: optax_spd.tpgm(radii=0.4, **kw),
    "ftp": optax_spd.ftp,
}


@pytest.mark.parametrize("stage", STAGES)
def test_policies_agree_where_they_mean_the_same_anchor(stage: str) -> None:
    grad = jax.tree.map(lambda p: p + 0.1, PARAMS)

    def step(policy: Any, **extra: Any) -> Any:
        tx = STAGES[stage](anchor=policy)
        update, state, params = jax.jit(tx.update), tx.init(PARAMS), PARAMS
        for scale in (1.0, -2.0):
            updates, state = update(
                optax.tree.scale(scale, grad), state, params, grad=grad, **extra
            )
            params = optax.apply_updates(params, updates)
        return params

    given = step(PRETRAINED)
    assert_close(step("initial"), step(PARAMS))
    assert_close(step("argument", anchor=PRETRAINED), given)
    assert_close(step("zero"), step(optax.tree.zeros_like(PARAMS)))
    assert_close(step("argument", anchor=jax.tree.map(np.asarray, PRETRAINED)), given)
    for other in ("initial", "zero"):  # and the anchor matters
        assert not np.allclose(step(other)["kernel"], given["kernel"], atol=1e-3)


def test_with_anchor_holds_one_copy_for_two_stages() -> None:
    def stages(anchor: Any) -> Any:
        return optax.chain(
            optax_spd.l2_sp(0.05, anchor=anchor), inner(), optax_spd.spd(anchor=anchor)
        )

    shared = optax_spd.with_gradient(optax_spd.with_anchor(stages("argument"), PRETRAINED))
    apart = optax_spd.with_gradient(stages(PRETRAINED))
    shared_params, fired = trajectory(shared)
    assert fired > 0
    assert_close(shared_params, trajectory(apart)[0])
    saved = leaf_bytes(apart.init(PARAMS)) - leaf_bytes(shared.init(PARAMS))
    assert saved == leaf_bytes(PARAMS)


def test_the_callers_anchor_wins_over_with_anchor() -> None:
    stages = optax.chain(inner(), optax_spd.spd(anchor="argument"))
    shared = optax_spd.with_gradient(optax_spd.with_anchor(stages, "initial"))
    own = optax_spd.with_gradient(stages)
    with_own, fired = trajectory(shared, anchor=PRETRAINED)
    assert fired > 0
    assert_close(with_own, trajectory(own, anchor=PRETRAINED)[0])


@pytest.mark.parametrize("compatible", [False, True])
def test_with_anchor_reaches_masked_stages(compatible: bool) -> None:
    mask = {"bias": False, "kernel": True}
    stage = optax.masked(
        optax_spd.spd(anchor="argument"), mask, mask_compatible_extra_args=compatible
    )
    shared = optax_spd.with_anchor(optax.chain(inner(), stage), PRETRAINED)
    apart = optax_spd.chain(inner(), optax_spd.spd(anchor=PRETRAINED, mask=mask))
    params, fired = trajectory(optax_spd.with_gradient(shared))
    assert fired > 0
    assert_close(params, trajectory(apart)[0])


@pytest.mark.parametrize("anchor_dtype", [jnp.bfloat16, "float16", np.float32])
def test_anchor_dtype_is_what_is_stored_and_used(anchor_dtype: Any) -> None:
    rounded = jax.tree.map(lambda x: x.astype(anchor_dtype), PRETRAINED)
    tx = optax_spd.chain(inner(), optax_spd.spd(anchor=PRETRAINED, anchor_dtype=anchor_dtype))
    held = optax.tree.get(tx.init(PARAMS), "anchor")
    assert {x.dtype for x in jax.tree.leaves(held)} == {jnp.dtype(anchor_dtype)}
    held = optax_spd.spd(anchor_dtype=anchor_dtype).init({"steps": jnp.arange(3)}).anchor
    assert held["steps"].dtype == jnp.int32
    params, fired = trajectory(tx)
    assert fired > 0
    reference = optax_spd.chain(inner(), optax_spd.spd(anchor=jax.tree.map(np.float32, rounded)))
    assert_close(params, trajectory(reference)[0])


def aligned(size: int) -> np.ndarray:
    """Zeros that start at a multiple of 64 bytes: JAX would take the memory over without a copy."""
    memory = np.zeros(4 * size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + 4 * size].view(np.float32)


def test_a_copy_of_host_data_is_a_copy_also_where_the_parameters_are_placed() -> None:
    given = {"a": aligned(16)}
    placed = {"a": jax.device_put(jnp.ones(16), jax.devices()[0])}
    for tx, params in (
        (optax_spd.spd(), given),
        (optax_spd.spd(anchor=given), placed),
        (optax_spd.spd(anchor=given, anchor_dtype=np.float32), placed),
    ):
        held = tx.init(params).anchor["a"]
        given["a"] += 1
        np.testing.assert_array_equal(held, given["a"] - 1)


def test_a_copy_is_placed_nowhere_in_particular_and_has_the_dtype_asked_for() -> None:
    held = optax_spd.spd(anchor={"a": np.ones(4)}).init({"a": jnp.ones(4)}).anchor["a"]
    assert not held.committed
    shared = optax_spd.with_anchor(optax_spd.spd(anchor="argument"), anchor_dtype=jnp.bfloat16)
    assert shared.init({"a": jnp.ones(4)}).anchor["a"].dtype == jnp.bfloat16


def test_every_array_of_the_state_is_its_own_buffer() -> None:
    """Also where each of three stages is given the parameters themselves."""
    params = jax.tree.map(jnp.copy, PARAMS)
    stages = optax.chain(optax_spd.l2_sp(0.1, anchor=params), optax_spd.spd(anchor=params))
    tx = optax_spd.with_anchor(stages, params)
    for init in (tx.init, jax.jit(tx.init)):
        arrays = jax.tree.leaves((params, init(params)))
        assert len({x.unsafe_buffer_pointer() for x in arrays}) == len(arrays)


def test_a_tree_goes_where_the_parameters_are_unless_it_has_a_place() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding, elsewhere = NamedSharding(mesh, P("x", None)), NamedSharding(mesh, P(None, None))
    params = {"kernel": jax.device_put(jnp.ones((8, 4)), sharding)}
    shapes = {"kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding)}
    held = lambda anchor, params=params: optax_spd.spd(anchor=anchor).init(params).anchor["kernel"]
    numpy = {"kernel": np.zeros((8, 4), np.float32)}
    for loose in (numpy, jax.tree.map(jnp.asarray, numpy)):  # neither says where it belongs
        assert held(loose).sharding == sharding
    placed = jax.device_put(numpy, elsewhere)  # the caller's choice
    assert held(placed).sharding == elsewhere
    found = held(numpy, shapes)
    assert (type(found), found.sharding) == (jax.ShapeDtypeStruct, sharding)


def test_a_jitted_init_bakes_a_tree_in_but_initial_copies() -> None:
    consts = jax.make_jaxpr(optax_spd.spd().init)(PARAMS).consts
    assert leaf_bytes(consts) == 0
    consts = jax.make_jaxpr(optax_spd.spd(anchor=PRETRAINED).init)(PARAMS).consts
    assert leaf_bytes(consts) == leaf_bytes(PRETRAINED)


def test_a_tree_without_values_is_no_anchor() -> None:
    for gap in (None, optax.MaskedNode()):
        with pytest.raises(ValueError, match="at 'bias', where params has an array"):
            optax_spd.spd(anchor={**PRETRAINED, "bias": gap}).init(PARAMS)
    with pytest.raises(TypeError, match="ShapeDtypeStruct at 'bias'"):
        optax_spd.spd(anchor=jax.eval_shape(lambda: PARAMS)).init(PARAMS)


def test_resolve_anchor_asks_only_for_what_is_needed() -> None:
    flat = policy.trees.flatten(PARAMS)
    leaves = policy.resolve_anchor(
        "argument", None, {"anchor": {"kernel": 7 * jnp.ones((2, 3))}}, flat, [False, True]
    )
    assert leaves[0] is None
    assert leaves[1].shape == (2, 3)
