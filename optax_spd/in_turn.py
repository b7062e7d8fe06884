"""An optimizer's step layer after layer, so that on one CPU it holds no second parameter tree.

XLA's scheduler for CPU starts whatever can start. Of Adam followed by SPD, say, it would compute
Adam's step for every array before the first layer's decision, and keep all of them: memory for a
whole parameter tree, taken anew from the operating system in every step. Here the chain is applied
to a layer at a time, and each layer's gradient made to depend on what was decided for an earlier
one. The chain stays the reference: on other devices and for sharded arrays it is what runs.
"""

import collections
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_spd import (
    anchors,
    layers as layers_lib,
    one_cpu,
    plans,
    portions,
    second_pass,
    stages,
    trees,
    wrappers,
)

PyTree = Any
StageOf = Callable[[stages.StageOptions], optax.GradientTransformationExtraArgs]

# In elements: so much is worked on at once, or a single layer if that is more. Cores that work on
# several arrays wait less for each other.
UNDER_WAY = 2**22

# The fields of the chain's states that are trees like the parameters or hold per-layer vectors. All
# others, such as step counts, are shared by the layers.
LIKE_PARAMS = frozenset({"mu", "nu", "trace", "ftp_deviation"})
PER_LAYER = frozenset({"spd_ratio", "tpgm_radii", "tpgm_started", "ftp_radii", "ftp_moments"})


