"""Every kind of leaf and dtype that a method may meet, and what it says of wrong input."""

import re
from typing import Any

import contract_methods
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract_methods import METHODS, every_method
from contract_runs import GRADS, PRETRAINED, at, step_of, vectors
from tpgm_steps import projects_only

import optax_spd

LAYERS = optax_spd.stacked("^blocks/")
STAGES = every_method(where=lambda method: method.is_stage)
PARTIAL_STAGES = every_method("parts", where=lambda method: method.is_stage)

# Dtypes -------------------------------------------------------------------------------------------

MIXED = {
    "blocks": {"bias": "float16", "kernel": "bfloat16"},
    "embed": {"embedding": "float32"},
    "head": {"kernel": "bfloat16"},
}
WIDE = MIXED | {"head": {"kernel": "float64"}}


def typed(dtypes: Any) -> Any:
    """The model in one dtype or in several."""
    if isinstance(dtypes, str):
        return jax.tree.map(lambda x: jnp.asarray(x, dtypes), PRETRAINED)
    return jax.tree.map(jnp.asarray, PRETRAINED, dtypes)


def assert_keeps_dtypes(name: str, dtypes: Any, widest: str) -> None:
    tx, params = contract_methods.optimizer(name), typed(dtypes)
    state = jax.eval_shape(tx.init, params)
    extra = contract_methods.validation(name, params)
    updates, after = jax.eval_shape(
        lambda u, s, p: tx.update(u, s, p, **extra), params, state, params
    )
    assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(lambda x: x.dtype, params)
    assert after == state
    decided = jax.eval_shape(lambda state: vectors(name, state), state)
    assert {str(x.dtype) for x in decided.values()} <= {widest}


@every_method()
def test_updates_have_the_dtype_of_their_parameter_and_decisions_float32(name: str) -> None:
    for dtypes in ("bfloat16", "float16", "float32", MIXED):
        assert_keeps_dtypes(name, dtypes, "float32")


@every_method()
def test_x64_changes_only_what_is_float64(name: str, x64: None) -> None:
    for dtypes in ("bfloat16", "float32", MIXED):
        assert_keeps_dtypes(name, dtypes, "float32")
    for dtypes in ("float64", WIDE):
        assert_keeps_dtypes(name, dtypes, "float64")


@every_method("half precision", where=lambda method: method.is_stage)
def test_half_precision_decides_as_float64_on_the_same_numbers(name: str, x64: None) -> None:
    """Sums are in float32 or wider, and a half-precision update is rounded only once."""
    method = METHODS[name]
    tx = method.stage(layers=LAYERS, state_dtype=jnp.float32)
    push = jax.tree.map(lambda x: x / 4, at(GRADS, 0))
    # The deviation grows, and so do radii.
    away = lambda step: jax.tree.map(lambda x, y: x + step * y, PRETRAINED, push)

    def decide(dtype: Any) -> Any:
        # Numbers that bfloat16 and float16 both hold.
        cast = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(dtype), tree)
        state, found = tx.init(cast(PRETRAINED)), []
        for step in range(3):
            params = cast(away(step))
            extra = extra_args(name, cast(push))
            updates, state = tx.update(cast(push), state, params, **extra)
            found.append((updates, vectors(name, state)))
        return found

    half = (jnp.bfloat16, jnp.float16)
    runs = jax.jit(lambda: [decide(dtype) for dtype in (jnp.float64, *half)])()
    for dtype, run in zip(half, runs[1:], strict=True):
        eps = float(jnp.finfo(dtype).eps)
        for (updates, seen), (expected, decided) in zip(run, runs[0], strict=True):
            for field, vector in decided.items():
                np.testing.assert_allclose(seen[field], vector, rtol=1e-4, atol=1e-6)
            for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
                assert x.dtype == dtype
                np.testing.assert_allclose(np.asarray(x, float), y, rtol=eps, atol=1e-5)


def extra_args(name: str, grads: Any) -> dict[str, Any]:
    return {"grad": grads} if METHODS[name].gradient else {}


