"""A layer with sick numbers keeps its inner update; no other layer notices."""

import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest

import optax_spd

HUGE = np.float32(3e30)  # finite; its square is not
SICK = {
    "NaN gradient": ("grad", np.nan),
    "infinite gradient": ("grad", np.inf),
    "negative infinite gradient": ("grad", -np.inf),
    "inner product overflows": ("grad", np.float32(3e38)),
    "square of the inner product overflows": ("grad", np.float32(3e37)),
    "NaN update": ("update", np.nan),
    "infinite update": ("update", -np.inf),
    "new norm overflows": ("update", HUGE),
    "NaN parameter": ("params", np.nan),
    "both norms overflow": ("params", HUGE),
    "NaN anchor": ("anchor", np.nan),
}
SHAPES = {"a": (4,), "b": (2, 3), "stack": (4, 3)}
LAYERS = ["a", "b", "stack[0]", "stack[1]", "stack[2]"]
STAGES: dict[str, Any] = {
    "spd": optax_spd.spd,
    "ftp in l2": functools.partial(optax_spd.ftp, norm="l2", radius_learning_rate=0.1),
    "ftp in mars": functools.partial(optax_spd.ftp, norm="mars", radius_learning_rate=0.1),
    "tpgm in l2": functools.partial(optax_spd.tpgm, norm="l2", radii=1.0),
    "tpgm in mars": functools.partial(optax_spd.tpgm, norm="mars", radii=1.0),
}
# Which of them use the gradient, and in which of its numbers each is sick: SPD in the sign of an
# inner product, FTP in its size and so in its square. Balls measure any finite deviation.
FIELDS = {"spd": "spd_ratio", "ftp": "ftp_radii", "tpgm": "tpgm_radii"}


def is_sick(stage: str, tree: str, value: float) -> bool:
    if tree == "grad":
        return stage.startswith("ftp") or (stage == "spd" and value != np.float32(3e37))
    return value != HUGE or stage == "spd"


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def healthy(stage: str, seed: int) -> dict[str, Any]:
    """An update along the deviation, and a gradient by which SPD fires or FTP's radii grow."""
    params = {name: normal(i, *shape) for i, (name, shape) in enumerate(SHAPES.items())}
    draw = np.random.default_rng(seed)
    noisy = lambda factor: {
        name: (factor * x + 0.1 * draw.normal(size=x.shape)).astype(np.float32)
        for name, x in params.items()
    }
    zeros = jax.tree.map(np.zeros_like, params)
    return {
        "params": params,
        "anchor": zeros,
        "grad": noisy(2 if stage == "spd" else -2),
        "update": noisy(0.25),
    }


@functools.cache
def compiled(stage: str) -> tuple[Any, Any]:
    """A stage's update from four trees, and its state after two healthy steps."""
    tx = STAGES[stage](anchor="argument", layers=optax_spd.stacked("stack", axis=1))

    @jax.jit
    def update(state: Any, trees: dict[str, Any]) -> Any:
        return tx.update(
            trees["update"], state, trees["params"], grad=trees["grad"], anchor=trees["anchor"]
        )

    state = tx.init(healthy(stage, 0)["params"])
    for seed in range(2):
        _, state = update(state, healthy(stage, seed))
    return update, state


def parts(tree: Any, state: Any) -> dict[str, list[np.ndarray]]:
    """By layer, its update and all that the state holds of it, whatever the state's fields."""
    found: dict[str, list[np.ndarray]] = {layer: [] for layer in LAYERS}
    for path, leaf in jax.tree.leaves_with_path((tree, state)):
        array, name = np.asarray(leaf), jax.tree_util.keystr(path[-1:]).strip("[]'")
        for number, layer in enumerate(LAYERS):
            owner, bracket, index = layer.rstrip("]").partition("[")
            if array.shape == (len(LAYERS),):
                found[layer].append(array[number])
            elif owner == name:
                found[layer].append(array[:, int(index)] if bracket else array)
    return found


@pytest.mark.parametrize("layer", ["b", "stack[1]"])
@pytest.mark.parametrize(("tree", "value"), SICK.values(), ids=SICK)
@pytest.mark.parametrize("stage", STAGES)
def test_a_sick_layer_keeps_its_inner_update_and_touches_no_other(
    stage: str, tree: str, value: float, layer: str
) -> None:
    update, before = compiled(stage)
    trees = healthy(stage, 2)
    expected = parts(*update(before, trees))
    name, bracket, index = layer.rstrip("]").partition("[")
    where: Any = (slice(None), int(index)) if bracket else ...
    if abs(value) in (np.float32(3e38), np.float32(3e37)):
        trees[tree][name][where] = value * np.sign(trees["params"][name][where])
    else:
        trees[tree][name][where].flat[0] = value  # one number of a layer is enough
    updates, after = update(before, trees)
    found = parts(updates, after)
    for other in LAYERS:
        if other != layer:
            for x, y in zip(found[other], expected[other], strict=True):
                np.testing.assert_array_equal(x, y)
    if not is_sick(stage, tree, value):
        return
    np.testing.assert_array_equal(found[layer][0], trees["update"][name][where])
    field = FIELDS[stage.partition(" ")[0]]
    number = LAYERS.index(layer)
    decided = optax.tree.get(after, field)[number]
    # A ratio is 0; a radius and all that it is learned with keep their last values.
    if stage == "spd":
        assert decided == 0
    else:
        kept = parts(trees["update"], before)[layer]
        for x, y in zip(found[layer][1:], kept[1:], strict=True):
            np.testing.assert_array_equal(x, y)
    _, last = update(after, healthy(stage, 3))  # and it goes on from there
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(last))
    if stage.startswith("ftp"):
        assert optax.tree.get(last, field)[number] != decided