def chain(
    inner: Sequence[optax.GradientTransformation],
    stage_of: StageOf,
    options: stages.StageOptions,
    *,
    inner_twice: bool = False,
    whole_for: Iterable[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """``optax_spd.chain(*inner, stage)``, in turn where a step is compiled for a single CPU.

    Args:
      inner: transformations that treat each element by itself. Of their states' fields, those that
        are like the parameters must be in ``LIKE_PARAMS``, as must the stage's but the anchor.
      stage_of: makes the stage behind them. Its per-layer fields must be in ``PER_LAYER``, the
        first of them a number and not a truth value.
      options: the stage's.
      inner_twice: whether elsewhere each of the stage's passes computes the inner step by itself
        (:func:`optax_spd.second_pass.chain`).
      whole_for: extra arguments with which the stage works on all layers at once. Otherwise
        ``grad`` and ``anchor`` alone are passed on.
    """
    stage = stage_of(dataclasses.replace(options, for_one_cpu=False))
    reference = wrappers.chain(*inner, stage)
    plain = second_pass.chain(inner, stage) if inner_twice else reference

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        trees.require_params(params)
        given = _Given(updates, state, params, extra_args.get("grad"), extra_args.get("anchor"))
        at_once = any(extra_args.get(name) is not None for name in whole_for)
        result: tuple[PyTree, Any]
        if at_once or options.axis_name is not None or not one_cpu.possible(given):
            form = reference if at_once else plain
            result = form.update(updates, state, params, **extra_args)
            return result
        whole = jax.jit(functools.partial(_update, plain))
        # First of all, so that what is wrong is said of the caller's trees.
        _, new_state = jax.eval_shape(whole, given)
        flat, plan, _ = plans.planned(params, options.layers, options.mask)
        if not plan.names or _lacks_gradients(flat, given):
            return _update(plain, given)
        leaves = _leaves(flat, plan, given, options)

        # Not kept for the next trace: what a schedule closes over may be another then.
        @functools.cache
        def step_of(specs: tuple[layers_lib.LayerSpec, ...]) -> Callable[..., Any]:
            return jax.jit(_step_of(inner, stage_of, options, specs))

        def in_turn() -> tuple[PyTree, Any]:
            types = _values(new_state, PER_LAYER)
            return _assembled(flat, given, *_in_turn(step_of, plan, leaves, state, types))

        result = jax.lax.platform_dependent(cpu=in_turn, default=lambda: whole(given))
        return result

    return optax.GradientTransformationExtraArgs(plain.init, update)


class _Given(NamedTuple):
    """An update's arguments; ``grad`` and ``anchor`` may be None."""

    updates: PyTree
    state: tuple[Any, ...]
    params: PyTree
    grad: PyTree
    anchor: PyTree


def _update(tx: optax.GradientTransformationExtraArgs, given: _Given) -> tuple[PyTree, Any]:
    result: tuple[PyTree, Any] = tx.update(
        given.updates, given.state, given.params, grad=given.grad, anchor=given.anchor
    )
    return result


def _lacks_gradients(flat: trees.FlatTree, given: _Given) -> bool:
    """Whether updates or gradient have other gaps than params: rare, and not worth code here."""
    gradients = (tree for tree in (given.updates, given.grad) if tree is not None)
    return any(trees.flatten(tree).gaps != flat.gaps for tree in gradients)


class _Leaf(NamedTuple):
    """What a step reads of one array, or of several stacked ones.

    Attributes:
      theta: θ.
      update: what the chain is given.
      grad: g.
      anchor: θ₀; None for zeros, and where there is no layer.
      inner: what the trees in the inner states that are like the parameters have there.
      stage: the same of the stage's state; () where there is no layer.
    """

    theta: Any
    update: Any
    grad: Any
    anchor: Any
    inner: tuple[Any, ...]
    stage: tuple[Any, ...]


class _Result(NamedTuple):
    """What a step writes of one array, or of several stacked ones."""

    update: jax.Array
    held: tuple[jax.Array, ...]


def _leaves(
    flat: trees.FlatTree, plan: plans.LayerPlan, given: _Given, options: stages.StageOptions
) -> list[_Leaf]:
    """Matches the trees by path."""
    acts = [entry is not None for entry in plan.arrays]
    origin: Sequence[Any] = [None] * len(acts)
    if not options.anchor_is_zero:
        held, extra_args = given.state[-1].anchor, {"anchor": given.anchor}
        origin = anchors.resolve_anchor(options.anchor, held, extra_args, flat, acts)
    updates = trees.align(flat, given.updates, "updates")
    grads = updates if given.grad is None else trees.align(flat, given.grad, "grad")
    inner, stage = (
        [trees.align(flat, tree, "the state") for tree in _values(state)]
        for state in (given.state[:-1], given.state[-1])
    )
    return [
        _Leaf(
            *arrays,
            inner=tuple(tree[i] for tree in inner),
            stage=tuple(tree[i] for tree in stage) if acts[i] else (),
        )
        for i, arrays in enumerate(zip(flat.leaves, updates, grads, origin, strict=True))
    ]


def _step_of(
    inner: Sequence[optax.GradientTransformation],
    stage_of: StageOf,
    options: stages.StageOptions,
    specs: tuple[layers_lib.LayerSpec, ...],
) -> Callable[[Sequence[Any], list[_Leaf]], tuple[list[_Result], Any]]:
    """The chain for a few arrays, of which ``specs`` says what layers they have: () if none."""
    stages_ = list(inner)
    if specs:
        part = stages.StageOptions(
            anchor="zero" if options.anchor_is_zero else "argument",
            layers=lambda name, _: specs[int(name)],
            for_one_cpu=True,
        )
        stages_.append(stage_of(part))
    chained = optax.chain(*stages_)

    def step(state: Sequence[Any], arrays: list[_Leaf]) -> tuple[list[_Result], Any]:
        fields = zip(*(array.inner + array.stage for array in arrays), strict=True)
        updates, state = chained.update(
            [a.update for a in arrays],
            _replaced(tuple(state[: len(stages_)]), map(list, fields)),
            [a.theta for a in arrays],
            grad=[a.grad for a in arrays],
            anchor=[a.anchor for a in arrays],
        )
        values = _values(state)
        held = (tuple(value[i] for value in values) for i in range(len(arrays)))
        return list(map(_Result, updates, held)), state

    return step


def _in_turn(
    step_of: Callable[..., Any],
    plan: plans.LayerPlan,
    leaves: Sequence[_Leaf],
    state: tuple[Any, ...],
    types: PyTree,
) -> tuple[dict[int, _Result], Any]:
    """By leaf the results; and the new state, with gaps for what is like the parameters in it.

    Args:
      step_of: the chain for a few arrays, by their specs.
      plan: the layers.
      leaves: what is read.
      state: the chain's.
      types: of the new per-layer vectors.
    """
    results: dict[int, _Result] = {}
    order: list[int] = []
    decided: list[list[Any]] = []
    new_state: tuple[Any, ...] = ()
    # The anchor's arrays are among the leaves.
    state = (*state[:-1], state[-1]._replace(anchor=optax.EmptyState()))
    vectors = _values(state, PER_LAYER)
    taken = portions.portions(plan, list(map(portions.kind_of, leaves)))
    numbers = portions.opaque_numbers(
        max(len(portion.leaves) for portion in taken), state[-1].count
    )
    under_way: collections.deque[tuple[int, jax.Array]] = collections.deque()
    earlier: jax.Array | None = None
    for portion in taken:
        arrays = [leaves[i] for i in portion.leaves]
        size = sum(np.size(array.theta) for array in arrays)
        if portion.stacked:
            size *= len(jax.tree.leaves(arrays[0]))
        while under_way and size + sum(other for other, _ in under_way) > UNDER_WAY:
            _, earlier = under_way.popleft()
        if portion.stacked:
            arrays = [_stacked(arrays, earlier)]
        else:
            arrays = [_waiting(array, earlier) for array in arrays]

        places, part = portion.places(plan), state
        if places:
            of_part = jax.tree.map(operator.itemgetter(_index(places)), vectors)
            part = _replaced(state, iter(of_part), PER_LAYER)
        found, new_state = step_of(portion.specs(plan))(part, arrays)
        if places:
            order += places
            decided.append(_values(new_state, PER_LAYER))
            # No radius or ratio is negative, unless in a state that someone changed.
            under_way.append((size, jnp.maximum(jax.tree.leaves(decided[-1])[0][0], 0)))
        if portion.stacked:
            found = portions.unstacked(found[0], numbers[: len(portion.leaves)])
        results |= zip(portion.leaves, found, strict=True)

    in_order = _index(np.argsort(order).tolist())
    joined = jax.tree.map(
        lambda like, *new: jnp.concatenate(new)[in_order].astype(like.dtype), types, *decided
    )
    return results, _replaced(new_state, iter(joined), PER_LAYER)


def _index(places: Sequence[int]) -> Any:
    """Picks entries; neighbours without a gather."""
    first, last = places[0], places[-1]
    if list(places) == list(range(first, last + 1)):
        return slice(first, last + 1)
    return np.array(places)


def _assembled(
    flat: trees.FlatTree, given: _Given, results: dict[int, _Result], new_state: Any
) -> tuple[PyTree, Any]:
    """What the chain returns."""
    old = _values(given.state)
    of_trees: list[dict[trees.Path, Any]] = [{} for _ in old]
    for i, result in results.items():
        # Where there is no layer, the last trees have nothing.
        for of_tree, array in zip(of_trees, result.held, strict=False):
            of_tree[flat.paths[i]] = array
    new_state = _replaced(new_state, map(trees.replace_leaves, old, of_trees))
    *inner, last = new_state
    updates = {flat.paths[i]: result.update for i, result in results.items()}
    return (
        trees.replace_leaves(given.updates, updates),
        (*inner, last._replace(anchor=given.state[-1].anchor)),
    )


def _values(state: Any, names: frozenset[str] = LIKE_PARAMS) -> list[Any]:
    """The fields of those names in a chain's state."""
    if hasattr(state, "_fields"):
        return [getattr(state, name) for name in state._fields if name in names]
    return [value for part in state for value in _values(part, names)]


def _replaced(state: Any, values: Iterator[Any], names: frozenset[str] = LIKE_PARAMS) -> Any:
    """The state with other values in the fields of those names, in the same order."""
    if hasattr(state, "_fields"):
        return state._replace(**{name: next(values) for name in state._fields if name in names})
    return tuple(_replaced(part, values, names) for part in state)


def _stacked(leaves: Sequence[_Leaf], earlier: jax.Array | None) -> _Leaf:
    """Several arrays of a kind as one."""
    first, *others = (jax.tree.map(anchors.on_device, leaf) for leaf in leaves)
    # One array that has to wait holds back the whole stack.
    first = jax.tree.map(functools.partial(_after, earlier), first)
    result: _Leaf = jax.tree.map(lambda *x: jnp.stack(x), first, *others)
    return result


def _waiting(leaf: _Leaf, earlier: jax.Array | None) -> _Leaf:
    """The leaf, of which no step or deviation can be computed before something is decided."""
    after = functools.partial(_after, earlier)
    return leaf._replace(
        theta=after(leaf.theta), update=after(leaf.update), stage=tuple(map(after, leaf.stage))
    )


def _after(decided: jax.Array | None, array: jax.Array) -> jax.Array:
    """The same numbers, which XLA cannot compute before something is decided.

    Adding -0 changes no number, not even 0, -0 or NaN; and XLA does not know that what is decided
    is not below -1. Its optimization barriers do not hold here: they are taken out before
    operations are fused.
    """
    array = jnp.asarray(array)
    if decided is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return array + jnp.where(decided < -1, 1, -0.0).astype(array.dtype)