# Leaves that are no layers ------------------------------------------------------------------------

MATRIX = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
PASSING = {
    "count": np.arange(3),
    "empty": np.ones((0, 3), np.float32),
    "flag": np.ones(2, bool),
    "masked": optax.MaskedNode(),
    "none": None,
}


@projects_only
@STAGES
def test_leaves_that_are_no_layers_pass_through(name: str) -> None:
    tx = METHODS[name].stage()
    layers = {"blocks": {"0": MATRIX, "1": MATRIX.T**3}}
    halved = {"blocks": jax.tree.map(lambda x: x / 2, layers["blocks"])}
    state, params = tx.init(halved | PASSING), layers | PASSING
    grads = params | {"blocks": {"0": MATRIX, "1": 2 * MATRIX.T**3}}
    for _ in range(2):
        updates, state = tx.update(params, state, params, **extra_args(name, grads))
    for key, value in PASSING.items():
        assert updates[key] is value, key
    assert not np.array_equal(updates["blocks"]["0"], MATRIX)
    if METHODS[name].has_anchor:
        anchor = optax.tree.get_all_with_path(state, "anchor")[0][1]
        assert anchor["none"] is None
        assert anchor["masked"] == optax.MaskedNode()


# What a whole model holds besides its trained parameters.
SETTINGS = {
    "activation": jnp.tanh,
    "frequencies": np.ones(2, np.complex64),
    "name": "encoder",
    "rate": 0.5,
    "statistics": np.ones(3, np.float32),
    "table": np.arange(3),
    "training": False,
}


@every_method()
def test_a_whole_model_trains_as_its_trained_parameters(name: str) -> None:
    """``init`` gets the trained parameters, ``update`` a model with functions and numbers."""
    tx, untrained = contract_methods.optimizer(name), dict.fromkeys(SETTINGS)
    batches = contract_methods.validation(name, PRETRAINED).get("validation_batches")

    def loss(model: Any, batch: Any) -> jax.Array:
        return contract_methods.half_distance({key: model[key] for key in batch}, batch)

    extra = {"validation_fn": loss, "validation_batches": batches} if batches else {}

    def train(others: Any) -> Any:
        params, state = PRETRAINED, tx.init(PRETRAINED | untrained)
        for index in range(2):
            grads = at(GRADS, index) | untrained
            updates, state = tx.update(grads, state, params | others, **extra)
            assert all(updates[key] is None for key in SETTINGS)
            params = optax.apply_updates(params, {key: updates[key] for key in params})
        return params, state

    for make in (lambda others: train(others), lambda others: jax.jit(lambda: train(others))()):
        found, expected = make(SETTINGS), make(untrained)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@every_method("no layers")
def test_python_numbers_may_be_parameters(name: str) -> None:
    tx, floats = METHODS[name].optimizer(), jax.tree.map(lambda x: float(x.mean()), PRETRAINED)
    arrays = jax.tree.map(jnp.asarray, floats)
    extra = contract_methods.validation(name, arrays)
    runs = [tx.update(p, tx.init(p), p, **extra) for p in (floats, arrays)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), *runs)


@every_method("no layers", where=lambda method: method.is_stage)
def test_a_tree_without_layers_trains_on(name: str) -> None:
    params = {"steps": jnp.arange(3), "none": None}
    tx = METHODS[name].stage()
    state = tx.init(params)
    updates, state = tx.update(params, state, params, **extra_args(name, params))
    np.testing.assert_array_equal(updates["steps"], params["steps"])
    assert state.count == 1
    # Orbax cannot save an empty array.
    assert all(vector.shape == (1,) for vector in vectors(name, state).values())


