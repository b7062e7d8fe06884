"""Frozen arrays: they do not move, they cost no state, and nothing inside ever sees them."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from docs_examples import ROOT, run

import optax_spd

COUNT = 4  # bytes of Adam's or SPD's int32


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def model() -> dict[str, Any]:
    return {
        "embed": {"embedding": normal(0, 4, 3), "scale": normal(1, 3)},
        "head": {"bias": normal(2, 3), "kernel": normal(3, 4, 3)},
    }


HEAD = 4 * (3 + 12)  # bytes of what trains
EMBEDDING = 4 * (12 + 3)  # bytes of what is frozen
EMBED = {"embed": {"embedding": True, "scale": True}, "head": {"bias": False, "kernel": False}}


def gradients(params: Any, seed: int = 0) -> Any:
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten([normal(20 + seed + i, *np.shape(x)) for i, x in enumerate(leaves)])


def train(tx: optax.GradientTransformation, params: Any, steps: int = 3) -> Any:
    """The parameters after some steps on given gradients, and the state."""
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def state_bytes(tx: optax.GradientTransformation, params: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tx.init(params)))


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


# What it does ------------------------------------------------------------------------------------

INNER = {
    "clipped adamw": optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1)),
    "adam_spd": optax_spd.adam_spd(0.1),
    "tpgm": optax.chain(optax.adam(0.1), optax_spd.tpgm(radii=0.5)),
}


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_the_rest_trains_as_if_the_frozen_arrays_were_not_there(inner: Any) -> None:
    params = model()
    frozen = optax_spd.with_frozen(inner, "^embed/")
    found, state = train(frozen, params)
    # gradients() numbers the arrays, so the head's alone need the same numbers.
    alone = {"embed": {"embedding": None, "scale": None}, "head": params["head"]}
    grads = [gradients(params, step)["head"] for step in range(3)]
    expected, inner_state = alone["head"], inner.init(alone["head"])
    for grad in grads:
        updates, inner_state = jax.jit(inner.update)(grad, inner_state, expected)
        expected = optax.apply_updates(expected, updates)
    assert_equal(found["embed"], params["embed"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found["head"], expected)
    assert [x.shape for x in jax.tree.leaves(state)] == [
        x.shape for x in jax.tree.leaves(inner_state)
    ]


@pytest.mark.parametrize(
    ("inner", "size"),
    [
        (optax.sgd(0.1), 0),
        (optax.sgd(0.1, momentum=0.9), HEAD),
        (optax.adam(0.1), 2 * HEAD + COUNT),
        # Two moments and the anchor of what trains; two counts and a fingerprint; per array r and
        # the number of times it fired.
        (optax_spd.adam_spd(0.1), 3 * HEAD + 3 * COUNT + 2 * 8),
        # Accumulated gradients are of what trains, too; and some counters.
        (optax.MultiSteps(optax.adam(0.1), 2), 3 * HEAD + 3 * COUNT),
    ],
    ids=["sgd", "momentum", "adam", "adam_spd", "MultiSteps"],
)
def test_frozen_arrays_have_no_state(inner: Any, size: int) -> None:
    params = model()
    assert state_bytes(optax_spd.with_frozen(inner, "^embed/"), params) == size
    assert state_bytes(inner, params) >= size + EMBEDDING * (size // HEAD)


class Mask(eqx.Module):
    """A tree of bools that, like an Equinox model of bools, is callable."""

    embed: Any
    head: Any

    def __call__(self) -> Any:
        raise AssertionError("the tree was taken for a function of params")


FROZEN: dict[str, Any] = {
    "pattern": "^embed/",
    "patterns": ["embedding$", "^embed/scale"],
    "set of patterns": {"embedding$", "^embed/scale"},
    "tree": EMBED,
    "callable tree": Mask(**EMBED),
    "function": lambda params: {"embed": True, "head": False},
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_every_form_of_frozen_freezes_the_same(frozen: Any) -> None:
    params = model()
    tx = optax_spd.with_frozen(optax.sgd(1.0, momentum=0.9), frozen)
    updates, state = tx.update(params, tx.init(params), params)
    assert not any(np.any(u) for u in jax.tree.leaves(updates["embed"]))
    jax.tree.map(lambda u, p: np.testing.assert_array_equal(u, -p), updates["head"], params["head"])
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == HEAD
    without, _ = tx.update(params, tx.init(params))  # SGD needs no params, and then nor does this
    assert_equal(without, updates)


@pytest.mark.parametrize("gap", [None, optax.MaskedNode()], ids=["None", "MaskedNode"])
@pytest.mark.parametrize("with_params", [True, False])
def test_a_frozen_array_needs_no_gradient(gap: Any, with_params: bool) -> None:
    params = model()
    tx = optax_spd.with_frozen(optax.sgd(1.0, momentum=0.9), "^embed/embedding")
    grads = params | {"embed": {"embedding": gap, "scale": params["embed"]["scale"]}}
    updates, _ = tx.update(grads, tx.init(params), params if with_params else None)
    assert updates["embed"]["embedding"] == gap
    np.testing.assert_array_equal(updates["embed"]["scale"], -params["embed"]["scale"])


def test_a_nan_gradient_of_a_frozen_array_reaches_nothing() -> None:
    params = model()
    tx = optax_spd.with_frozen(
        optax_spd.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1), optax_spd.spd()), "embed"
    )
    grads = gradients(params)
    bad = grads | {"embed": jax.tree.map(lambda g: np.full_like(g, np.nan), grads["embed"])}
    state = tx.init(params)
    update = jax.jit(tx.update)
    assert_equal(update(bad, state, params), update(grads, state, params))
    assert not any(np.any(u) for u in jax.tree.leaves(update(bad, state, params)[0]["embed"]))


def test_dtypes_and_structure_stay() -> None:
    half = jnp.ones(2, jnp.bfloat16)
    params = {"embed": half, "ids": jnp.arange(3), "head": half, "static": None}
    grads = params | {"ids": np.zeros(3, jax.dtypes.float0)}
    tx = optax_spd.with_frozen(optax.adam(0.1), ["embed", "ids"])
    updates, _ = tx.update(grads, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert updates["embed"].dtype == updates["head"].dtype == jnp.bfloat16
    assert updates["ids"].dtype == jax.dtypes.float0
    assert not np.any(updates["embed"])


# Extra arguments and anchors ---------------------------------------------------------------------


def test_a_shared_anchor_may_stand_outside_or_inside() -> None:
    stages = optax.chain(optax.adam(0.1), optax_spd.spd(anchor="argument"))
    frozen = optax_spd.with_frozen(stages, "embed")
    outside = optax_spd.with_gradient(optax_spd.with_anchor(frozen))
    inside = optax_spd.with_gradient(optax_spd.with_frozen(optax_spd.with_anchor(stages), "embed"))
    recipe = optax_spd.with_frozen(optax_spd.adam_spd(0.1), "embed")
    expected, state = train(recipe, model())
    assert optax.tree.get(state, "anchor")["embed"]["scale"] == optax.MaskedNode()
    for tx in (outside, inside):
        found, _ = train(tx, model())
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_tpgm_with_validation_data_stands_behind_it() -> None:
    # Inside, it would not see the whole tree for validation_fn, and says so.
    params = {"embed": jnp.ones(3), "head": jnp.ones(3)}
    loss = lambda params, batch: jnp.sum((params["head"] * params["embed"] - batch) ** 2)
    validation = {"validation_fn": loss, "validation_batches": jnp.zeros((2, 3))}
    tpgm = optax_spd.tpgm(mask=optax_spd.path_mask("head"))
    tx = optax.chain(optax_spd.with_frozen(optax.adam(0.1), "embed"), tpgm)
    updates, _state = tx.update(params, tx.init(params), params, **validation)
    assert not np.any(updates["embed"])
    assert np.all(updates["head"] < 0)
    inside = optax_spd.with_frozen(optax.chain(optax.adam(0.1), optax_spd.tpgm()), "embed")
    with pytest.raises(ValueError, match="validation_fn"):
        inside.update(params, inside.init(params), params, **validation)


# sgd_freeze_embed --------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("nesterov", [True, False])
def test_it_is_sgd_on_the_rest(momentum: Any, nesterov: bool) -> None:
    params = {"wte": {"embedding": normal(0, 3, 2)}, "h": {"kernel": normal(1, 2, 2)}}
    rate = optax.linear_schedule(0.2, 0.1, 2)
    found, state = train(optax_spd.sgd_freeze_embed(rate, momentum, nesterov), params)
    expected, _ = train(optax.sgd(rate, momentum, nesterov), params)
    # A momentum of what trains, if there is one.
    assert [x.shape for x in jax.tree.leaves(state) if x.ndim] == [(2, 2)] * bool(momentum)
    assert_equal(found["wte"], params["wte"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found["h"], expected["h"]
    )


# Bad input ---------------------------------------------------------------------------------------


def test_a_pattern_that_matches_nothing_is_named_with_the_nearest_paths() -> None:
    for frozen in ("embed/kernels", ["head", "embed/kernels"]):
        with pytest.raises(ValueError, match="'embed/kernels' matches no") as error:
            optax_spd.with_frozen(optax.sgd(0.1), frozen).init(model())
        assert "'embed/embedding'" in str(error.value)
    with pytest.raises(ValueError, match=r"matches no parameter path.*'dense/kernel'"):
        optax_spd.sgd_freeze_embed(0.1).init({"dense": {"kernel": jnp.ones(2)}})


@pytest.mark.parametrize(
    ("frozen", "error", "words"),
    [
        ("", ValueError, "True for every parameter, so nothing would be trained"),
        (None, TypeError, "frozen must hold True or False, got None at 'embed/embedding'"),
        ({"embed": True}, ValueError, "frozen has no entry for .* 'head/bias'"),
        ([], ValueError, "frozen has no entry"),
    ],
)
def test_bad_masks(frozen: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        optax_spd.with_frozen(optax.sgd(0.1), frozen).init(model())


def test_a_factory_is_refused() -> None:
    with pytest.raises(TypeError, match="A factory must be called"):
        optax_spd.with_frozen(optax.sgd, "embed")


def test_one_false_for_all_is_refused() -> None:
    params = {"embed": jnp.ones((2, 2)), "head": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"one False for the whole tree.*static_args"):
        optax_spd.with_frozen(optax.sgd(0.1), False).init(params)
    # inject_hyperparams calls the function with a step count.
    matrices = lambda tree: jax.tree.map(lambda x: x.ndim == 2, tree)
    tx = optax.inject_hyperparams(optax_spd.sgd_freeze_embed)(0.1, embedding=matrices)
    with pytest.raises(ValueError, match="static_args"):
        tx.init(params)


def as_restored(state: Any) -> Any:
    """As Orbax does: None where the checkpoint has no array."""
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    return jax.tree.map(lambda x: None if is_masked(x) else x, state, is_leaf=is_masked)


def test_a_state_saved_with_others_frozen_says_so() -> None:
    params = {"embed": jnp.ones((4, 2)), "head": jnp.ones(2)}
    saved = optax_spd.sgd_freeze_embed(0.1, embedding="^embed").init(params)
    tx = optax_spd.sgd_freeze_embed(0.1, embedding="^head")
    with pytest.raises(ValueError, match=r"None at .*trace/embed.* other parameters frozen"):
        tx.update(params, as_restored(saved), params)


def test_a_state_made_of_a_filtered_tree_says_so() -> None:
    params = {"embed": jnp.ones(2), "head": jnp.ones(2), "scale": jnp.ones(2)}
    tx = optax_spd.with_frozen(optax.adam(0.1), "embed")
    state = tx.init(params | {"scale": None})
    with pytest.raises(ValueError, match=r"init makes an array for the parameter 'scale'.*as None"):
        tx.update(params, state, params)
    # Where no gradient comes, nothing is lost.
    updates, _ = tx.update(params | {"scale": None}, state, params)
    assert updates["scale"] is None


def test_a_mask_of_the_trained_part_fits_the_whole_model() -> None:
    """Equinox's filtered model has None for an array that is not trained."""
    trained = {"embed": jnp.ones(2), "head": jnp.ones(2), "statistics": None}
    mask = {"embed": True, "head": False, "statistics": None}
    tx = optax_spd.with_frozen(optax.adam(0.1), mask)
    state = tx.init(trained)
    whole = tx.update(trained, state, trained | {"statistics": jnp.ones(3)})
    assert_equal(whole, tx.update(trained, state, trained))
    with pytest.raises(TypeError, match="got None at 'statistics'"):
        tx.init(trained | {"statistics": jnp.ones(3)})


