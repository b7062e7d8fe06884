"""Groups of layers that share a learning-rate factor: by module, or by block."""

import re
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_spd.layers import plans, trees
from optax_spd.methods.temp_balance import weights

INDEX = re.compile(r"\[[\d,]+\]$")  # the end of a stacked layer's name

Follows = Callable[[str], str]
"""From the path of an array's module to the path of the module whose factor it takes."""

Scales = Callable[[jax.Array, jax.Array], jax.Array]
"""(exponents, which to include) -> factors."""


class Modules(NamedTuple):
    """A factor for each balanced layer; other layers follow balanced ones.

    Attributes:
      size: length of the per-layer vectors.
      followers: layers that take a factor, with repetitions.
      leaders: the layer whose factor each follower takes. A layer with several leaders takes the
        mean. A balanced layer leads itself.
    """

    size: int
    followers: np.ndarray
    leaders: np.ndarray

    @property
    def scalable(self) -> np.ndarray:
        """Per layer whether its factor may differ from 1."""
        marks = np.zeros(self.size, bool)
        marks[self.followers] = True
        return marks

    def scales(
        self, alpha: jax.Array, found: jax.Array, scales: Scales, *, normalize: bool
    ) -> jax.Array:
        """The factor of every layer."""
        s = scales(alpha, found)
        if normalize:
            s = s / _mean(s, found)
        s, has_leader = weights.mean_by(
            s[self.leaders], found[self.leaders], self.followers, self.size
        )
        return jnp.where(has_leader, s, 1)


class Blocks(NamedTuple):
    """All layers of a block share the factor of the block's mean exponent.

    Attributes:
      block: per layer the number of its block; -1 outside all blocks.
      number: the number of blocks.
    """

    block: np.ndarray
    number: int

    @property
    def scalable(self) -> np.ndarray:
        """Per layer whether its factor may differ from 1."""
        return self.block >= 0

    def scales(
        self, alpha: jax.Array, found: jax.Array, scales: Scales, *, normalize: bool
    ) -> jax.Array:
        """The factor of every layer."""
        if not self.number:
            return jnp.ones_like(alpha)
        inside = self.scalable
        mean, has_alpha = weights.mean_by(
            alpha, found & inside, np.maximum(self.block, 0), self.number
        )
        s = jnp.where(inside, scales(mean, has_alpha)[self.block], 1)
        if normalize:
            s = jnp.where(inside, s / _mean(s, found), 1)
        return s


def modules(
    flat: trees.FlatTree, selection: weights.Selection, follows: Follows | None, *, unmasked: bool
) -> Modules:
    """Assigns arrays without a spectrum to the layers whose factors they take.

    An array without a spectrum follows the weights of its module (its path without the last key),
    or of the module that ``follows`` names; a stacked array does so index by index. The top of the
    tree is a module only if it holds a single weight: with several it is unclear which to follow.

    Args:
      flat: the parameters.
      selection: the balanced weights.
      follows: from an array's module to the module it follows.
      unmasked: whether the tree is complete: no other mask has removed parameters.

    Raises:
      ValueError: the module to follow does not exist, or is stacked differently.
    """
    plan, balanced = selection.plan, selection.balanced
    leaders: dict[str, dict[tuple[int, ...], list[int]]] = {}
    for weight in selection.weights:
        members = leaders.setdefault(_module(weight.entry.name), {})
        for layer, index in _stacked_layers(weight.entry):
            if balanced[layer] and layer not in members.setdefault(index, []):
                members[index].append(layer)
    if sum(map(len, leaders.get("", {}).values())) > 1:
        del leaders[""]
    known = {_module(trees.path_name(path)) for path in flat.paths}
    pairs = {(int(layer), int(layer)) for layer in np.flatnonzero(balanced)}
    for leaf_index, (entry, leaf) in enumerate(zip(plan.arrays, flat.leaves, strict=True)):
        if entry is None or weights.as_weight(leaf_index, entry, jnp.shape(leaf)) is not None:
            continue
        module = _module(entry.name)
        target = module if follows is None else _target(follows, module, known, unmasked=unmasked)
        members = leaders.get(target, {})
        for layer, index in _stacked_layers(entry):
            if balanced[layer] or not members:
                continue
            if index not in members:
                raise ValueError(
                    f"{entry.name!r} follows the weights of {target!r}, but layers= divides them "
                    "differently into stacked layers. Describe both alike."
                )
            pairs.update((layer, leader) for leader in members[index])
    ordered = np.array(sorted(pairs), np.int32).reshape(-1, 2)
    return Modules(plan.vector_size, ordered[:, 0], ordered[:, 1])


