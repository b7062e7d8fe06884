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


def buffers(tree: Any) -> list[int]:
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)]


def assert_close(actual: Any, desired: Any, atol: float = 1e-6) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for a, d in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(d, np.float64), atol=atol)


def inner() -> optax.GradientTransformation:
    return optax.sgd(0.2, momentum=0.9)


@pytest.mark.parametrize("stage", [optax_spd.spd, lambda **kw: optax_spd.l2_sp(0.1, **kw)])
def test_the_policies_agree_where_they_mean_the_same_anchor(stage: Any) -> None:
    def train(policy: Any, **extra: Any) -> Any:
        return trajectory(optax_spd.chain(inner(), stage(anchor=policy)), **extra)[0]

    zeros = optax.tree.zeros_like(PARAMS)
    assert_close(train("initial"), train(PARAMS))
    assert_close(train("argument", anchor=PRETRAINED), train(PRETRAINED))
    assert_close(train("zero"), train(zeros))
    # and the anchor matters
    assert not np.allclose(train("initial")["kernel"], train(PRETRAINED)["kernel"], atol=1e-3)
    assert not np.allclose(train("initial")["kernel"], train("zero")["kernel"], atol=1e-3)


def test_spd_fires_in_these_trajectories() -> None:
    for anchor in ("initial", "zero", PRETRAINED):
        _, fired = trajectory(optax_spd.chain(inner(), optax_spd.spd(anchor=anchor)))
        assert fired >= 2, anchor


def test_what_the_state_holds() -> None:
    size = leaf_bytes(PARAMS)

    def held(**kwargs: Any) -> int:
        state = optax_spd.spd(**kwargs).init(PARAMS)
        return leaf_bytes(state.anchor)

    assert held() == held(anchor=PRETRAINED) == size
    assert held(anchor_dtype=jnp.bfloat16) == size // 2
    assert held(anchor="zero") == held(anchor="argument") == 0


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("anchor", ["initial", "tree"])
def test_every_array_of_the_state_is_its_own_buffer(anchor: str, jitted: bool) -> None:
    params = jax.tree.map(jnp.copy, PARAMS)
    chosen = "initial" if anchor == "initial" else params
    tx = optax_spd.with_gradient(
        optax_spd.with_anchor(
            optax.chain(optax_spd.l2_sp(0.1, anchor=chosen), inner(), optax_spd.spd(anchor=chosen)),
            chosen,
        )
    )
    state = (jax.jit(tx.init) if jitted else tx.init)(params)
    pointers = buffers(params) + buffers(state)
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("donated", [(0, 1), (1,)])
@pytest.mark.parametrize("recipe", [optax_spd.adam_spd, optax_spd.adamw_l2_sp])
def test_a_donated_step_runs(recipe: Any, donated: tuple[int, ...]) -> None:
    tx = recipe(0.1)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    plain, plain_state = PARAMS, tx.init(PARAMS)
    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    first = state
    run = jax.jit(step, donate_argnums=donated)
    for sign in (1.0, 1.0, -1.0, -1.0):
        grads = optax.tree.full_like(PARAMS, sign)
        plain, plain_state = step(plain, plain_state, grads)
        params, state = run(params, state, grads)
    assert_close(params, plain)
    assert all(x.is_deleted() for x in jax.tree.leaves(optax.tree.get(first, "anchor")))


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


def test_with_anchor_reaches_masked_stages() -> None:
    mask = {"bias": False, "kernel": True}
    for compatible in (False, True):
        stage = optax.masked(
            optax_spd.spd(anchor="argument"), mask, mask_compatible_extra_args=compatible
        )
        shared = optax_spd.with_gradient(
            optax_spd.with_anchor(optax.chain(inner(), stage), PRETRAINED)
        )
        apart = optax_spd.chain(inner(), optax_spd.spd(anchor=PRETRAINED, mask=mask))
        params, fired = trajectory(shared)
        assert fired > 0
        assert_close(params, trajectory(apart)[0])