def test_an_anchor_that_is_missing_is_the_stage_s_to_name() -> None:
    params = {"embed": jnp.ones(2), "head": jnp.ones(2)}
    tx = optax_spd.with_frozen(optax_spd.chain(optax.sgd(0.1), optax_spd.spd()), "embed")
    state = jax.tree.map(lambda x: None if x.shape == (2,) else x, tx.init(params))
    with pytest.raises(ValueError, match=r"no anchor at 'head'.*call set_anchor"):
        tx.update(params, state, params)


NO_STATE = optax.GradientTransformation(lambda params: None, lambda u, s, p=None: (u, s))
NO_STATES = {
    "second of a chain": optax.chain(optax.sgd(0.1), NO_STATE),
    "alone": NO_STATE,
    "twice": optax.chain(NO_STATE, NO_STATE),
    "beside a momentum": optax.chain(optax.trace(0.9), NO_STATE),
}


@pytest.mark.parametrize("inner", NO_STATES.values(), ids=NO_STATES)
def test_a_stage_may_have_none_for_its_state(inner: Any) -> None:
    """The paths in a chain's state and those of a list of parameters are numbers."""
    params = [jnp.ones(2), jnp.ones(2)]
    tx = optax_spd.with_frozen(inner, [True, False])
    still, moving = tx.update(params, tx.init(params), params)[0]
    assert not np.any(still)
    assert np.all(moving)


