"""Every method under JAX's strict settings, exported with symbolic shapes, and compiled once."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import contract_methods
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from contract_methods import METHODS, every_method
from contract_runs import GRADS, PRETRAINED, assert_close, at, on_device, step_of
from jax import export

import optax_spd


@contextlib.contextmanager
def strict(dtypes: bool = True) -> Iterator[None]:
    """No promotion of ranks and dtypes, no leaked tracers, no NaN."""
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict" if dtypes else "standard"),
        jax.checking_leaks(),
        jax.debug_nans(True),
    ):
        yield


def promotes(name: str) -> bool:
    """Whether Optax's own part of an optimizer promotes dtypes, as its Adam does."""
    return not METHODS[name].is_stage and METHODS[name].inner is not contract_methods.sgd


def strict_optimizer(name: str) -> Any:
    """The method behind momentum, if it is a stage."""
    method, layers = METHODS[name], optax_spd.stacked("^blocks/")
    if method.is_stage:
        return optax_spd.chain(contract_methods.sgd(), method.stage(layers=layers))
    return method.optimizer(layers=layers)


def two_steps(step: Any, tx: Any) -> Any:
    """Two steps from the anchor; in the first Δ = 0."""
    params, state = on_device(PRETRAINED), jax.jit(tx.init)(on_device(PRETRAINED))
    for index in range(2):
        params, state = step(params, state, on_device(at(GRADS, index)))
    return jax.device_get((params, state))


@every_method()
def test_strict_settings_change_nothing(name: str) -> None:
    tx = strict_optimizer(name)
    expected = two_steps(jax.jit(step_of(name, tx)), tx)
    with strict(dtypes=not promotes(name)):
        assert_close(two_steps(jax.jit(step_of(name, tx)), tx), expected)


def halved(tree: Any) -> Any:
    return jax.tree.map(lambda x: x / 2 + 1, tree)


def fitted(norm: str) -> Any:
    batches = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PRETRAINED)
    return optax_spd.fit_radii(
        PRETRAINED,
        halved(PRETRAINED),
        contract_methods.half_distance,
        batches,
        radius_optimizer=optax.sgd(0.1),
        norm=norm,
    )


WEIGHT = np.random.default_rng(0).normal(size=(12, 20)).astype(np.float32)
FUNCTIONS: dict[str, Callable[[], Any]] = {
    "project, l2": lambda: optax_spd.project(PRETRAINED, halved(PRETRAINED), 0.5, norm="l2"),
    "project, mars": lambda: optax_spd.project(PRETRAINED, halved(PRETRAINED), 0.5, norm="mars"),
    "fit_radii, l2": lambda: fitted("l2"),
    "fit_radii, mars": lambda: fitted("mars"),
    "wise_ft": lambda: optax_spd.wise_ft(PRETRAINED, halved(PRETRAINED), 0.5),
    "lines_alpha": lambda: optax_spd.lines_alpha(
        PRETRAINED, 0.5, contract_methods.DEPTH, layers=optax_spd.stacked("^blocks/")
    ),
    **{
        f"power_law_alpha, {fit}": lambda fit=fit: optax_spd.power_law_alpha(WEIGHT, fit=fit)
        for fit in ("median", "goodness-of-fit", "fix-finger")
    },
    "power_law_alpha, zeros": lambda: optax_spd.power_law_alpha(WEIGHT, filter_zeros=True),
    **{
        f"balance_scales, {kind}": lambda kind=kind: optax_spd.balance_scales(
            np.array([1.5, 2.0, 4.0], np.float32), assign=kind, where=np.array([True, False, True])
        )
        for kind in ("linear", "sqrt", "log2", "step", "sigmoid")
    },
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_strict_settings_change_no_function(function: str) -> None:
    expected = FUNCTIONS[function]()
    with strict():
        found = FUNCTIONS[function]()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, expected)


# Programs ----------------------------------------------------------------------------------------


@every_method("symbolic shapes", where=lambda method: method.build is not optax_spd.temp_balance)
def test_a_step_is_exported_with_symbolic_shapes(name: str) -> None:
    """Not for TempBalance: how spectra are decomposed follows from the shapes."""
    tx, params = contract_methods.optimizer(name), on_device(PRETRAINED)
    sizes = export.symbolic_shape("inputs, outputs")
    symbols = dict(zip((8, 4), sizes, strict=True))
    symbolic = lambda x: jax.ShapeDtypeStruct([symbols.get(n, n) for n in x.shape], x.dtype)
    # As leaves, since JAX cannot serialise the class of a state.
    step = jax.jit(
        lambda grads, params: jax.tree.leaves(step_of(name, tx)(params, tx.init(params), grads))
    )
    shapes = jax.tree.map(symbolic, params)
    exported = export.export(step)(shapes, shapes)
    again = export.deserialize(exported.serialize())
    grads = on_device(at(GRADS, 0))
    assert_close(jax.device_get(again.call(grads, params)), jax.device_get(step(grads, params)))


@every_method(where=lambda method: method.is_stage)
def test_tracing_takes_time_in_proportion_to_the_number_of_arrays(name: str) -> None:
    """Counted in calls of Python functions, which no other program on the machine changes."""
    tx = METHODS[name].optimizer(layers=optax_spd.by_module())
    step = step_of(name, tx)

    def calls(arrays: int) -> int:
        params = {f"blocks_{i}": {"kernel": np.ones((4, 4), np.float32)} for i in range(arrays)}
        state = jax.eval_shape(tx.init, params)
        number = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal number
            number += event == "call"

        sys.setprofile(count)
        try:
            jax.jit(lambda *arguments: step(*arguments)).trace(params, state, params)
        finally:
            sys.setprofile(None)
        return number

    calls(10)  # what all arrays of a shape share is traced once
    few, many, most = calls(15), calls(35), calls(55)
    assert many - few == pytest.approx(most - many, rel=0.1)


@pytest.mark.parametrize("fit", ["median", "goodness-of-fit", "fix-finger"])
def test_exponents_do_not_promote_in_float64_either(fit: Any, x64: None) -> None:
    for dtype in (np.float32, np.float64):
        weight = WEIGHT.astype(dtype)
        expected = optax_spd.power_law_alpha(weight, fit=fit)
        with jax.numpy_dtype_promotion("strict"):
            found = optax_spd.power_law_alpha(weight, fit=fit)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_row_method_does_not_promote_in_a_tree_of_two_dtypes(x64: None) -> None:
    params = {"a": jnp.ones((2, 3), jnp.float32), "b": jnp.ones((2, 3), jnp.float64)}
    tx = oracles.row_ball(1.0, anchor="zero")
    with jax.numpy_dtype_promotion("strict"):
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    jax.tree.map(lambda u: np.testing.assert_allclose(u, -0.5), updates)  # 2 becomes 1/2