@projects_only
@pytest.mark.parametrize("sign", [1, -1])
@PARTIAL_STAGES
def test_a_layer_goes_on_after_a_missing_update_as_if_that_step_had_not_been(
    name: str, sign: int
) -> None:
    """Also after steps down the gradient, by which FTP's radii grow."""
    tx, params = METHODS[name].stage(), {"blocks": {"0": MATRIX, "1": MATRIX.T**3}}
    halved = jax.tree.map(lambda x: x / 2, params)

    @jax.jit
    def step(updates: Any, state: Any) -> Any:
        grads = jax.tree.map(lambda u: sign * u, updates)
        return tx.update(updates, state, params, **extra_args(name, grads))

    state = tx.init(halved)
    for _ in range(2):
        _, state = step(params, state)
    expected, _ = step(params, state)
    for gap in (None, optax.MaskedNode()):
        updates, missed = step({"blocks": {"0": MATRIX, "1": gap}}, state)
        assert updates["blocks"]["1"] == gap
        found, _ = step(params, missed)
        np.testing.assert_array_equal(found["blocks"]["1"], expected["blocks"]["1"])


# Wrong input --------------------------------------------------------------------------------------


def updated(tx: Any, name: str, updates: Any = PRETRAINED, **extra: Any) -> Any:
    extra = extra_args(name, PRETRAINED) | extra
    return jax.eval_shape(lambda: tx.update(updates, tx.init(PRETRAINED), PRETRAINED, **extra))


@every_method(where=lambda method: method.inner is not contract_methods.sgd)
def test_missing_params_are_refused_in_the_words_of_optax(name: str) -> None:
    decay, tx = optax.add_decayed_weights(0.1), contract_methods.optimizer(name)
    with pytest.raises(ValueError, match="params") as theirs:
        decay.update(PRETRAINED, decay.init(PRETRAINED), None)
    state = jax.eval_shape(tx.init, PRETRAINED)
    with pytest.raises(ValueError, match=re.escape(str(theirs.value))):
        jax.eval_shape(tx.update, PRETRAINED, state)


@every_method(where=lambda method: method.gradient)
def test_a_missing_gradient_is_refused_with_three_mends(name: str) -> None:
    for tx in (METHODS[name].stage(), optax.chain(METHODS[name].stage())):
        with pytest.raises(ValueError, match="needs the raw gradient") as error:
            updated(tx, name, grad=None)
        for mend in ("grad=grads", "optax_spd.chain(...)", "optax_spd.with_gradient(...)"):
            assert mend in str(error.value)


NAMES_ITS_ANCHOR = every_method(where=lambda m: m.has_anchor and not m.is_wrapper)


@NAMES_ITS_ANCHOR
def test_a_missing_anchor_is_refused_with_three_mends(name: str) -> None:
    for extra in ({}, {"anchor": None}):
        with pytest.raises(ValueError, match="anchor='argument'") as error:
            updated(METHODS[name].stage(anchor="argument", anchor_dtype=None), name, **extra)
        for mend in ("anchor=pretrained", "optax_spd.with_anchor", "anchor='initial'"):
            assert mend in str(error.value)


WRONG_TREES = {
    "missing": (
        lambda tree: {"blocks": tree["blocks"], "embed": tree["embed"]},
        ["no leaf at 'head/kernel'", "shape (8, 4)", "nearest"],
    ),
    "too many": (
        lambda tree: tree | {"tail": np.ones(1)},
        ["a leaf at 'tail'", "nearest"],
    ),
    "misspelt": (
        lambda tree: tree | {"head": {"kernels": tree["head"]["kernel"]}},
        ["no leaf at 'head/kernel'", "'head/kernels'"],
    ),
    "shapes": (
        lambda tree: tree | {"head": {"kernel": tree["head"]["kernel"].T}},
        ["at 'head/kernel'", "shape (4, 8)", "shape (8, 4)"],
    ),
}
MISMATCHES = pytest.mark.parametrize(("change", "told"), WRONG_TREES.values(), ids=WRONG_TREES)


def assert_told(error: Any, *parts: str) -> None:
    for part in parts:
        assert part in str(error.value)


