"""FTP against the original implementation and against float64 NumPy."""

from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch_like

import optax_spd

CASES = golden.settings("ftp")
# PyTorch keeps output units on the first axis.
TORCH_LAYOUT = optax_spd.outputs(".*", 0)


def constrained(case: golden.Case) -> dict[str, bool]:
    return {tensor["name"]: tensor["constrained"] for tensor in case.settings["tensors"]}


def inner_of(case: golden.Case) -> optax.GradientTransformation:
    """The case's AdamW or SGD, from Optax's parts where Optax computes the same."""
    settings = case.settings
    rate = optax.scale_by_learning_rate(lambda count: case.lr[count])
    decay = optax.add_decayed_weights(settings["weight_decay"])
    if settings["algorithm"] == "AdamP":
        b1, b2 = settings["betas"]
        if settings["amsgrad"]:
            adam = torch_like.scale_by_amsgrad(b1, b2, settings["eps"])
        else:
            adam = optax.scale_by_adam(b1, b2, settings["eps"])
        return optax.chain(adam, decay, rate)
    if settings["dampening"]:
        momentum = torch_like.dampened_trace(settings["momentum"], settings["dampening"])
    elif settings["momentum"]:
        momentum = optax.trace(settings["momentum"], settings["nesterov"])
    else:
        momentum = optax.identity()
    return optax.chain(decay, momentum, rate)


def recipe_of(case: golden.Case) -> optax.GradientTransformation:
    settings = case.settings
    rate = lambda count: case.lr[count]
    common = {
        "k": settings["k"],
        "weight_decay": settings["weight_decay"],
        "layers": TORCH_LAYOUT,
        "anchor": case.anchor,
        "mask": constrained(case),
    }
    if settings["algorithm"] == "AdamP":
        return optax_spd.adam_ftp(rate, *settings["betas"], settings["eps"], **common)
    momentum = settings["momentum"] or None
    return optax_spd.sgd_ftp(rate, momentum, settings["nesterov"], **common)


def stage_of(case: golden.Case, **options: Any) -> optax.GradientTransformationExtraArgs:
    return optax_spd.ftp(
        case.settings["k"],
        layers=TORCH_LAYOUT,
        anchor=case.anchor,
        mask=constrained(case),
        **options,
    )


def optimizer_of(case: golden.Case, form: str) -> tuple[Any, bool]:
    """The case's optimizer in one of its forms, and whether the caller passes ``grad=``."""
    if form == "optax.chain":
        return optax.chain(inner_of(case), stage_of(case)), True
    if form == "optax_spd.chain":
        return optax_spd.chain(inner_of(case), stage_of(case)), False
    return recipe_of(case), False


def has_recipe(settings: dict[str, Any]) -> bool:
    """Optax's amsgrad takes another maximum, and its trace has no dampening."""
    return not settings.get("amsgrad") and not settings.get("dampening")


def run(case: golden.Case, tx: Any, pass_grad: bool) -> tuple[Any, Any]:
    """Parameters and FTP's state vectors after every step."""

    def step(carry: Any, index: jax.Array) -> Any:
        params, state = carry
        grads = case.gradient(index, params)
        extra = {"grad": grads} if pass_grad else {}
        updates, state = tx.update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
        vectors = {
            "gamma": optax.tree.get(state, "ftp_radii"),
            "m_gamma": optax.tree.get(state, "ftp_moments").mu,
            "v_gamma": optax.tree.get(state, "ftp_moments").nu,
        }
        return (params, state), (params, vectors)

    steps = jnp.arange(case.settings["steps"])
    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, steps)[1])
    return scan((case.theta0, tx.init(case.theta0)))


FORMS = ["optax.chain", "optax_spd.chain", "recipe"]
REPLAYS = [(c, form) for c in CASES for form in FORMS if form != "recipe" or has_recipe(c)]


@pytest.mark.parametrize(
    ("settings", "form"), REPLAYS, ids=[f"{c['name']}-{form}" for c, form in REPLAYS]
)
def test_replays_the_original(settings: dict[str, Any], form: str, x64: None) -> None:
    # With x64 for float32 cases too: Optax's bias corrections need it. All arrays stay float32.
    case = golden.load("ftp", settings)
    params, vectors = run(case, *optimizer_of(case, form))
    tolerance = 1e-9 if settings["dtype"] == "float64" else 2e-5
    names = optax_spd.layer_names(case.theta0, mask=constrained(case))
    assert names == sorted(name for name, yes in constrained(case).items() if yes)
    for name in case.theta0:
        assert params[name].dtype == settings["dtype"]
        np.testing.assert_allclose(
            params[name], case.params[name], rtol=0, atol=tolerance, err_msg=name
        )
    for index, name in enumerate(names):
        for field, vector in vectors.items():
            np.testing.assert_allclose(
                vector[:, index], case.fields[name][field], rtol=0, atol=tolerance, err_msg=field
            )
    assert vectors["gamma"].dtype == settings["dtype"]
