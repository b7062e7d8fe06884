"""What a layer is does not depend on how its arrays are kept, nor on its neighbours."""

import re
from typing import Any

import contract_methods
import jax
import numpy as np
from contract_methods import METHODS, every_method
from contract_runs import (
    GRADS,
    PRETRAINED,
    STOP,
    assert_close,
    assert_same_bits,
    jitted,
    on_device,
    reference,
    run,
    scan,
)

import optax_spd

LAYERS = optax_spd.stacked("^blocks/")


def unrolled(tree: Any, axis: int = 0) -> Any:
    """The model with arrays of their own for both blocks; the axis counts steps if it is 1."""
    block = lambda i: jax.tree.map(lambda x: np.take(x, i, axis), tree["blocks"])
    return tree | {"blocks": {"0": block(0), "1": block(1)}}


@every_method()
def test_stacked_layers_train_as_unrolled_ones(name: str) -> None:
    tx = METHODS[name].optimizer()
    params = unrolled(PRETRAINED)
    whole = jax.jit(lambda params: scan(name, tx, params, tx.init(params), unrolled(GRADS, axis=1)))
    params, _, seen = jax.device_get(whole(params))
    stacked, _, expected = reference(name)
    assert_close(params, unrolled(stacked), rtol=1e-4)
    names = layer_names(name)
    columns = [names.index(stacked_name(layer)) for layer in layer_names(name, unroll=True)]
    assert_close(seen, {field: x[:, columns] for field, x in expected.items()}, rtol=1e-4)


def layer_names(name: str, unroll: bool = False) -> list[str]:
    """The layers of a method, in the order of its vectors."""
    tree = unrolled(PRETRAINED) if unroll else PRETRAINED
    layers = None if unroll else LAYERS
    return optax_spd.layer_names(tree, layers=layers, mask=METHODS[name].mask)


def stacked_name(layer: str) -> str:
    """What an unrolled layer is called where blocks are stacked: blocks/1/bias, blocks/bias[1]."""
    return re.sub(r"^blocks/(\d)/(\w+)$", r"blocks/\2[\1]", layer)


# A NaN in one layer -------------------------------------------------------------------------------

SICK = "blocks/kernel[0]"


@every_method("isolation")
def test_a_nan_gradient_in_one_layer_leaves_all_others_alone(name: str) -> None:
    tx, params = contract_methods.optimizer(name), on_device(PRETRAINED)
    grads = jax.tree.map(np.copy, GRADS)
    grads["blocks"]["kernel"][STOP, 0, 0, 0] = np.nan
    params, _, seen = run(name, jitted(name), params, tx.init(params), grads)
    params = jax.device_get(params)
    expected_params, _, expected = reference(name)
    # In the layer itself only that is NaN which its inner optimizer makes NaN.
    assert np.isnan(params["blocks"]["kernel"]).sum() == np.isnan(
        params["blocks"]["kernel"][0, 0, 0]
    )
    assert_same_bits(without_the_sick(params), without_the_sick(expected_params))
    names = layer_names(name)
    others = [i for i, layer in enumerate(names) if layer != SICK]
    for field, decided in seen.items():
        np.testing.assert_array_equal(decided[:, others], expected[field][:, others])
        assert np.isfinite(decided[:, names.index(SICK)]).all()


def without_the_sick(params: Any) -> Any:
    blocks = params["blocks"]
    return params | {"blocks": {"bias": blocks["bias"], "kernel": blocks["kernel"][1]}}
