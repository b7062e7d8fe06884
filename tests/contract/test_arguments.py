"""What the stages and recipes say of arguments that cannot be right."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import optax_spd

Builder = Callable[..., optax.GradientTransformationExtraArgs]
BUILDERS: dict[str, Builder] = {
    "ftp": optax_spd.ftp,
    "tpgm": optax_spd.tpgm,
    "adam_ftp": functools.partial(optax_spd.adam_ftp, 0.1),
    "sgd_ftp": functools.partial(optax_spd.sgd_ftp, 0.1),
    "adam_tpgm": functools.partial(optax_spd.adam_tpgm, 0.1),
}
every_ftp = pytest.mark.parametrize("build", [b for n, b in BUILDERS.items() if "ftp" in n])
every_ball = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


@every_ftp
def test_hyperparameters_of_ftp_have_an_upper_bound_or_none(build: Builder) -> None:
    """(What holds for the numbers of all methods: test_inputs.py.)"""
    for wrong in (1.1, np.float32(1.1), jnp.asarray(1.1)):
        with pytest.raises(ValueError, match="k must be finite and between 0 and 1"):
            build(k=wrong)
    for fine in (0.0, 1.0, lambda count: 5.0):
        build(k=fine)
    build(radius_learning_rate=5.0)


@every_ftp
def test_the_dtype_of_the_deviation_is_floating(build: Builder) -> None:
    with pytest.raises(ValueError, match="state_dtype must be a floating dtype, got int32"):
        build(state_dtype=jnp.int32)
    with pytest.raises(TypeError, match=r"state_dtype must be a dtype .*, got 'half a float'"):
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
        build(norm="mars", axis_name=axis_name)
    assert repr(axis_name) in str(error.value)
    build(axis_name=axis_name, norm="l2")


@pytest.mark.parametrize("stage", [optax_spd.spd, optax_spd.ftp])
@pytest.mark.parametrize("what", ["updates", "grad", "anchor"])
def test_imaginary_parts_are_not_dropped(what: str, stage: Builder) -> None:
    trees = {name: {"w": jnp.ones(2)} for name in ("updates", "grad", "anchor")}
    trees[what] = {"w": jnp.ones(2) * 1j}
    tx, params = stage(anchor="argument"), {"w": jnp.zeros(2)}
    updates = trees.pop("updates")
    with pytest.raises(TypeError, match=f"{what} is complex at 'w', where the parameter is real"):
        tx.update(updates, tx.init(params), params, **trees)


def test_complex_parameters_train_as_their_parts_in_the_wrapper_of_optax() -> None:
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
    # By name the imaginary part comes first in both.
    np.testing.assert_allclose(ratios, apart, atol=1e-6)
    np.testing.assert_allclose(wrapped["wave"], joined(expected)["wave"], atol=1e-5)
    assert wrapped["wave"].dtype == np.complex64


@pytest.mark.parametrize("build", [optax_spd.adam_spd, optax_spd.adam_ftp, optax_spd.adam_tpgm])
def test_a_mask_taken_for_a_schedule_says_so(build: Builder) -> None:
    recipe = optax.inject_hyperparams(build)
    with pytest.raises(ValueError, match="name the mask in its static_args"):
        recipe(0.1, mask=optax_spd.path_mask("w")).init({"w": jnp.ones(2)})
