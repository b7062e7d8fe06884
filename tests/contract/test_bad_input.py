"""What happens to input that is wrong, or sick: the message, or that nothing else is touched."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import optax_spd

Builder = Callable[..., optax.GradientTransformationExtraArgs]

STAGES: dict[str, Builder] = {
    "spd": optax_spd.spd,
    "l2_sp": lambda weight_decay=0.1, **options: optax_spd.l2_sp(weight_decay, **options),
    "adam_spd": functools.partial(optax_spd.adam_spd, 0.1),
    "adamw_l2_sp": functools.partial(optax_spd.adamw_l2_sp, 0.1),
    "adam_ftp": functools.partial(optax_spd.adam_ftp, 0.1),
    "sgd_ftp": functools.partial(optax_spd.sgd_ftp, 0.1),
    "ftp": optax_spd.ftp,
    "tpgm": optax_spd.tpgm,
    "adam_tpgm": functools.partial(optax_spd.adam_tpgm, 0.1),
}


def some(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("build", [STAGES[name] for name in names], ids=names)


every_stage = some(*STAGES)
every_decay = some("spd", "l2_sp", "adam_spd", "adamw_l2_sp", "adam_ftp", "sgd_ftp")
every_ftp = some("ftp", "adam_ftp", "sgd_ftp")
every_ball = some("ftp", "adam_ftp", "sgd_ftp", "tpgm", "adam_tpgm")


def model() -> dict[str, Any]:
    return {
        "encoder": {"bias": np.ones(3, np.float32), "kernel": np.ones((2, 3), np.float32)},
        "head": np.ones(2, np.float32),
    }


def step(tx: Any, params: Any, **extra_args: Any) -> Any:
    return tx.update(params, tx.init(params), params, **({"grad": params} | extra_args))


# Missing arguments -------------------------------------------------------------------------------


@every_stage
def test_missing_params_are_refused_in_the_words_of_optax(build: Builder) -> None:
    params = model()
    decay = optax.add_decayed_weights(0.1)
    with pytest.raises(ValueError, match="params") as theirs:
        decay.update(params, decay.init(params), None)
    for tx in (build(), optax_spd.with_anchor(build(anchor="argument"))):
        with pytest.raises(ValueError, match=re.escape(str(theirs.value))):
            tx.update(params, tx.init(params), grad=params)


@pytest.mark.parametrize(
    "wrap", [lambda tx: tx, optax_spd.with_anchor, optax.chain], ids=["bare", "anchor", "chain"]
)
@pytest.mark.parametrize("stage", ["spd", "ftp"])
def test_a_missing_gradient_is_refused_with_three_mends(stage: str, wrap: Any) -> None:
    tx = wrap(STAGES[stage]())
    with pytest.raises(ValueError, match=f"{stage} needs the raw gradient") as error:
        tx.update(model(), tx.init(model()), model())
    for mend in ("grad=grads", "optax_spd.chain(...)", "optax_spd.with_gradient(...)"):
        assert mend in str(error.value)


@every_stage
def test_a_missing_anchor_is_refused_with_three_mends(build: Builder) -> None:
    for extra in ({}, {"anchor": None}):
        with pytest.raises(ValueError, match="anchor='argument'") as error:
            step(build(anchor="argument"), model(), **extra)
        for mend in ("anchor=pretrained", "optax_spd.with_anchor", "anchor='initial'"):
            assert mend in str(error.value)


@every_stage
@pytest.mark.parametrize("shared", [False, True], ids=["own", "with_anchor"])
def test_a_dropped_anchor_is_refused_at_trace_time(build: Builder, shared: bool) -> None:
    tx = optax_spd.with_anchor(build(anchor="argument")) if shared else build()
    params = model()
    state = optax_spd.drop_anchor(tx.init(params))
    with pytest.raises(ValueError, match="anchor was dropped; call set_anchor") as error:
        jax.eval_shape(tx.update, params, state, params, grad=params)
    assert "'encoder/bias'" in str(error.value)


# Trees that do not match -------------------------------------------------------------------------


def misspelt(module: dict[str, Any]) -> dict[str, Any]:
    return {"bias": module["bias"], "kernels": module["kernel"]}


WRONG_TREES = {
    "path missing": (
        lambda tree: {"encoder": tree["encoder"]},
        ["no leaf at 'head'", "shape (2,)", "nearest"],
    ),
    "path too many": (
        lambda tree: tree | {"tail": np.ones(1)},
        ["a leaf at 'tail'", "nearest", "'head'"],
    ),
    "path misspelt": (
        lambda tree: tree | {"encoder": misspelt(tree["encoder"])},
        ["no leaf at 'encoder/kernel'", "shape (2, 3)", "'encoder/kernels'"],
    ),
    "shapes": (
        lambda tree: {"encoder": jax.tree.map(np.transpose, tree["encoder"]), "head": np.ones(9)},
        ["at 'encoder/kernel'", "shape (3, 2)", "shape (2, 3)"],
    ),
}
every_mismatch = pytest.mark.parametrize(("change", "told"), WRONG_TREES.values(), ids=WRONG_TREES)


def assert_tells(error: Any, what: str, told: list[str]) -> None:
    message = str(error.value)
    for part in (f"{what} does not match params", *told):
        assert part in message


@every_mismatch
@every_stage
def test_an_anchor_that_does_not_match(build: Builder, change: Any, told: list[str]) -> None:
    wrong = change(model())
    with pytest.raises(ValueError, match="anchor does not match") as error:
        build(anchor=wrong).init(model())
    assert_tells(error, "anchor", told)
    with pytest.raises(ValueError, match="anchor does not match") as error:
        step(build(anchor="argument"), model(), anchor=wrong)
    assert_tells(error, "anchor", told)


@every_mismatch
@some("spd", "ftp")
def test_a_gradient_that_does_not_match(build: Builder, change: Any, told: list[str]) -> None:
    wrong = change(model())
    with pytest.raises(ValueError, match="grad does not match") as error:
        step(build(), model(), grad=wrong)
    assert_tells(error, "grad", told)


# Hyperparameters ---------------------------------------------------------------------------------


@every_decay
@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf, -np.inf], ids=str)
def test_weight_decay_is_finite_and_not_negative(build: Builder, value: float) -> None:
    for same in (value, np.float32(value), jnp.asarray(value)):
        with pytest.raises(ValueError, match="weight_decay must be finite and at least 0") as error:
            build(weight_decay=same)
        assert str(value) in str(error.value)


@every_decay
def test_weight_decay_is_a_number_or_a_schedule(build: Builder) -> None:
    for wrong in (None, "0.1", {"encoder": 0.1}, 1j):
        with pytest.raises(TypeError, match="weight_decay must be a number or a schedule"):
            build(weight_decay=wrong)
    for array in ([0.1], np.ones((2, 2)), jnp.ones(3)):
        with pytest.raises(ValueError, match="weight_decay must be a scalar") as error:
            build(weight_decay=array)
        assert str(np.shape(array)) in str(error.value)


@every_decay
def test_a_traced_weight_decay_is_not_checked(build: Builder) -> None:
    # Under inject_hyperparams and jit there is no value to check.
    def update(weight_decay: jax.Array) -> Any:
        return step(build(weight_decay=weight_decay, anchor="zero"), model())

    updates, _ = jax.jit(update)(jnp.asarray(0.5))
    assert np.all(np.isfinite(updates["head"]))


@every_ftp
@pytest.mark.parametrize(
    ("name", "wrong", "allowed"),
    [
        ("k", [-0.1, 1.1, np.nan, np.inf], "between 0 and 1"),
        ("radius_learning_rate", [-0.1, np.nan, np.inf], "at least 0"),
    ],
)
def test_hyperparameters_of_ftp_are_in_range(
    build: Builder, name: str, wrong: list[float], allowed: str
) -> None:
    for value in wrong:
        for same in (value, np.float32(value), jnp.asarray(value)):
            with pytest.raises(ValueError, match=f"{name} must be finite and {allowed}"):
                build(**{name: same})
    with pytest.raises(TypeError, match=f"{name} must be a number or a schedule"):
        build(**{name: "1"})
    with pytest.raises(ValueError, match=f"{name} must be a scalar"):
        build(**{name: [0.5, 0.5]})
    for fine in (0.0, 1.0, lambda count: 5.0):
        build(**{name: fine})


@every_ftp
def test_the_dtype_of_the_deviation_is_floating(build: Builder) -> None:
    with pytest.raises(ValueError, match="state_dtype must be a floating dtype, got int32"):
        build(state_dtype=jnp.int32)
    with pytest.raises(TypeError, match="half"):
        build(state_dtype="half a float")


@every_ball
@pytest.mark.parametrize("norm", ["l1", "MARS", "", None, 2], ids=repr)
def test_an_unknown_norm_is_refused_with_those_there_are(build: Builder, norm: Any) -> None:
    with pytest.raises(ValueError, match="norm must be 'l2' or 'mars'") as error:
        build(norm=norm)
    assert repr(norm) in str(error.value)


@every_ball
@pytest.mark.parametrize("axis_name", ["x", ("x", "y")], ids=repr)
def test_mars_needs_to_know_which_axes_are_split(build: Builder, axis_name: Any) -> None:
    with pytest.raises(ValueError, match="Give axis_name the PartitionSpecs") as error:
        build(axis_name=axis_name)
    assert repr(axis_name) in str(error.value)
    build(axis_name=axis_name, norm="l2")


@pytest.mark.parametrize(("name", "field"), [("ftp", "ftp_radii"), ("tpgm", "tpgm_radii")])
def test_a_state_of_another_number_of_layers(name: str, field: str) -> None:
    made = STAGES[name](layers=optax_spd.by_module())
    used = STAGES[name]()
    state = made.init(model())
    with pytest.raises(ValueError, match=rf"{field} has shape \(2,\).* 3 layers"):
        used.update(model(), state, model(), grad=model())


@every_stage
@pytest.mark.parametrize("anchor", ["pretrained", "Initial", "", None], ids=repr)
def test_an_unknown_anchor_is_refused_with_those_there_are(build: Builder, anchor: Any) -> None:
    with pytest.raises(ValueError, match="anchor must be one of") as error:
        build(anchor=anchor)
    for allowed in ("'initial'", "'zero'", "'argument'", "a tree like params", repr(anchor)):
        assert allowed in str(error.value)


@pytest.mark.parametrize("anchor", ["zero", "argument", None], ids=repr)
def test_with_anchor_keeps_an_anchor_or_is_refused(anchor: Any) -> None:
    with pytest.raises(ValueError, match="anchor must be one of 'initial' or a tree") as error:
        optax_spd.with_anchor(optax_spd.spd(anchor="argument"), anchor)
    assert repr(anchor) in str(error.value)


@every_stage
@pytest.mark.parametrize("anchor", ["zero", "argument"])
def test_a_dtype_for_an_anchor_that_is_not_stored(build: Builder, anchor: str) -> None:
    with pytest.raises(ValueError, match="the state stores none") as error:
        build(anchor=anchor, anchor_dtype=jnp.bfloat16)
    assert f"anchor={anchor!r}" in str(error.value)


@every_stage
def test_the_anchors_dtype_is_floating(build: Builder) -> None:
    with pytest.raises(ValueError, match="anchor_dtype must be a floating dtype, got int8"):
        build(anchor_dtype=jnp.int8)
    with pytest.raises(TypeError, match="half"):
        build(anchor_dtype="half a float")


@every_stage
def test_a_mask_pattern_that_matches_nothing(build: Builder) -> None:
    tx = build(mask=optax_spd.path_mask("encoder", "decoder/kernel"))
    with pytest.raises(ValueError, match="'decoder/kernel' matches no parameter path") as error:
        tx.init(model())
    assert "'encoder/kernel'" in str(error.value)


# Leaves that are no parameters of a model in real floats -----------------------------------------


@every_stage
def test_a_complex_parameter_is_refused_with_the_wrapper_that_mends_it(build: Builder) -> None:
    params = {"a": np.ones(2, np.float32), "wave": np.ones(2, np.complex64)}
    with pytest.raises(TypeError, match=r"optax\.contrib\.split_real_and_imaginary") as error:
        build().init(params)
    assert "'wave' is complex (complex64)" in str(error.value)
    build(mask={"a": True, "wave": False}).init(params)


def test_complex_parameters_train_as_their_parts_in_optax_wrapper() -> None:
    draw = np.random.default_rng(0)
    parts = lambda *shape: {k: draw.normal(size=shape).astype(np.float32) for k in ("re", "im")}
    joined = lambda tree: {"wave": tree["re"] + 1j * tree["im"]}
    params, gradients = parts(5), parts(12, 5)
    tx = optax_spd.adam_spd(0.3)
    wrapped, ratios = oracles.train(
        optax.contrib.split_real_and_imaginary(tx), joined(params), joined(gradients)
    )
    expected, apart = oracles.train(tx, params, gradients)
    assert np.all(np.any(ratios > 0, axis=0))
    # Sorted by key the imaginary part comes first; in the wrapper it comes second.
    np.testing.assert_allclose(ratios[:, ::-1], apart, atol=1e-6)
    np.testing.assert_allclose(wrapped["wave"], joined(expected)["wave"], atol=1e-5)
    assert wrapped["wave"].dtype == np.complex64


@some("spd", "l2_sp", "ftp", "tpgm")
def test_leaves_that_are_no_layers_pass_through(build: Builder) -> None:
    params = {
        "empty": np.ones((0, 3), np.float32),
        "flag": np.ones(2, bool),
        "layer": np.full(2, 3.0, np.float32),
        "masked": optax.MaskedNode(),
        "none": None,
        "steps": np.arange(3),
    }
    tx = build(anchor=params | {"layer": np.ones(2, np.float32)})
    updates, state = step(tx, params)
    for name in params.keys() - {"layer"}:
        assert updates[name] is params[name], name
    assert not np.array_equal(updates["layer"], params["layer"])
    assert state.anchor["none"] is None
    assert state.anchor["masked"] == optax.MaskedNode()


@every_stage
def test_none_leaves_as_equinox_makes_them_pass_through_the_recipes(build: Builder) -> None:
    params = {"layer": np.ones(2, np.float32), "static": None}
    updates, _ = step(build(anchor="zero"), params)
    assert updates["static"] is None
    assert updates["layer"].shape == (2,)


# Sick numbers ------------------------------------------------------------------------------------

HUGE = np.float32(3e30)  # finite; its square is not
SICK = {
    "NaN gradient": ("grad", np.nan),
    "infinite gradient": ("grad", np.inf),
    "negative infinite gradient": ("grad", -np.inf),
    "inner product overflows": ("grad", np.float32(3e38)),
    "NaN update": ("update", np.nan),
    "infinite update": ("update", np.inf),
    "new norm overflows": ("update", HUGE),
    "NaN parameter": ("params", np.nan),
    "both norms overflow": ("params", HUGE),
    "NaN anchor": ("anchor", np.nan),
}
LAYERS = ["a", "b", "stack[0]", "stack[1]", "stack[2]"]


@functools.cache
def compiled() -> Any:
    tx = optax_spd.spd(anchor="argument", layers=optax_spd.stacked("stack", axis=1))

    @jax.jit
    def update(trees: dict[str, Any]) -> Any:
        params = trees["params"]
        updates, state = tx.update(
            trees["update"], tx.init(params), params, grad=trees["grad"], anchor=trees["anchor"]
        )
        return updates, state.spd_ratio

    return update


def healthy() -> dict[str, Any]:
    """An update along the deviation, and a gradient against it: SPD fires in every layer."""
    draw = np.random.default_rng(0)
    shapes = {"a": (4,), "b": (2, 3), "stack": (4, 3)}
    params = {name: draw.normal(size=shape) for name, shape in shapes.items()}
    trees = {
        "params": params,
        "anchor": {name: np.zeros(shape) for name, shape in shapes.items()},
        "grad": {name: 2 * x + 0.1 * draw.normal(size=x.shape) for name, x in params.items()},
        "update": {name: x / 4 + 0.1 * draw.normal(size=x.shape) for name, x in params.items()},
    }
    return jax.tree.map(lambda x: x.astype(np.float32), trees)


def entry(layer: str) -> tuple[str, tuple[int | slice, ...]]:
    """A layer's array, and the index of the layer in it."""
    name, bracket, index = layer.rstrip("]").partition("[")
    return name, (slice(None), int(index)) if bracket else (...,)


