"""What counts as a layer: arrays, slices of stacked arrays, groups.

The yardstick is the unrolled model: however the same weights are packed, they train alike.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import optax_spd
from optax_spd import LayerSpec
from optax_spd.layers import trees

STEPS = 12


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def recipe(layers: Any) -> optax.GradientTransformationExtraArgs:
    """The same object for the same layers, so that a run of the same shapes is compiled once."""
    return optax_spd.adam_spd(0.1, layers=layers)


def train(params: Any, gradients: Any, layers: Any = None) -> tuple[Any, dict[str, np.ndarray]]:
    """Trains on recorded gradients (a leading step axis); the ratios of each layer by its name."""
    params, ratios = oracles.train(recipe(layers), params, gradients)
    names = optax_spd.layer_names(params, layers=layers)
    return params, dict(zip(names, ratios.T, strict=True))


# Stacked axes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "axis", [0, 1, -1, -2, (2, 0), (-2, -1), (0, 1, 2)], ids=lambda axis: str(axis)
)
def test_a_stacked_array_trains_as_its_slices(axis: int | Sequence[int]) -> None:
    shape = (3, 2, 4)
    stacked, others = normal(shape), {"head": normal((5,), seed=1)}
    gradients = normal((STEPS, *shape), seed=2), normal((STEPS, 5), seed=3)
    axes = sorted(a % 3 for a in ((axis,) if isinstance(axis, int) else axis))
    sizes = tuple(shape[a] for a in axes)

    def slices(array: np.ndarray, leading: int = 0) -> dict[str, np.ndarray]:
        front = np.moveaxis(array, [a + leading for a in axes], range(leading, leading + len(axes)))
        index = (slice(None),) * leading
        return {f"w[{','.join(map(str, i))}]": front[index + i] for i in np.ndindex(*sizes)}

    packed, packed_ratios = train(
        {"w": stacked} | others,
        {"w": gradients[0], "head": gradients[1]},
        optax_spd.stacked("^w$", axis),
    )
    apart, ratios = train(
        slices(stacked) | others, slices(gradients[0], 1) | {"head": gradients[1]}
    )
    assert packed_ratios.keys() == ratios.keys()
    for name, ratio in ratios.items():
        assert np.any(ratio > 0), name
        np.testing.assert_allclose(packed_ratios[name], ratio, atol=1e-6, err_msg=name)
    unpacked = slices(packed["w"]) | {"head": packed["head"]}
    for name, array in apart.items():
        np.testing.assert_allclose(unpacked[name], array, rtol=0, atol=2e-6, err_msg=name)


def test_stacked_refines_only_what_matches_and_keeps_the_rest_of_the_description() -> None:
    base = lambda path, array: LayerSpec(output_axes=(0,), group=path[0])
    describe = optax_spd.stacked("blocks/.*kernel", 1, layers=base)
    assert describe("blocks/kernel", None) == LayerSpec((1,), (0,), "b")
    assert describe("head/kernel", None) == LayerSpec((), (0,), "h")
    assert optax_spd.stacked("no such path")("head", None) == LayerSpec()


# Output axes -------------------------------------------------------------------------------------


def test_stacked_and_outputs_compose_in_either_order() -> None:
    one = optax_spd.outputs("query", (1, 2), layers=optax_spd.stacked("query", -1))
    other = optax_spd.stacked("query", -1, layers=optax_spd.outputs("query", (1, 2)))
    assert one("query/kernel", None) == other("query/kernel", None) == LayerSpec((-1,), (1, 2))


# Groups ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [1.0, 2.5])
def test_a_module_is_judged_as_one_vector(decay: float) -> None:
    names = ["attention", "attention/out", "mlp_0", "mlp_1", "mlp_2"]
    params, anchor, grads, steps = (
        {
            "attention": {
                "out": {"kernel": normal((3, 2), 10 * k), "bias": normal((2,), 10 * k + 1)},
                "scale": normal((4,), 10 * k + 2),
            }
        }
        | {
            f"mlp_{i}": {
                "kernel": normal((2, 3), 10 * k + 2 * i + 3),
                "bias": normal((3,), 10 * k + 2 * i + 4),
            }
            for i in range(3)
        }
        for k in range(4)
    )
    tx = optax_spd.spd(decay, anchor=anchor, layers=optax_spd.by_module())
    updates, state = jax.jit(tx.update)(steps, tx.init(params), params, grad=grads)
    # "attention/out" comes first: its bias is the first array of the tree.
    assert sorted(optax_spd.layer_names(params, layers=optax_spd.by_module())) == names

    def members(tree: Any, module: str) -> list[Any]:
        flat = trees.flatten(tree)
        return [
            leaf
            for path, leaf in zip(flat.paths, flat.leaves, strict=True)
            if "/".join(path[:-1]) == module
        ]

    def vector(tree: Any, module: str) -> np.ndarray:
        return np.concatenate([np.ravel(x).astype(np.float64) for x in members(tree, module)])

    fired = 0
    for index, module in enumerate(optax_spd.layer_names(params, layers=optax_spd.by_module())):
        delta = vector(params, module) - vector(anchor, module)
        expected, ratio = oracles.spd_step(
            vector(steps, module), delta, 0.0, vector(grads, module), decay
        )
        np.testing.assert_allclose(state.spd_ratio[index], ratio, atol=1e-6, err_msg=module)
        np.testing.assert_allclose(vector(updates, module), expected, atol=1e-5, err_msg=module)
        fired += ratio > 0
    assert 0 < fired < len(names)


def test_by_module_trains_kernel_and_bias_as_one_flat_array() -> None:
    kernel, bias = normal((3, 2)), normal((2,), seed=1)
    gradients = normal((STEPS, 3, 2), seed=2), normal((STEPS, 2), seed=3)
    together, by_module = train(
        {"dense": {"kernel": kernel, "bias": bias}},
        {"dense": {"kernel": gradients[0], "bias": gradients[1]}},
        optax_spd.by_module(),
    )
    flat, ratios = train(
        {"dense": np.concatenate([kernel.ravel(), bias])},
        {"dense": np.concatenate([gradients[0].reshape(STEPS, -1), gradients[1]], axis=1)},
    )
    assert by_module.keys() == ratios.keys() == {"dense"}
    assert np.any(ratios["dense"] > 0)
    np.testing.assert_allclose(by_module["dense"], ratios["dense"], atol=1e-6)
    np.testing.assert_allclose(together["dense"]["kernel"].ravel(), flat["dense"][:6], atol=2e-6)
    np.testing.assert_allclose(together["dense"]["bias"], flat["dense"][6:], atol=2e-6)


def test_stacked_arrays_of_a_group_are_judged_index_by_index() -> None:
    # As in MaxText, axis 1 of the kernels and axis 0 of the biases hold the layers.
    layers = optax_spd.by_module(
        layers=optax_spd.stacked("kernel", 1, layers=optax_spd.stacked("bias", 0))
    )
    params = {"blocks": {"kernel": normal((2, 3, 4)), "bias": normal((3, 4), seed=1)}}
    gradients = {
        "blocks": {
            "kernel": normal((STEPS, 2, 3, 4), seed=2),
            "bias": normal((STEPS, 3, 4), seed=3),
        }
    }

    def unrolled(tree: Any, lead: int) -> Any:
        kernel, bias = tree["blocks"]["kernel"], tree["blocks"]["bias"]
        return {
            f"blocks[{i}]": {
                "kernel": np.take(kernel, i, axis=1 + lead),
                "bias": np.take(bias, i, axis=lead),
            }
            for i in range(3)
        }

    packed, packed_ratios = train(params, gradients, layers)
    apart, ratios = train(unrolled(params, 0), unrolled(gradients, 1), optax_spd.by_module())
    assert list(packed_ratios) == list(ratios) == ["blocks[0]", "blocks[1]", "blocks[2]"]
    for name, ratio in ratios.items():
        assert np.any(ratio > 0), name
        np.testing.assert_allclose(packed_ratios[name], ratio, atol=1e-6, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), unrolled(packed, 0), apart
    )


def test_by_module_keeps_groups_that_are_given() -> None:
    given = lambda path, array: LayerSpec(group="norms") if "scale" in path else LayerSpec()
    params = {f"{m}": {"kernel": jnp.ones(1), "scale": jnp.ones(1)} for m in "ab"}
    names = optax_spd.layer_names(params, layers=optax_spd.by_module(layers=given))
    assert names == ["a", "norms", "b"]


# A model with scanned layers ---------------------------------------------------------------------

DEPTH, WIDTH = 3, 4


class Block(nn.Module):
    """A residual block, in the form that nn.scan wants."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        hidden = nn.tanh(nn.Dense(WIDTH + 1, name="up")(x))
        return x + nn.Dense(WIDTH, name="down", use_bias=False)(hidden), None


