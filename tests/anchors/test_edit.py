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
from flax import jax_utils, nnx
from jax.sharding import NamedSharding, PartitionSpec as P

import optax_spd
from optax_spd.anchors import policy

PARAMS = {
    "dense": {"bias": jnp.arange(3.0), "kernel": jnp.arange(6.0).reshape(2, 3) - 2},
    "head": jnp.ones(2),
}
PRETRAINED = jax.tree.map(lambda x: 0.5 * x + 1, PARAMS)


def stages() -> optax.GradientTransformation:
    return optax_spd.chain(optax.sgd(0.2, momentum=0.9), optax_spd.spd(1.0))


BOXES: dict[str, Callable[[Any], Any]] = {
    "dict": lambda tree: tree,
    "FrozenDict": flax.core.freeze,
    "nnx.State": lambda tree: nnx.State(jax.tree.map(nnx.Param, tree)),
    "partitioned": functools.partial(
        jax.tree.map, lambda x: nn.Partitioned(x, names=(None,) * x.ndim)
    ),
    "numpy": functools.partial(jax.tree.map, np.asarray),
}


@pytest.mark.parametrize("box", BOXES)
def test_a_new_anchor_may_be_in_any_container(box: str) -> None:
    """(In whatever wrappers the state is: tests/contract/test_wrappers.py.)"""
    state = stages().init(PARAMS)
    for found in (state, optax_spd.drop_anchor(state)):
        after = optax_spd.set_anchor(found, BOXES[box](PRETRAINED))
        assert jax.tree.structure(after) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, after[1].anchor, PRETRAINED)


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


def test_what_a_partial_restore_left_is_an_error_until_it_is_set() -> None:
    tx = stages()
    state = tx.init(PARAMS)
    kernel_only = {"bias": None, "kernel": PARAMS["dense"]["kernel"]}
    half = (state[0], state[1]._replace(anchor=PARAMS | {"dense": kernel_only}))
    with pytest.raises(ValueError, match=r"no anchor at 'dense/bias'.*call set_anchor"):
        tx.update(PARAMS, half, PARAMS)
    mended = optax_spd.set_anchor(half, PRETRAINED)
    np.testing.assert_array_equal(mended[1].anchor["dense"]["bias"], PRETRAINED["dense"]["bias"])
    for anchor in (None, {"dense": None, "head": PARAMS["head"]}):
        lost = (state[0], state[1]._replace(anchor=anchor))
        with pytest.raises(ValueError, match="the new anchor has a whole subtree"):
            optax_spd.set_anchor(lost, PRETRAINED)
    dropped = optax_spd.drop_anchor(state)
    with pytest.raises(ValueError, match="anchor is None at 'head', where params has an array"):
        optax_spd.set_anchor(dropped, {**PRETRAINED, "head": None})
    # Where the parameters have None nothing is missing.
    params = {"kernel": jnp.ones(2), "static": None}
    dropped = optax_spd.drop_anchor(tx.init(params))
    assert dropped[1].anchor["static"] is None
    restored = optax_spd.set_anchor(dropped, {"kernel": jnp.zeros(2), "static": None})
    assert jax.tree.structure(restored) == jax.tree.structure(tx.init(params))


def test_a_parameter_that_init_did_not_get_needs_init_again() -> None:
    whole = {"a": jnp.ones(2), "b": jnp.ones(2)}
    masked = optax_spd.l2_sp(0.1, mask={"a": True, "b": False}).init(whole)
    missing = optax_spd.l2_sp(0.1).init({"a": jnp.ones(2), "b": None})
    for state, words in (
        (masked, r"at 'b' \(found MaskedNode\(\)\)\. A mask left .* call init again"),
        (missing, r"at 'b' \(found None\)\. Either the anchor was dropped.* Or init got no"),
    ):
        for found in (state, optax_spd.set_anchor(state, whole)):  # which cannot help
            with pytest.raises(ValueError, match=words):
                optax_spd.l2_sp(0.1).update(whole, found, whole)
    tx = optax_spd.l2_sp(0.1, anchor="argument")
    with pytest.raises(ValueError, match=r"found None\)\. Either .* Or pass an anchor= that has"):
        tx.update(whole, tx.init(whole), whole, anchor={"a": jnp.ones(2), "b": None})


class OwnState(NamedTuple):
    """What a state of :func:`optax_spd.layerwise` looks like; no stage is built with it."""

    count: Any
    anchor: Any
    layer_fingerprint: Any
    norm: Any


def test_a_state_that_was_loaded_before_its_stage_is_built_has_an_anchor() -> None:
    made = optax_spd.adam_spd(0.1).init(PRETRAINED)[1]
    state = OwnState(made.count, made.anchor, made.layer_fingerprint, made.spd_ratio)
    moved = optax_spd.set_anchor(state, jax.tree.map(lambda x: x + 1, PRETRAINED))
    assert optax_spd.layer_report(PRETRAINED, state=state).total == 0
    assert optax_spd.layer_report(PRETRAINED, state=moved).total > 0