@pytest.mark.parametrize("anchor_dtype", [jnp.bfloat16, "float16", np.float32])
def test_anchor_dtype_is_what_is_stored_and_used(anchor_dtype: Any) -> None:
    rounded = jax.tree.map(lambda x: x.astype(anchor_dtype), PRETRAINED)
    tx = optax_spd.chain(inner(), optax_spd.spd(anchor=PRETRAINED, anchor_dtype=anchor_dtype))
    held = optax.tree.get(tx.init(PARAMS), "anchor")
    assert {x.dtype for x in jax.tree.leaves(held)} == {jnp.dtype(anchor_dtype)}
    params, fired = trajectory(tx)
    assert fired > 0
    reference = optax_spd.chain(inner(), optax_spd.spd(anchor=jax.tree.map(np.float32, rounded)))
    assert_close(params, trajectory(reference)[0])


def test_anchor_dtype_float64_without_x64_is_float32() -> None:
    held = optax_spd.spd(anchor_dtype=jnp.float64).init(PARAMS).anchor
    assert {str(x.dtype) for x in jax.tree.leaves(held)} == {"float32"}


def test_bfloat16_stores_a_bfloat16_checkpoint_exactly() -> None:
    checkpoint = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PRETRAINED)
    held = optax_spd.spd(anchor=checkpoint, anchor_dtype=jnp.bfloat16).init(PARAMS).anchor
    assert_close(held, checkpoint, atol=0)


def test_integers_keep_their_dtype_under_anchor_dtype() -> None:
    params = {"kernel": jnp.ones(2), "steps": jnp.arange(3)}
    held = optax_spd.spd(anchor_dtype=jnp.bfloat16).init(params).anchor
    assert (held["kernel"].dtype, held["steps"].dtype) == (jnp.bfloat16, jnp.int32)


def test_numpy_trees_serve_as_params_and_anchor() -> None:
    numpy = jax.tree.map(np.asarray, PARAMS)
    tx = optax_spd.chain(inner(), optax_spd.spd(anchor=jax.tree.map(np.asarray, PRETRAINED)))
    plain = optax_spd.chain(inner(), optax_spd.spd(anchor=PRETRAINED))
    params, fired = trajectory(tx, numpy)
    assert fired > 0
    assert_close(params, trajectory(plain)[0])
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(tx.init(numpy)))


def test_init_answers_shape_dtype_structs_in_kind() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, P("x"))
    params = {
        "kernel": jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=sharding),
        "bias": jax.ShapeDtypeStruct((2,), jnp.bfloat16),
    }
    for anchor, dtype in (("initial", None), ("initial", jnp.bfloat16)):
        held = optax_spd.adam_spd(0.1, anchor=anchor, anchor_dtype=dtype).init(params)[1].anchor
        expected = jax.tree.map(
            lambda p, dtype=dtype: (p.shape, jnp.dtype(dtype or p.dtype), p.sharding), params
        )
        assert jax.tree.map(lambda s: (s.shape, s.dtype, s.sharding), held) == expected
    real = {"kernel": np.ones((8, 2), np.float32), "bias": np.ones(2, np.float32)}
    held = optax_spd.spd(anchor=real).init(params).anchor
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(held))


def test_eval_shape_and_jit_agree_with_eager_init() -> None:
    tx = optax_spd.adam_spd(0.1, anchor=PRETRAINED)
    eager, jitted = tx.init(PARAMS), jax.jit(tx.init)(PARAMS)
    assert_close(jitted, eager, atol=0)
    shapes = jax.eval_shape(tx.init, PARAMS)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), eager
    )


@pytest.mark.parametrize("jitted", [False, True])
def test_the_anchor_takes_the_sharding_of_the_params(jitted: bool) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, P("x", None))
    params = {"kernel": jax.device_put(jnp.ones((8, 4)), sharding)}
    numpy = {"kernel": np.zeros((8, 4), np.float32)}
    state = optax_spd.spd().init(params) if not jitted else jax.jit(optax_spd.spd().init)(params)
    assert state.anchor["kernel"].sharding.is_equivalent_to(sharding, 2)
    if not jitted:
        for loose in (numpy, jax.tree.map(jnp.asarray, numpy)):  # neither says where it belongs
            assert optax_spd.spd(anchor=loose).init(params).anchor["kernel"].sharding == sharding