class Scanned(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        blocks = nn.scan(
            Block,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=DEPTH,
        )
        x, _ = blocks(name="blocks")(x, None)
        return nn.Dense(1, name="head")(x)


class Unrolled(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(DEPTH):
            x, _ = Block(name=f"blocks[{i}]")(x, None)
        return nn.Dense(1, name="head")(x)


def fit(model: nn.Module, params: Any, layers: Any) -> tuple[Any, np.ndarray]:
    """Fifteen aggressive steps toward a target that moves, so that the momentum overshoots."""
    tx = optax_spd.adam_spd(0.2, b1=0.95, layers=layers)
    x = np.random.default_rng(5).normal(size=(8, WIDTH))

    def step(carry: Any, t: jax.Array) -> Any:
        params, state = carry

        def loss(params: Any) -> jax.Array:
            target = jnp.cos(x.sum(axis=1, keepdims=True) + t)
            return jnp.mean((model.apply({"params": params}, x) - target) ** 2)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), optax.tree.get(state, "spd_ratio")

    scan = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), jnp.arange(15.0)))
    (params, _), ratios = jax.device_get(scan(params))
    return params, ratios


@pytest.mark.parametrize(("axis", "grouped"), [(0, False), (1, False), (1, True)])
def test_a_scanned_model_trains_as_the_unrolled_one(axis: int, grouped: bool, x64: None) -> None:
    shapes = jax.eval_shape(Scanned(axis).init, jax.random.key(0), jnp.ones((1, WIDTH)))["params"]
    draw = np.random.default_rng(6)
    params = jax.tree.map(lambda s: 0.5 * draw.normal(size=s.shape), shapes)

    def unroll(params: Any) -> Any:
        slices = {
            f"blocks[{i}]": jax.tree.map(lambda a, i=i: np.take(a, i, axis), params["blocks"])
            for i in range(DEPTH)
        }
        return slices | {"head": params["head"]}

    assert params["blocks"]["up"]["kernel"].shape[axis] == DEPTH
    apart = optax_spd.by_module() if grouped else None
    layers = optax_spd.stacked("^blocks/", axis, layers=apart)
    scanned, scanned_ratios = fit(Scanned(axis), params, layers)
    unrolled, ratios = fit(Unrolled(), unroll(params), apart)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), unroll(scanned), unrolled
    )
    # "blocks/up/kernel[1]" is "blocks[1]/up/kernel" of the unrolled model.
    order = []
    names = optax_spd.layer_names(unrolled, layers=apart)
    for name in optax_spd.layer_names(scanned, layers=layers):
        path, bracket, index = name.rstrip("]").partition("[")
        order.append(names.index(path.replace("blocks", f"blocks[{index}]") if bracket else name))
    assert sorted(order) == list(range(len(names)))
    np.testing.assert_allclose(scanned_ratios, ratios[:, order], rtol=0, atol=1e-9)
    assert np.count_nonzero(np.any(ratios > 0, axis=0)) > len(names) / 2


# What is refused ---------------------------------------------------------------------------------


def test_layers_must_be_a_function() -> None:
    with pytest.raises(TypeError, match=r"optax_spd\.stacked, outputs and by_module"):
        optax_spd.spd(layers="blocks")  # type: ignore[arg-type]


def test_a_pattern_must_be_a_regular_expression() -> None:
    with pytest.raises(ValueError, match="not valid"):
        optax_spd.stacked("(")
