"""Adam and SPD layer after layer, so that a step on one CPU holds no second parameter tree.

XLA's scheduler for CPU starts whatever can start. It would compute Adam's step for every array
before the first layer's decision, and keep all of them: memory for a whole parameter tree, taken
anew from the operating system in every step. Here each layer's gradient is made to depend on the
decision of the layer before it. The equations are those of the chain, which stays the reference: on
other devices and for sharded arrays it is what runs.
"""

import collections
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_spd import anchors, checks, one_cpu, plans, stages, trees, wrappers
from optax_spd.spd import SPDState, one_unit, stage_of

PyTree = Any

# In elements: arrays up to the one size are stacked with others of their shape, up to the other in
# all. A thousand biases would otherwise take a thousand kernels of each kind.
SMALL_ARRAY = 2**16
LARGEST_STACK = 2**18
# In elements: so much is worked on at once, or a single layer if that is more. Cores that work on
# several arrays wait less for each other.
UNDER_WAY = 2**22


def adam_then_spd(
    adam: optax.GradientTransformation,
    weight_decay: checks.ScalarOrSchedule,
    options: stages.StageOptions,
) -> optax.GradientTransformationExtraArgs:
    """``chain(adam, spd(...))``, layer after layer where the step is compiled for a single CPU.

    Args:
      adam: ``optax.adam(...)``.
      weight_decay: SPD's λ.
      options: its other arguments.
    """
    chained = wrappers.chain(adam, stage_of(weight_decay, options, for_one_cpu=False))

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        def chain() -> tuple[PyTree, Any]:
            result: tuple[PyTree, Any] = chained.update(updates, state, params, **extra_args)
            return result

        trees.require_params(params)
        reads = (updates, state, params, extra_args.get("grad"), extra_args.get("anchor"))
        if options.axis_name is not None or not _is_state(state) or not one_cpu.possible(reads):
            return chain()
        flat, plan, _ = plans.planned(params, options.layers, options.mask)
        grad = updates if extra_args.get("grad") is None else extra_args["grad"]
        aligned = [trees.align(flat, updates, "updates"), trees.align(flat, grad, "grad")]
        absent = [trees.is_gap(theta) for theta in flat.leaves]
        gaps = ([trees.is_gap(leaf) for leaf in leaves] for leaves in aligned)
        if not plan.names or any(found != absent for found in gaps):
            return chain()  # a missing gradient; rare, and not worth more code here
        (moments, *_), stage_state = state
        stages.check_vector("spd_ratio", stage_state.spd_ratio, plan)
        acts = [entry is not None for entry in plan.arrays]
        held = anchors.resolve_anchor(options.anchor, stage_state.anchor, extra_args, flat, acts)
        mu, nu = (trees.align(flat, tree, "Adam's state") for tree in (moments.mu, moments.nu))
        if options.anchor_is_zero:
            held = [None] * len(held)
        leaves = list(map(_Leaf, flat.leaves, *aligned, held, mu, nu))
        decay = checks.value_at(weight_decay, stage_state.count, plan.dtype)

        def in_turn() -> tuple[PyTree, Any]:
            results, new_inner, ratio = _in_turn(adam, plan, flat.paths, leaves, state[0], decay)

            def tree(like: PyTree, field: str) -> PyTree:
                new = {flat.paths[i]: getattr(result, field) for i, result in results.items()}
                return trees.replace_leaves(like, new)

            new_moments, *new_rates = new_inner
            new_moments = new_moments._replace(mu=tree(moments.mu, "mu"), nu=tree(moments.nu, "nu"))
            count = optax.safe_increment(stage_state.count)
            new_stage_state = stage_state._replace(count=count, spd_ratio=ratio)
            return tree(updates, "update"), ((new_moments, *new_rates), new_stage_state)

        result: tuple[PyTree, Any] = jax.lax.platform_dependent(cpu=in_turn, default=chain)
        return result

    return optax.GradientTransformationExtraArgs(chained.init, update)


def _is_state(state: Any) -> bool:
    """Whether it is the chain's; otherwise the chain's own error is the best."""
    return (
        isinstance(state, tuple)
        and [type(part) for part in state[1:]] == [SPDState]
        and isinstance(state[0], tuple)
        and isinstance(next(iter(state[0]), None), optax.ScaleByAdamState)
    )


class _Leaf(NamedTuple):
    """What a step reads of one array, or of several stacked ones; no anchor stands for zeros."""

    theta: Any
    update: Any
    grad: Any
    anchor: Any
    mu: Any
    nu: Any


class _Result(NamedTuple):
    """What a step writes of one array, or of several stacked ones."""

    update: jax.Array
    mu: jax.Array
    nu: jax.Array


class Portion(NamedTuple):
    """Arrays that are taken at a time: a unit's, or small ones of one shape, to be stacked."""

    leaves: list[int]
    stacked: bool


