"""LiNeS: one alpha per layer by depth, against the original's factors and edited weights."""

import functools
import re
from collections.abc import Callable
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_spd

CASES = {case["name"]: case for case in golden.settings("lines")}
Depth = str | Callable[[str], float | None]


BLOCK = r"resblocks\.(\d+)\."


def block_of(name: str) -> float | None:
    """The number that the pattern finds."""
    number = re.search(BLOCK, name)
    return None if number is None else int(number.group(1))


def first_three(name: str) -> float | None:
    """Blocks from the fourth on are outside, as in the original."""
    number = next((int(key) for key in name.split(".") if key.isdigit()), 3)
    return number if number < 3 else None


NOT_EXPRESSED = {
    "lines_name_trap_repository": (
        "the original takes the sublayer of a block for its number, so the largest number in the "
        "names it reads is not that of the last block, by which lines_alpha divides"
    ),
}


class Edit:
    """A case's two checkpoints and the edited one, by tensor name."""

    def __init__(self, name: str, dtype: Any = np.float64) -> None:
        self.settings = CASES[name]
        names = [tensor["name"] for tensor in self.settings["tensors"]]
        with np.load(golden.DATA / "lines.npz") as arrays:
            read = lambda key: {n: arrays[f"{name}/{n}/{key}"].astype(dtype) for n in names}
            self.anchor, self.params, self.edited = map(read, ("pre", "finetuned", "edited"))
            self.factors = dict(zip(names, arrays[f"{name}/factor"], strict=True))

    def alpha(self, params: Any, depth: Depth, **options: Any) -> jax.Array:
        low, slope = self.settings["alpha"], self.settings["beta"]
        if slope == pytest.approx(1 - low):
            return optax_spd.lines_alpha(params, low, depth, **options)
        return low + slope * optax_spd.lines_alpha(params, 0.0, depth, **options)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("PyTorch", np.float64),
        ("PyTorch", np.float32),
        ("Flax", np.float64),
        ("stacked", np.float64),
    ],
)
@pytest.mark.parametrize("name", sorted(CASES.keys() - NOT_EXPRESSED))
def test_replays_the_original(name: str, layout: str, dtype: Any, x64: None) -> None:
    edit, depth = Edit(name, dtype), BLOCK
    if name == "lines_deeper_than_num_blocks":
        depth = first_three
    trees, options = [edit.params, edit.anchor, edit.edited], {}
    if layout == "Flax":
        trees = [{n: np.moveaxis(x, 0, -1) for n, x in tree.items()} for tree in trees]
    if layout == "stacked":
        groups: dict[str, list[str]] = {}
        for n, x in edit.params.items():
            groups.setdefault("x".join(map(str, x.shape)), []).append(n)
        trees = [{k: np.stack([tree[n] for n in ns]) for k, ns in groups.items()} for tree in trees]
        names = {f"{k}[{i}]": n for k, ns in groups.items() for i, n in enumerate(ns)}
        of_name = block_of if depth is BLOCK else first_three
        options, depth = {"layers": optax_spd.stacked("")}, lambda layer: of_name(names[layer])
    params, anchor, edited = trees
    alpha = edit.alpha(params, depth, **options)
    assert alpha.dtype == dtype
    atol = 1e-9 if dtype == np.float64 else 1e-5
    if layout != "stacked":
        for layer, value in zip(optax_spd.layer_names(params), alpha, strict=True):
            np.testing.assert_allclose(value, edit.factors[layer], rtol=0, atol=atol)
    found = jax.jit(functools.partial(optax_spd.wise_ft, **options))(params, anchor, alpha)
    for key, array in edited.items():
        assert found[key].dtype == dtype
        np.testing.assert_allclose(found[key], array, rtol=0, atol=atol, err_msg=key)


def test_the_block_is_read_from_its_place_in_the_path() -> None:
    """Where the original takes a sublayer for the block, and misses a name that ends in one."""
    edit = Edit("lines_name_trap_repository")
    alpha = optax_spd.lines_alpha(edit.params, 0.2, r"encoder\.blocks\.(\d+)")
    found = dict(zip(optax_spd.layer_names(edit.params), alpha, strict=True))
    clean = dict.fromkeys(
        ("encoder.blocks.3.mlp.0.weight", "encoder.blocks.3.mlp.2.weight", "encoder.blocks.3"), 1.0
    )
    for name, factor in (edit.factors | clean).items():
        np.testing.assert_allclose(found[name], factor, rtol=1e-6, err_msg=name)


# Depths and layers -------------------------------------------------------------------------------


def model(blocks: int = 4) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    block = lambda: {"kernel": draw.normal(size=(3, 2)), "bias": draw.normal(size=2)}
    return {
        "embed": {"embedding": draw.normal(size=(3, 2))},
        "layers": {str(i): block() for i in range(blocks)},
        "head": {"kernel": draw.normal(size=(3, 2))},
    }


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({"a": 0, "b": 1, "c": 2}, [0.5, 0.75, 1.0]),
        ({"a": 3, "b": 5, "c": 11}, [0.5, 0.625, 1.0]),  # neither from 0 nor contiguous
        ({"a": -1.5, "b": 0.0, "c": None}, [0.5, 1.0, 0.5]),
        ({"a": 7, "b": None, "c": 7}, [0.5, 0.5, 0.5]),  # L = 1
        ({"a": None, "b": None, "c": None}, [0.5, 0.5, 0.5]),
    ],
)
def test_alpha_grows_from_the_smallest_number_to_the_largest(numbers: Any, expected: Any) -> None:
    params = {name: np.ones(2, np.float32) for name in numbers}
    alpha = optax_spd.lines_alpha(params, 0.5, numbers.__getitem__)
    np.testing.assert_array_equal(alpha, expected)