def test_tree_map_params_takes_the_anchor_for_parameters() -> None:
    tx = optax_spd.with_gradient(
        optax_spd.with_anchor(
            optax.chain(
                optax.adam(0.1),
                optax_spd.spd(mask=optax_spd.path_mask("kernel")),
                optax_spd.spd(anchor=PRETRAINED),
                optax_spd.spd(anchor="zero"),
                optax_spd.l2_sp(0.1),
            )
        )
    )
    state = tx.init(PARAMS)
    labels = {"bias": "b", "kernel": "k"}
    marked = optax.tree_map_params(
        tx,
        lambda _, label: label,
        state,
        labels,
        transform_non_params=lambda _: None,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    found = [anchor for _, anchor in optax.tree.get_all_with_path(marked, "anchor")]
    assert found.count(labels) == 4  # with_anchor, both spd with an anchor, l2_sp
    assert found.count(optax.EmptyState()) == 1
    assert jax.tree.leaves(marked).count("k") == 2 + 4  # Adam's two moments and four anchors


def test_a_jitted_init_bakes_a_tree_in_but_initial_copies() -> None:
    consts = jax.make_jaxpr(optax_spd.spd().init)(PARAMS).consts
    assert leaf_bytes(consts) == 0
    consts = jax.make_jaxpr(optax_spd.spd(anchor=PRETRAINED).init)(PARAMS).consts
    assert leaf_bytes(consts) == leaf_bytes(PRETRAINED)


@pytest.mark.parametrize(
    ("anchor", "anchor_dtype", "message"),
    [
        ("pretrained", None, "anchor must be one of 'initial', 'zero', 'argument'"),
        (None, None, "anchor must be one of"),
        ("zero", jnp.bfloat16, "with anchor='zero' the state stores none"),
        ("argument", jnp.float32, "with anchor='argument' the state stores none"),
        ("initial", jnp.int8, "anchor_dtype must be a floating dtype, got int8"),
    ],
)
def test_wrong_arguments(anchor: Any, anchor_dtype: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optax_spd.spd(anchor=anchor, anchor_dtype=anchor_dtype)
    with pytest.raises(ValueError, match=message):
        optax_spd.l2_sp(0.1, anchor=anchor, anchor_dtype=anchor_dtype)


@pytest.mark.parametrize("anchor", ["zero", "argument", "none", None])
def test_with_anchor_takes_initial_or_a_tree(anchor: Any) -> None:
    with pytest.raises(ValueError, match="anchor must be one of 'initial' or a tree"):
        optax_spd.with_anchor(optax.identity(), anchor)


def test_a_tree_that_does_not_match_names_the_path() -> None:
    with pytest.raises(ValueError, match="no leaf at 'kernel', where params has one of shape"):
        optax_spd.spd(anchor={"bias": jnp.ones(3)}).init(PARAMS)
    wrong = {"bias": jnp.ones(3), "kernel": jnp.ones((3, 2))}
    with pytest.raises(
        ValueError, match=r"'kernel': anchor has shape \(3, 2\), params has shape \(2, 3\)"
    ):
        optax_spd.spd(anchor=wrong).init(PARAMS)
    extra = {**PRETRAINED, "head": jnp.ones(1)}
    with pytest.raises(ValueError, match="a leaf at 'head', where params has none"):
        optax_spd.spd(anchor=extra).init(PARAMS)
    with pytest.raises(ValueError, match="anchor is None at 'bias', where params has an array"):
        optax_spd.spd(anchor={**PRETRAINED, "bias": None}).init(PARAMS)
    with pytest.raises(TypeError, match="ShapeDtypeStruct at 'bias'"):
        optax_spd.spd(anchor=jax.eval_shape(lambda: PARAMS)).init(PARAMS)


def test_a_missing_argument_is_an_error() -> None:
    tx = optax_spd.spd(anchor="argument")
    with pytest.raises(ValueError, match="anchor='argument', but update got no anchor"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, grad=PARAMS)


def test_resolve_anchor_asks_only_for_what_is_needed() -> None:
    flat = policy.trees.flatten(PARAMS)
    leaves = policy.resolve_anchor(
        "argument", None, {"anchor": {"kernel": 7 * jnp.ones((2, 3))}}, flat, [False, True]
    )
    assert leaves[0] is None
    assert leaves[1].shape == (2, 3)