def portions(plan: plans.LayerPlan, kinds: Sequence[Any]) -> list[Portion]:
    """Divides the leaves up.

    Args:
      plan: the layers.
      kinds: per leaf something hashable that starts with its shape, or () for a gap; only leaves
        with equal kinds are stacked.
    """
    found: list[Portion] = []
    stacks: dict[Any, list[int]] = {}
    for unit in plan.units:
        first = unit.leaves[0]
        size = math.prod(kinds[first][0])
        if len(unit.leaves) > 1 or plan.stacked_axes(first) or size > SMALL_ARRAY:
            found.append(Portion(unit.leaves, stacked=False))
            continue
        stack = stacks.get(kinds[first])
        if stack is None or (len(stack) + 1) * size > LARGEST_STACK:
            stack = stacks[kinds[first]] = []
            found.append(Portion(stack, stacked=True))
        stack.append(first)
    others = (i for i, entry in enumerate(plan.arrays) if entry is None and kinds[i])
    return found + [Portion([i], stacked=False) for i in others]


def _in_turn(
    adam: optax.GradientTransformation,
    plan: plans.LayerPlan,
    paths: Sequence[trees.Path],
    leaves: Sequence[_Leaf],
    inner: Any,
    decay: jax.Array,
) -> tuple[dict[int, _Result], Any, jax.Array]:
    """By leaf the results; Adam's state, its moments still to be filled in; and all r."""
    results: dict[int, _Result] = {}
    order: list[int] = []
    ratios: list[jax.Array] = []
    moments, *rates = inner
    taken = portions(plan, [_kind(leaf) for leaf in leaves])
    numbers = _numbers(max(len(portion.leaves) for portion in taken), moments.count)
    under_way: collections.deque[tuple[int, jax.Array]] = collections.deque()
    earlier: jax.Array | None = None
    for indices, stacked in taken:
        size = sum(np.size(leaves[i].theta) for i in indices) * (
            len(_Leaf._fields) if stacked else 1
        )
        while under_way and size + sum(other for other, _ in under_way) > UNDER_WAY:
            _, earlier = under_way.popleft()
        arrays = [leaves[i] for i in indices]
        axes = tuple(plan.stacked_axes(i) for i in indices)
        if stacked:
            arrays = [jax.tree.map(anchors.on_device, array) for array in arrays]
            # One array that has to wait holds back the whole stack.
            arrays[0] = jax.tree.map(functools.partial(_after, earlier), arrays[0])
            arrays, axes = [jax.tree.map(lambda *x: jnp.stack(x), *arrays)], ((0,),)
        part = moments._replace(mu=[a.mu for a in arrays], nu=[a.nu for a in arrays])
        gradients = [_after(earlier, a.update) for a in arrays]
        u, (part, *new_rates) = adam.update(gradients, (part, *rates), [a.theta for a in arrays])

        if plan.arrays[indices[0]] is not None:
            path = paths[indices[0]]
            steps = [
                stages.deviation_of(path, step, a.theta, 0 if a.anchor is None else a.anchor)
                for step, a in zip(u, arrays, strict=True)
            ]
            grads = [
                trees.as_real(a.grad, d.delta.dtype, "grad", path)
                for d, a in zip(steps, arrays, strict=True)
            ]
            new, ratio = one_unit(axes, steps, grads, decay)
            u = [x.astype(old.dtype) for x, old in zip(new, u, strict=True)]
            ratios.append(ratio)
            under_way.append((size, ratio[0]))
            entries = [plan.arrays[i] for i in (indices if stacked else indices[:1])]
            order += [number for entry in entries if entry for number in entry.numbers]
        found = list(map(_Result, u, part.mu, part.nu))
        if stacked:
            found = _apart(found[0], numbers[: len(indices)])
        results |= zip(indices, found, strict=True)
    ratio = jnp.concatenate(ratios)[np.argsort(order)]
    return results, (part, *new_rates), ratio


def _kind(leaf: _Leaf) -> tuple[Any, ...]:
    """What must be equal to be stacked: shapes, the parameter's first, and dtypes."""
    arrays = jax.tree.leaves(leaf)
    return (*map(jnp.shape, arrays), *map(jnp.result_type, arrays))


def _numbers(size: int, count: jax.Array) -> list[jax.Array]:
    """0, 1, 2, ... as numbers that XLA does not know.

    With indices that it knows it compiles a kernel of its own for every array taken out of a
    stack; without, arrays of one shape share one. It cannot know that a count is not negative.
    """
    known = [np.int32(i) for i in range(size)]
    numbers: list[jax.Array] = jax.lax.cond(count >= 0, lambda: known, lambda: known[::-1])
    return numbers


def _apart(stack: _Result, numbers: Sequence[jax.Array]) -> list[_Result]:
    """The arrays that were stacked."""
    return [
        _Result(*(jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in stack))
        for i in numbers
    ]


def _after(ratio: jax.Array | None, array: jax.Array) -> jax.Array:
    """The same numbers, which XLA cannot compute before the ratio.

    Adding -0 changes no number, not even 0, -0 or NaN; and XLA does not know that it adds -0,
    since 0 times a ratio might be NaN. Its optimization barriers do not hold here: they are
    taken out before operations are fused.
    """
    if ratio is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return array + (-0.0 * ratio).astype(array.dtype)
