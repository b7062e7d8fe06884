"""How deep each layer lies in a model, from a pattern or a function of the layer names.

A *height* is D - d: how many layers a layer at depth d is below the head, at depth D.
"""

import math
import re
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from optax_spd.layers import checks, embeddings, masks, plans, trees

Depth = str | Callable[[str], float | None]
"""A regular expression with the layer's number as its group, or a function from name to depth."""

Numbers = Callable[[plans.LayerPlan, trees.FlatTree], dict[int, float]]
"""(layers, parameters) -> the depths, by the layers' indices; without those that have none."""

Heights = Callable[[plans.LayerPlan, trees.FlatTree], np.ndarray]
"""(layers, parameters) -> a height for each entry of a per-layer vector."""

EMBEDDING = re.compile("|".join(embeddings.DEFAULT_EMBEDDING_PATTERNS))


class Consequences(NamedTuple):
    """What the caller does with layers without a number, for the messages about a pattern.

    Attributes:
      left_out: what becomes of blocks that the pattern leaves out, and what to do about it.
      no_match: what becomes of the layers if it matches none.
      no_match_in_part: what is wrong then in a part of a tree with embeddings, and what to do about
        it; with "{}" for the name of one.
    """

    left_out: str
    no_match: str
    no_match_in_part: str


def heights_from(depth: Depth, consequences: Consequences) -> Heights:
    """The heights that a ``depth=`` argument describes.

    With a pattern the head is one above the largest number, embeddings are one below the smallest,
    and all other layers that do not match have height 0. With a function the head is at the largest
    depth.

    Args:
      depth: the argument.
      consequences: for the messages.

    Raises:
      TypeError, ValueError: as :func:`numbers_from`.
    """
    numbers_of = numbers_from(depth, consequences)
    is_pattern = isinstance(depth, str)

    def heights(plan: plans.LayerPlan, flat: trees.FlatTree) -> np.ndarray:
        result = np.zeros(plan.vector_size)
        numbers = numbers_of(plan, flat)
        if not numbers:
            return result
        top = max(numbers.values()) + is_pattern
        for i, number in numbers.items():
            result[i] = top - number
        if is_pattern:
            result[unnumbered_embeddings(plan, numbers)] = top - min(numbers.values()) + 1
        return result

    return heights


def numbers_from(depth: Depth, consequences: Consequences) -> Numbers:
    """The depths that a ``depth=`` argument gives.

    Args:
      depth: the argument.
      consequences: for the messages.

    Raises:
      TypeError: not a pattern or a function. When called: a depth that is not a number.
      ValueError: a pattern without exactly one group. When called: a depth or a group that is not a
        finite number, or a pattern that matches no layer.
    """
    if not isinstance(depth, str):
        return numbers_from_function(depth)
    pattern, regex = depth, checks.compile_pattern(depth)
    if regex.groups != 1:
        raise ValueError(
            f"depth={pattern!r} has {regex.groups} groups; it must have exactly one, around the "
            r"layer's number, as 'layer_(\d+)'. Write other groups as (?:...)."
        )

    def numbers_of(plan: plans.LayerPlan, flat: trees.FlatTree) -> dict[int, float]:
        matches = [regex.search(name) for name in plan.names]
        numbers = {
            i: parse_number(match.group(1), name, pattern)
            for i, (name, match) in enumerate(zip(plan.names, matches, strict=True))
            if match is not None
        }
        unnumbered = unnumbered_embeddings(plan, numbers)
        if not numbers:
            check_no_match(pattern, plan, flat, unnumbered, consequences)
            return numbers
        spans = [None if match is None else match.span(1) for match in matches]
        others = [n for i, n in enumerate(plan.names) if i not in numbers and i not in unnumbered]
        matched = zip(plan.names, spans, strict=True)
        warn_of_blocks_left_out(pattern, matched, others, consequences.left_out)
        return numbers

    return numbers_of


def numbers_from_function(depth: Callable[[str], Any]) -> Numbers:
    """Depths from a function of the layer's name that returns None for layers without one.

    Raises:
      TypeError: not a function. When called: a depth that is not a number.
      ValueError: when called, a depth that is not finite.
    """
    if not callable(depth):
        raise TypeError(
            "depth must be a regular expression with one group or a function from layer name to "
            f"number, got {depth!r}."
        )

    def numbers_of(plan: plans.LayerPlan, flat: trees.FlatTree) -> dict[int, float]:
        del flat
        return {
            i: check_number(number, name)
            for i, name in enumerate(plan.names)
            if (number := depth(name)) is not None
        }

    return numbers_of


def unnumbered_embeddings(plan: plans.LayerPlan, numbers: Container[int]) -> list[int]:
    """The layers with an embedding array that have no number."""
    return sorted(i for i in embedding_layers(plan) if i not in numbers)