def test_a_list_of_parameters_may_lose_an_array_too() -> None:
    params = [jnp.ones(2), jnp.ones(2)]
    inner = optax.chain(NO_STATE, optax.trace(0.9), NO_STATE)
    saved = as_restored(optax_spd.with_frozen(inner, [False, True]).init(params))
    tx = optax_spd.with_frozen(inner, [True, False])
    with pytest.raises(ValueError, match=r"None at '.*trace/1'.* the parameter '1'"):
        tx.update(params, saved, params)


def test_the_docs_unfreeze_layer_by_layer_and_carry_the_momentum() -> None:
    names = run(ROOT / "docs" / "freezing.md")
    params, tuned = names["params"], names["model"]
    trace = optax.tree.get(names["state"], "trace")
    # The gradient is 1, and each phase is three steps of SGD with a rate of 0.01.
    for name, steps in {"head": 9, "layer_1": 6, "layer_0": 3}.items():
        momenta = np.array([(1 - 0.9**k) / 0.1 for k in range(1, steps + 1)])
        np.testing.assert_allclose(trace[name]["kernel"], momenta[-1], rtol=1e-5)
        moved = params[name]["kernel"] - tuned[name]["kernel"]
        np.testing.assert_allclose(moved, 0.01 * momenta.sum(), rtol=1e-4)
    assert trace["embeddings"]["word_embeddings"] == optax.MaskedNode()
    assert_equal(tuned["embeddings"], params["embeddings"])