@MISMATCHES
@NAMES_ITS_ANCHOR
def test_an_anchor_that_does_not_match(name: str, change: Any, told: list[str]) -> None:
    wrong = change(PRETRAINED)
    with pytest.raises(ValueError, match="anchor does not match params") as error:
        METHODS[name].stage(anchor=wrong).init(PRETRAINED)
    assert_told(error, *told)
    with pytest.raises(ValueError, match="anchor does not match params") as error:
        updated(METHODS[name].stage(anchor="argument", anchor_dtype=None), name, anchor=wrong)
    assert_told(error, *told)


@MISMATCHES
@every_method(where=lambda method: method.gradient)
def test_a_gradient_that_does_not_match(name: str, change: Any, told: list[str]) -> None:
    with pytest.raises(ValueError, match="grad does not match params") as error:
        updated(METHODS[name].stage(), name, grad=change(PRETRAINED))
    assert_told(error, *told)


@STAGES
def test_an_update_that_does_not_match(name: str) -> None:
    for key in ("missing", "shapes"):
        wrong = WRONG_TREES[key][0](PRETRAINED)
        with pytest.raises(ValueError, match=r"(updates|grad) does not match|updates has shape"):
            updated(METHODS[name].stage(layers=LAYERS), name, wrong, **extra_args(name, wrong))


@every_method(where=lambda method: method.takes("mask"))
def test_a_mask_pattern_that_matches_nothing(name: str) -> None:
    tx = METHODS[name].stage(layers=LAYERS, mask=optax_spd.path_mask("head", "decoder/kernel"))
    with pytest.raises(ValueError, match="'decoder/kernel' matches no parameter path") as error:
        tx.init(PRETRAINED)
    assert "/kernel'" in str(error.value)


@every_method(where=lambda method: method.takes("mask"))
def test_a_complex_parameter_is_refused_with_the_wrapper_that_mends_it(name: str) -> None:
    params = {"blocks": {"0": MATRIX, "1": MATRIX}, "wave": np.ones(2, np.complex64)}
    with pytest.raises(TypeError, match=r"optax\.contrib\.split_real_and_imaginary") as error:
        METHODS[name].stage(mask=None).init(params)
    assert "'wave' is complex (complex64)" in str(error.value)
    METHODS[name].stage(mask={"blocks": True, "wave": False}).init(params)


@every_method(where=lambda method: bool(method.vectors) and method.takes("layers"))
def test_a_state_of_another_number_of_layers(name: str) -> None:
    """Told no shapes, Orbax restores what is there; the update compares it with the parameters."""
    by_module = METHODS[name].optimizer(layers=optax_spd.by_module(layers=LAYERS))
    state = jax.eval_shape(by_module.init, PRETRAINED)
    step = step_of(name, contract_methods.optimizer(name))
    with pytest.raises(ValueError, match=rf"{METHODS[name].vectors[0]} has shape .* layers under"):
        jax.eval_shape(step, PRETRAINED, state, PRETRAINED)


@every_method(where=lambda method: bool(method.numbers))
def test_a_number_is_finite_not_negative_and_a_scalar(name: str) -> None:
    """Checked when it is concrete; under jit there is no value to check."""
    method = METHODS[name]
    checked = [n for n in method.numbers if n not in ("learning_rate", "l2_sp_decay", "spd_decay")]
    for number in checked:
        negative = () if "sign" in method.excepted else (-1.0, np.float32(-1))
        for value in (*negative, np.nan, np.inf, jnp.asarray(np.nan)):
            with pytest.raises(ValueError, match=rf"{number} must be finite.*{value}"):
                method.stage(**{number: value})
        for wrong in (None, "0.1", {"encoder": 0.1}, 1j):
            with pytest.raises(TypeError, match=f"{number} must be a number or a schedule"):
                method.stage(**{number: wrong})
        for array in ([0.1], np.ones((2, 2)), jnp.ones(3)):
            with pytest.raises(ValueError, match=f"{number} must be a scalar") as error:
                method.stage(**{number: array})
            assert str(np.shape(array)) in str(error.value)
        jax.eval_shape(
            lambda value, number=number: method.optimizer(layers=LAYERS, **{number: value}).init(
                PRETRAINED
            ),
            0.5,
        )