def embedding_layers(plan: plans.LayerPlan) -> set[int]:
    """The layers with an embedding array; by the array's path, since a group has only a label."""
    return {
        number
        for entry in plan.arrays
        if entry is not None and EMBEDDING.search(entry.name)
        for number in entry.numbers
    }


def parse_number(text: str | None, name: str, pattern: str) -> float:
    """The number that a pattern's group matched.

    Raises:
      ValueError: it is not a finite number.
    """
    try:
        number = float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The group of depth={pattern!r} matches {text!r} in the layer {name!r}; it must be "
            r"the layer's number, as in 'layer_(\d+)'."
        ) from error
    return check_finite(number, name)


def check_number(number: Any, name: str) -> float:
    """Raises TypeError or ValueError unless a function's depth is a finite number."""
    is_number = isinstance(number, int | float | np.integer | np.floating)
    if not is_number or isinstance(number, bool):
        raise TypeError(
            f"depth must return a number or None, got {number!r} for the layer {name!r}."
        )
    return check_finite(float(number), name)


def check_finite(number: float, name: str) -> float:
    """Raises ValueError unless the depth is finite."""
    if not math.isfinite(number):
        raise ValueError(f"depth gives {number} for the layer {name!r}; it must be finite.")
    return number


def check_no_match(
    pattern: str,
    plan: plans.LayerPlan,
    flat: trees.FlatTree,
    unnumbered: list[int],
    consequences: Consequences,
) -> None:
    """Raises ValueError for a pattern that matches no layer.

    It may match nothing in a part of the tree, where another mask has removed the layers, unless
    the part has embeddings (``unnumbered``): then it may be the first part of a model.
    """
    nearest = trees.nearest_paths(pattern, [(name,) for name in plan.names])
    if masks.is_unmasked(flat):
        raise ValueError(
            f"depth={pattern!r} matches no layer, {consequences.no_match}. The nearest layer "
            f"names: {nearest}. Stacked layers have a number only with layers=stacked(...)."
        )
    if unnumbered:
        told = consequences.no_match_in_part.format(repr(plan.names[unnumbered[0]]))
        raise ValueError(f"depth={pattern!r} matches no layer of this part of the tree, {told}")


class Blocks(NamedTuple):
    """The layers in one place whose names differ only in a number, and in what follows it.

    Attributes:
      numbers: as text.
      endings: what follows the number: the arrays of a block.
    """

    numbers: set[str]
    endings: set[str]

    def are_like(self, others: "Blocks") -> bool:
        """Whether these are blocks as deep as others with the same key, and not a small head.

        A head of dense layers has one or two arrays in each, and fewer layers than the network.
        """
        as_many = len(self.numbers) >= len(others.numbers) and self.endings == others.endings
        return len(self.numbers) > 1 and (len(self.endings) > 2 or as_many)


def numbered_blocks(
    numbers: Iterable[tuple[str, tuple[int, int]]],
) -> dict[tuple[str, str], Blocks]:
    """Groups layers by where their number is, and by the key that it is in.

    Args:
      numbers: layer names, each with the span of a number in it.

    Returns:
      By ("text/encoder", "layer_#") the blocks "text/encoder/layer_0/...", and so on. A number that
      is a key of its own takes the key above it along ("layers/#"). That of a stacked layer is
      "[#]".
    """
    found: dict[tuple[str, str], Blocks] = {}
    for name, (start, end) in numbers:
        is_index = name[start - 1 : start] == "["
        first = start - 1 if is_index else name.rfind("/", 0, max(0, start - 1)) + 1
        last = end + len(name[end:].split("/")[0])
        key = name[first:start] + "#" + name[end:last]
        blocks = found.setdefault((name[:first], key), Blocks(set(), set()))
        blocks.numbers.add(name[start:end])
        blocks.endings.add(name[last:])
    return found


def warn_of_blocks_left_out(
    pattern: str,
    matched: Iterable[tuple[str, tuple[int, int] | None]],
    others: Sequence[str],
    left_out: str,
) -> None:
    """Warns if numbered blocks like those that the pattern matches stand outside of it.

    They would be treated like the head silently: the second tower of a model with two.

    Args:
      pattern: for the message.
      matched: layer names, each with the span of its number, or None where there is no match.
      others: the names of the layers without a number.
      left_out: what becomes of blocks left out, and what to do about it, for the message.
    """
    inside = numbered_blocks((name, span) for name, span in matched if span is not None)
    outside = numbered_blocks(
        (name, number.span()) for name in others for number in re.finditer("[0-9]+", name)
    )
    for (where, key), blocks in outside.items():
        if any(key == k and blocks.are_like(like) for (_, k), like in inside.items()):
            checks.warn(
                f"depth={pattern!r} does not match the {len(blocks.numbers)} blocks "
                f"{where + key!r}, {left_out}"
            )
            return