@pytest.mark.parametrize("left", [policy.DroppedAnchor(), None, {}, ...], ids=repr)
@pytest.mark.parametrize(
    "params",
    [
        {"a": {}, "b": [(), jnp.ones(2), []], "w": jnp.ones(3)},
        flax.core.freeze({"a": {}, "w": jnp.ones(3)}),
        [eqx.nn.Identity(), eqx.filter(eqx.nn.Linear(2, 3, key=jax.random.key(0)), eqx.is_array)],
        nnx.State({"w": nnx.Param(jnp.ones(3))}),
        {"w": nn.Partitioned(jnp.ones(3), names=(None,))},
        jnp.ones(3),
    ],
    ids=["dict", "FrozenDict", "Equinox", "nnx.State", "partitioned", "an array"],
)
def test_empty_containers_of_the_parameters_are_no_dropped_anchors(params: Any, left: Any) -> None:
    tx = optax_spd.adam_ftp(0.1)
    state = tx.init(params)
    expected = tx.update(params, state, params)
    marked = optax_spd.drop_anchor(state)
    is_marker = lambda node: isinstance(node, policy.DroppedAnchor)
    lost = jax.tree.map(lambda x: left if is_marker(x) else x, marked, is_leaf=is_marker)
    with pytest.raises(ValueError, match="the anchor was dropped; call set_anchor"):
        tx.update(params, lost, params)
    for found in (lost, optax_spd.drop_anchor(lost), state):
        mended = optax_spd.set_anchor(found, params)
        assert jax.tree.structure(mended) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, tx.update(params, mended, params), expected)


def test_a_new_anchor_need_not_have_the_empty_containers() -> None:
    state = stages().init(PARAMS | {"empty": {}})
    mended = optax_spd.set_anchor(optax_spd.drop_anchor(state), PRETRAINED)
    assert jax.tree.structure(mended) == jax.tree.structure(state)
    # What is left for an array looks the same, and is still an error.
    half = stages().init(PARAMS)[1]._replace(anchor=PARAMS | {"head": {}})
    with pytest.raises(ValueError, match=r"other parameters than its anchor has \(2 arrays"):
        optax_spd.set_anchor(half, {"dense": PRETRAINED["dense"]})


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
    masked = optax_spd.spd(mask=optax_spd.path_mask("dense")).init(PARAMS)
    optax_spd.set_anchor(masked, wrong)  # what the mask leaves out is not looked at
    dropped = optax_spd.drop_anchor(state)
    late = optax_spd.set_anchor(dropped, wrong)  # a dropped anchor has no shape; the update has
    with pytest.raises(ValueError, match=r"'head': anchor has shape \(3,\)"):
        stages().update(PARAMS, late, PARAMS)


def test_a_replicated_state_is_to_be_unreplicated_first() -> None:
    state = stages().init(PARAMS)
    replicated = jax_utils.replicate(state)
    with pytest.raises(ValueError, match=r"one more leading axis, of size 8.* unreplicate first"):
        optax_spd.set_anchor(replicated, PRETRAINED)
    one = optax_spd.set_anchor(jax_utils.unreplicate(replicated), PRETRAINED)
    jax.tree.map(np.testing.assert_array_equal, one[1].anchor, PRETRAINED)
    optax_spd.set_anchor(replicated, jax_utils.replicate(PRETRAINED))
    # Another shape of one array, or other sizes, are no devices.
    stacked = {
        name: jnp.stack([x] * n) for n, (name, x) in enumerate(one[1].anchor["dense"].items(), 2)
    }
    for anchor in (stacked, {**stacked, "bias": jnp.ones(3)}):
        with pytest.raises(ValueError, match="has shape") as error:
            optax_spd.set_anchor(stages().init(anchor), one[1].anchor["dense"])
        assert "unreplicate" not in str(error.value)


def test_the_whole_state_of_an_nnx_optimizer_is_no_optimizers_state() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax_spd.adam_spd(0.3), wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"give optimizer.opt_state"):
        optax_spd.set_anchor(nnx.state(optimizer), nnx.to_pure_dict(nnx.state(model, nnx.Param)))


class Normalized(nnx.Module):
    def __init__(self) -> None:
        self.dense = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(0))


def test_more_than_the_parameters_of_a_model_is_too_much() -> None:
    model, tx = Normalized(), optax_spd.adam_spd(0.1)
    params = nnx.state(model, nnx.Param)
    for state in (tx.init(params), optax_spd.drop_anchor(tx.init(params))):
        with pytest.raises(ValueError, match=r"a leaf at .*nnx.state\(model, nnx.Param\)"):
            optax_spd.set_anchor(state, nnx.state(model))
        optax_spd.set_anchor(state, params)
    with pytest.raises(ValueError, match=r"a leaf at .*nnx.state\(model, nnx.Param\)"):
        optax_spd.adam_spd(0.1, anchor=nnx.state(model)).init(params)


@pytest.mark.parametrize(
    "tx",
    [
        optax_spd.adam_spd(0.1),
        optax_spd.adamw_l2_sp(0.1),
        optax_spd.sgd_ftp(0.1),
        optax_spd.tpgm(radii=1.0),
        optax_spd.with_anchor(optax_spd.adam_spd(0.1, anchor="argument")),
    ],
    ids=["spd", "l2_sp", "ftp", "tpgm", "with_anchor"],
)
def test_the_anchor_may_be_a_whole_model_of_which_init_got_a_part(tx: Any) -> None:
    weights = {"kernel": jnp.ones((2, 3)), "table": jnp.arange(3)}
    settings = {"activation": jnp.tanh, "rate": 0.5, "statistics": jnp.ones(4), "training": False}
    expected = tx.init(weights | dict.fromkeys(settings))
    start = tx.init(jax.tree.map(jnp.zeros_like, weights) | dict.fromkeys(settings))
    for state in (start, optax_spd.drop_anchor(start)):
        found = optax_spd.set_anchor(state, weights | settings)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