@pytest.mark.parametrize("layer", ["b", "stack[1]"])
@pytest.mark.parametrize(("tree", "value"), SICK.values(), ids=SICK)
def test_a_sick_layer_keeps_its_update_and_touches_no_other(
    tree: str, value: float, layer: str
) -> None:
    trees = healthy()
    expected, ratios = compiled()(trees)
    assert np.all(ratios > 0)
    name, index = entry(layer)
    if tree == "grad" and value == np.float32(3e38):
        trees["grad"][name][index] = value * np.sign(trees["params"][name][index])
    else:
        trees[tree][name][index].flat[0] = value  # one number of a layer is enough
    updates, sick_ratios = compiled()(trees)

    np.testing.assert_array_equal(updates[name][index], trees["update"][name][index])
    assert sick_ratios[LAYERS.index(layer)] == 0
    for other in LAYERS:
        if other != layer:
            name, index = entry(other)
            np.testing.assert_array_equal(updates[name][index], expected[name][index])
            assert sick_ratios[LAYERS.index(other)] == ratios[LAYERS.index(other)]


def test_a_nan_gradient_in_training_stays_in_its_layer() -> None:
    draw = np.random.default_rng(1)
    params = {name: draw.normal(size=4).astype(np.float32) for name in "ab"}
    gradients = {name: draw.normal(size=(10, 4)).astype(np.float32) for name in "ab"}
    expected, ratios = oracles.train(optax_spd.adam_spd(0.3), params, gradients)
    gradients["a"][3, 2] = np.nan
    trained, sick_ratios = oracles.train(optax_spd.adam_spd(0.3), params, gradients)
    # What is NaN is what Adam alone would make NaN.
    np.testing.assert_array_equal(np.isnan(trained["a"]), [False, False, True, False])
    np.testing.assert_array_equal(sick_ratios[3:, 0], np.zeros(7))
    np.testing.assert_array_equal(trained["b"], expected["b"])
    assert np.any(ratios[3:, 1] > 0)
    np.testing.assert_array_equal(sick_ratios[:, 1], ratios[:, 1])


@some("spd", "ftp")
@pytest.mark.parametrize("what", ["updates", "grad", "anchor"])
def test_imaginary_parts_are_not_dropped(what: str, build: Builder) -> None:
    trees = {name: {"w": jnp.ones(2)} for name in ("updates", "grad", "anchor")}
    trees[what] = {"w": jnp.ones(2) * 1j}
    tx = build(anchor="argument")
    params = {"w": jnp.zeros(2)}
    updates = trees.pop("updates")
    with pytest.raises(TypeError, match=f"{what} is complex at 'w', where the parameter is real"):
        tx.update(updates, tx.init(params), params, **trees)


@pytest.mark.parametrize("build", [optax_spd.adam_spd, optax_spd.adam_ftp, optax_spd.adam_tpgm])
def test_a_mask_taken_for_a_schedule_says_so(build: Builder) -> None:
    recipe = optax.inject_hyperparams(build)
    with pytest.raises(ValueError, match="name the mask in its static_args"):
        recipe(0.1, mask=optax_spd.path_mask("w")).init({"w": jnp.ones(2)})