def _module(name: str) -> str:
    return name.rpartition("/")[0]


def _stacked_layers(entry: plans.ArrayLayers) -> list[tuple[int, tuple[int, ...]]]:
    """An array's layers: (index in the per-layer vectors, index along the stacked axes)."""
    return list(zip(entry.numbers, np.ndindex(*entry.stacked_shape), strict=True))


def _target(follows: Follows, module: str, known: set[str], *, unmasked: bool) -> str:
    target = follows(module)
    if not isinstance(target, str):
        raise TypeError(f"follows must return the path of a module (str), got {target!r}.")
    if unmasked and target not in known:
        raise ValueError(
            f"follows sends {module!r} to {target!r}, which holds no parameter. The nearest "
            f"modules: {trees.nearest_paths(target, [tuple(k.split('/')) for k in known])}."
        )
    return target


def blocks(plan: plans.LayerPlan, pattern: re.Pattern[str] | None, *, unmasked: bool) -> Blocks:
    """Finds the block of each layer.

    Args:
      plan: the layers.
      pattern: the text that it matches in a layer's name (its groups, if it has any) names the
        block. None to use the numbers in the paths.
      unmasked: whether the tree is complete: no other mask has removed parameters.

    Raises:
      ValueError: no layer of a complete tree is in a block.
    """
    labels = _numbered(plan.names) if pattern is None else [_match(pattern, n) for n in plan.names]
    if unmasked and plan.names and not any(labels):
        wanted = "numbered keys" if pattern is None else f"what block={pattern.pattern!r} matches"
        raise ValueError(
            f"No layer is in a block: {wanted} was looked for in "
            f"{trees.nearest_paths('', [(name,) for name in plan.names], count=5)}. Give block= a "
            'pattern that matches there, or use unit="layer".'
        )
    numbers: dict[Hashable, int] = {}
    found = [-1 if x is None else numbers.setdefault(x, len(numbers)) for x in labels]
    found += [-1] * (plan.vector_size - len(found))
    return Blocks(np.array(found, np.int32), len(numbers))


def _match(pattern: re.Pattern[str], name: str) -> Hashable | None:
    match = pattern.search(name)
    return None if match is None else match.groups() or match.group()


def _numbered(names: Sequence[str]) -> list[Hashable | None]:
    """Labels each name by its path up to the first numbered key with siblings, and its index.

    A number without siblings ("ResNet50_0", "wav2vec2") is ignored.
    """
    siblings: dict[tuple[str, str], set[str]] = {}
    for name in names:
        for above, stem, number in _numbered_keys(name):
            siblings.setdefault((above, stem), set()).add(number)

    def label(name: str) -> Hashable | None:
        index = INDEX.search(name)
        for above, stem, number in _numbered_keys(name):
            if len(siblings[above, stem]) > 1:
                return above, stem, number, index and index.group()
        return index and index.group()

    return [label(name) for name in names]


def _numbered_keys(name: str) -> list[tuple[str, str, str]]:
    """The keys above the last that end in a number: (path above, key without it, number)."""
    keys = INDEX.sub("", name).split("/")
    found = []
    for depth, key in enumerate(keys[:-1]):
        stem = key.rstrip("0123456789")
        if stem != key:
            found.append(("/".join(keys[:depth]), stem, key[len(stem) :]))
    return found


def _mean(values: jax.Array, included: jax.Array) -> jax.Array:
    """The mean of the included values; 1 if it is 0, or there are none."""
    mean = jnp.sum(jnp.where(included, values, 0)) / jnp.maximum(jnp.sum(included), 1)
    return jnp.where(mean > 0, mean, 1)
