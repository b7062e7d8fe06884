"""Which arrays a step on one CPU takes at a time, and how small ones are stacked."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_spd import LayerSpec, in_turn, plans, portions, trees


def set_sizes(monkeypatch: pytest.MonkeyPatch, small_array: int, largest_stack: int) -> None:
    monkeypatch.setattr(portions, "SMALL_ARRAY", small_array)
    monkeypatch.setattr(portions, "LARGEST_STACK", largest_stack)


def portions_of(
    shapes: dict[str, tuple[int, ...]], layers: Any = None, kinds: dict[str, Any] | None = None
) -> list[tuple[str, bool]]:
    """The portions' names, joined, and whether they are stacked."""
    params = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    params |= {"ids": np.zeros(3, np.int32)}
    names = sorted(params)
    plan = plans.plan_layers(trees.flatten(params), layers)
    of = [(params[name].shape, (kinds or {}).get(name)) for name in names]
    found = portions.portions(plan, of)
    assert sorted(i for portion in found for i in portion.leaves) == list(range(len(names)))
    return [(" ".join(names[i] for i in portion.leaves), portion.stacked) for portion in found]


def test_small_arrays_of_one_kind_are_stacked_up_to_a_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_sizes(monkeypatch, 5, 12)
    shapes = dict.fromkeys("abcdef", (5,)) | {"g": (4,), "h": (4,), "i": (2, 2)}
    assert portions_of(shapes, kinds={"e": "half"}) == [
        ("ids", False),
        ("a b", True),
        ("c d", True),
        ("e", True),
        ("f", True),
        ("g h", True),
        ("i", True),
    ]


def test_large_arrays_groups_and_stacked_layers_are_taken_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_sizes(monkeypatch, 5, 99)
    shapes = {"a": (2,), "b": (2,), "c": (6,), "d": (2,), "e": (2,), "f": (2,), "g": (2,)}
    described = {"b": LayerSpec(group="g"), "d": LayerSpec((0,)), "f": LayerSpec(group="g")}
    assert portions_of(shapes, lambda path, array: described.get(path, LayerSpec())) == [
        ("ids", False),
        ("a e g", True),
        ("b f", False),
        ("c", False),
        ("d", False),
    ]


def test_the_sizes_agree() -> None:
    # A single small array must fit into a stack, and a stack's copies into what is under way.
    assert portions.SMALL_ARRAY <= portions.LARGEST_STACK
    assert 7 * portions.LARGEST_STACK <= in_turn.UNDER_WAY


def test_specs_and_places_of_a_stack_and_of_a_group() -> None:
    params = {"a": np.zeros((2, 3, 4)), "b": np.zeros((2, 5)), "c": np.zeros((3, 4))}
    params |= {"d": np.zeros((3, 4)), "ids": np.zeros(3, np.int32)}
    described = {
        "a": LayerSpec((0,), (1,), group="ab"),
        "b": LayerSpec((0,), group="ab"),
        "c": LayerSpec(output_axes=(0,)),
        "d": LayerSpec(output_axes=(0,)),
    }
    plan = plans.plan_layers(trees.flatten(params), lambda path, array: described[path])
    group, stack = portions.Portion([0, 1], stacked=False), portions.Portion([2, 3], stacked=True)
    assert (group.places(plan), stack.places(plan)) == ([0, 1], [2, 3])
    # Planned again with these, alone or stacked, they have the same layers and rows.
    for portion, arrays in [
        (group, [params["a"], params["b"]]),
        (stack, [np.stack([params["c"], params["d"]])]),
    ]:
        specs = portion.specs(plan)
        again = plans.plan_layers(trees.flatten(arrays), lambda name, _, s=specs: s[int(name)])
        assert len(again.names) == 2
    assert [entry.output_axes for entry in again.arrays if entry] == [(1,)]
    assert portions.Portion([4], stacked=False).specs(plan) == ()


def test_what_differs_is_not_of_a_kind() -> None:
    one = np.zeros((2, 3), np.float32)
    kinds = [(one, one), (one, one.astype(np.float16)), (one.T, one), (one, None), ()]
    assert len({portions.kind_of(leaf) for leaf in kinds}) == len(kinds)
    assert portions.kind_of((one, one)) == portions.kind_of((one + 1, -one))


def test_stacked_arrays_come_apart_in_order() -> None:
    draw = np.random.default_rng(0)
    pairs = [(draw.normal(size=(2, 3)).astype("f"), draw.normal(size=4).astype("f"))] * 2
    pairs = [jax.tree.map(lambda x, i=i: x + i, pair) for i, pair in enumerate(pairs)]

    @jax.jit
    def there_and_back(pairs: Any, count: Any) -> Any:
        stack = jax.tree.map(lambda *x: jnp.stack(x), *pairs)
        return portions.unstacked(stack, portions.opaque_numbers(len(pairs), count))

    jax.tree.map(np.testing.assert_array_equal, there_and_back(pairs, jnp.int32(3)), pairs)