def test_it_may_be_searched_under_jit_and_differentiated() -> None:
    params, anchor = model(), jax.tree.map(np.zeros_like, model())

    def loss(a: jax.Array) -> jax.Array:
        alpha = optax_spd.lines_alpha(params, a, r"layers/(\d+)/")
        edited = optax_spd.wise_ft(params, anchor, alpha)
        return jnp.stack([jnp.sum(x) for x in jax.tree.leaves(edited)]).sum()

    total = lambda tree: sum(np.sum(x) for x in jax.tree.leaves(tree))
    slope = total(params["embed"]) + total(params["head"])
    slope += sum((1 - int(i) / 3) * total(block) for i, block in params["layers"].items())
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.3), slope, rtol=1e-5)


def test_a_second_tower_left_out_is_told() -> None:
    params = {"text": model(), "visual": model()}
    with pytest.warns(UserWarning, match=r"4 blocks 'text/layers/#', so their alpha is min_alpha"):
        optax_spd.lines_alpha(params, 0.5, r"visual/layers/(\d+)")


# Masks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["the tree", "the mask", "a scalar"])
def test_what_the_mask_leaves_out_keeps_its_fine_tuned_value(of: str) -> None:
    params, anchor = model(2), jax.tree.map(lambda x: x - 1, model(2))
    mask = {"embed": True, "head": False, "layers": True}
    whole = 0.5 if of == "a scalar" else optax_spd.lines_alpha(params, 0.5, r"layers/(\d+)/")
    expected = optax_spd.wise_ft(params, anchor, whole)
    names = optax_spd.layer_names(params)
    alpha = np.delete(whole, names.index("head/kernel")) if of == "the mask" else whole
    # A new head has no anchor, or one of another shape.
    for head in ({}, {"head": {"kernel": np.ones((3, 7))}}, {"head": None}):
        pretrained = {key: anchor[key] for key in ("embed", "layers")} | head
        found = optax_spd.wise_ft(params, pretrained, alpha, mask=mask)
        assert found["head"]["kernel"] is params["head"]["kernel"]
        for key in ("embed", "layers"):
            jax.tree.map(np.testing.assert_array_equal, found[key], expected[key])


def test_values_for_neither_the_tree_nor_the_mask_are_refused() -> None:
    params, mask = model(2), optax_spd.path_mask("layers")
    message = r"each of the 6 layers of params, or for each of the 4 under the mask .*\(5,\)"
    with pytest.raises(ValueError, match=message):
        optax_spd.wise_ft(params, params, np.ones(5), mask=mask)
    with pytest.raises(ValueError, match="mask is False for every parameter"):
        optax_spd.wise_ft(params, params, 0.5, mask=jax.tree.map(lambda _: False, params))


def test_a_mask_that_reorders_groups_is_refused() -> None:
    params = {name: np.ones(2, np.float32) for name in "abz"}
    layers = lambda path, _: optax_spd.LayerSpec(group="b" if path == "b" else "a and z")
    with pytest.raises(ValueError, match="another order under the mask"):
        optax_spd.wise_ft(
            params, params, [0.1, 0.2], layers=layers, mask={"a": False, "b": True, "z": True}
        )


PARAMS = {"layer_0": np.ones(2, np.float32), "layer_1": np.ones(2, np.float32)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"min_alpha": np.nan}, ValueError, "min_alpha must be finite"),
        ({"min_alpha": [0.5, 0.5]}, ValueError, r"min_alpha must be a scalar, .*\(2,\)"),
        ({"min_alpha": lambda count: 0.5}, TypeError, "min_alpha must hold real numbers"),
        (
            {"depth": r"block_(\d+)"},
            ValueError,
            "matches no layer, so the alpha of every layer would be min_alpha.*'layer_0'",
        ),
        (
            {"params": {"embed": np.ones(2, np.float32), "layer_0": optax.MaskedNode()}},
            ValueError,
            r"of every layer would be min_alpha, .* \('embed'\) alone\. Give all of params",
        ),
        ({"depth": r"layer_\d+"}, ValueError, "0 groups"),
        ({"depth": 3}, TypeError, "depth must be a regular expression"),
        ({"depth": lambda name: "one"}, TypeError, "depth must return a number or None"),
        ({"layers": "blocks"}, TypeError, "layers must be a function"),
        ({"params": {"a": np.ones(2) * 1j}}, TypeError, "complex"),
    ],
)
def test_wrong_input_is_refused(change: Any, error: type[Exception], message: str) -> None:
    arguments = {"params": PARAMS, "min_alpha": 0.5, "depth": r"layer_(\d+)"} | change
    with pytest.raises(error, match=message):
        optax_spd.lines_alpha(**arguments)
