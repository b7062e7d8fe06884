"""The driver for methods with one decision per layer: builds a stage from three pure functions.

    products = measure(deviation, gradient)    elementwise, then summed over each layer (or row)
    decision = decide(*sums, *memory)          values to record, coefficients, where to change u
    update   = act(deviation, *coefficients)   elementwise, used where the decision changes u

Everything else is here and in the modules it imports, once for all methods: matching trees, the
anchor, masks, stacked layers, groups, sharding and hand-split axes, dtypes, schedules, the step
count, and isolation of layers that are not finite.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_spd import wrappers
from optax_spd.core import decisions, recompute, stage
from optax_spd.core.decisions import Decision
from optax_spd.core.sums import Products, sharded_like
from optax_spd.layers import checks, fingerprints
from optax_spd.layers.plans import LayerPlan
from optax_spd.layers.spec import LayerFn
from optax_spd.layers.types import Anchor, AxisName, DType, Mask, PyTree
from optax_spd.sharding import manual_axes


class LayerwiseState(NamedTuple):
    """State of a :func:`layerwise` stage without a state class of its own.

    Attributes:
      count: number of updates so far, int32; what schedules are evaluated at.
      anchor: θ₀, a tree like params, or ``optax.EmptyState()`` if none is held.
      layer_fingerprint: tells which layers the vectors are for; see
        :func:`optax_spd.check_state`.
      record: the last decision's record: by name a vector with one entry per layer.
      memory: the memory, likewise.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    anchor: PyTree
    layer_fingerprint: jax.Array
    record: dict[str, jax.Array]
    memory: dict[str, jax.Array]


def layerwise(
    name: str,
    *,
    measure: Callable[..., tuple[jax.Array, ...]],
    decide: Callable[..., Decision],
    act: Callable[..., jax.Array],
    sums: int,
    state: type | None = None,
    memory: Mapping[str, Any] | None = None,
    hyperparameters: Mapping[str, checks.ScalarOrSchedule] | None = None,
    level: Literal["layer", "row"] = "layer",
    gradient: bool = True,
    anchor: Anchor = "initial",
    anchor_dtype: DType = None,
    layers: LayerFn | None = None,
    mask: Mask = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Builds a stage of your own, with one decision per layer, from three pure functions.

    :func:`optax_spd.spd` is written with it. Like ``spd`` the stage works under ``jit`` with any
    sharding, in ``shard_map``, on stacked layers, under masks, in bfloat16, and resumed from a
    checkpoint.

    Args:
      name: the method's name, for error messages.
      measure: (deviation, gradient) -> ``sums`` arrays of the deviation's shape, elementwise. The
        deviation has the attributes ``delta`` (Δ = θ - θ₀), ``step`` (u) and ``tentative`` (Δ + u).
      decide: (\*sums, \*memory, \*\*hyperparameters) -> :class:`Decision`, elementwise. It is
        called with vectors of all layers for the record, and with the sums of one array or group
        for the update: with a maximum or mean over its arguments the two would differ. It must
        guard against 0/0. A layer whose sums are not finite keeps u; its record is that of sums of
        0.
      act: (deviation, \*coefficients) -> the new update, elementwise.
      sums: how many arrays ``measure`` returns.
      state: a NamedTuple class for the state, with the fields ``count``, ``anchor``,
        ``layer_fingerprint``, and one for each record and each memory. None for
        :class:`LayerwiseState`.
      memory: per-layer vectors carried from one update to the next: names and initial values, each
        a number. A float is held in the dtype of the sums, an int as int32. A layer's memory does
        not change in a step without an update for the layer, or if its sums or its new memory are
        not finite.
      hyperparameters: numbers or schedules of the count, by name; passed to ``decide``.
      level: "layer", or "row" for one decision per output unit. Then sums and coefficients are for
        the rows of one array, records are averaged over each layer's rows, and there is no memory.
      gradient: whether ``measure`` takes the raw gradient. If not, it is called with the deviation
        alone, and ``update`` needs no ``grad=``.
      anchor: θ₀, as for :func:`optax_spd.spd`.
      anchor_dtype: dtype to store the anchor in; None for its own.
      layers: what a layer is.
      mask: True where the method applies.
      axis_name: for hand-split parameters under ``shard_map`` or ``pmap``.

    Returns:
      A stage whose ``update`` needs ``params``, and ``grad=`` if it takes the gradient. Sums and
      vectors have the widest parameter dtype and at least float32; vectors have shape (layers,),
      in the order of :func:`optax_spd.layer_names`. Updates keep their structure and dtypes.

    Raises:
      TypeError: an argument of the wrong type, a complex parameter (in ``init``).
      ValueError: an unknown level or anchor, memory with level "row" (at construction); a state
        class whose fields do not fit (in ``init``); a wrong number of products, and what
        :func:`optax_spd.spd` raises (in ``update``).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_spd
      >>> def decide(square, *, radius):  # shrink the layer's deviation onto a ball
      ...     norm = jnp.sqrt(square)
      ...     factor = radius / jnp.maximum(norm, radius)
      ...     return optax_spd.Decision({"norm": norm}, (factor,), changes=norm > radius)
      >>> ball = optax_spd.layerwise(
      ...     "ball", sums=1, gradient=False, hyperparameters={"radius": 1.0}, decide=decide,
      ...     measure=lambda d: (d.tentative**2,),
      ...     act=lambda d, factor: factor * d.tentative - d.delta)
      >>> params = {"bias": jnp.zeros(2)}
      >>> tx = optax.chain(optax.sgd(1.0), ball)
      >>> updates, state = tx.update({"bias": jnp.array([-3.0, -4.0])}, tx.init(params), params)
      >>> updates["bias"], optax.tree.get(state, "norm")
      (Array([0.6, 0.8], dtype=float32), Array([5.], dtype=float32))

    .. seealso:: the page "Write your own method" of the documentation
    """
    options = stage.StageOptions(anchor, anchor_dtype, layers, mask, axis_name)
    initial, scheduled = dict(memory or {}), dict(hyperparameters or {})
    _check_arguments(level, initial, sums, axis_name)
    for key, number in scheduled.items():
        checks.check_scalar(key, number, low=-math.inf)

    # Jitted so that arrays of one shape share a trace, in eager updates too.
    measure = jax.jit(measure)
    change = jax.jit(functools.partial(_new_update, act))
    decide_block = jax.jit(functools.partial(decisions.of_block, decide))
    decide_rows = jax.jit(functools.partial(decisions.of_rows, decide), static_argnames="dtype")

    def values_at(count: jax.Array, plan: LayerPlan) -> dict[str, jax.Array]:
        return {key: checks.value_at(value, count, plan.dtype) for key, value in scheduled.items()}

    def init(params: PyTree) -> Any:
        plan, held = options.init(params)
        count, size = jnp.zeros((), jnp.int32), plan.vector_size
        remembered = {
            key: jnp.full(size, value, _memory_dtype(value, plan)) for key, value in initial.items()
        }
        vectors = [jnp.zeros(size, plan.dtype)] * sums
        decided = jax.eval_shape(decide, *vectors, *remembered.values(), **values_at(count, plan))
        _check_names(name, decided, initial)
        dtypes = {k: plan.dtype if level == "row" else v.dtype for k, v in decided.record.items()}
        record = {key: jnp.zeros(size, dtype) for key, dtype in dtypes.items()}
        return _new_state(state, count, held, fingerprints.of_plan(plan), record, remembered)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        vectors = _vectors(state)
        view = options.view(updates, state.anchor, params, extra_args, vectors)
        matched = []
        if gradient:
            matched.append(view.match(wrappers.require_gradient(extra_args, name), "grad"))
        products = view.map(measure, *matched)
        _check_products(name, products, sums)
        values = values_at(state.count, view.plan)
        if level == "row":
            decided = decisions.decide_all_rows(view, products, [*vectors], decide_rows, values)
        else:
            remembered = {key: vectors[key] for key in initial}
            decided = decisions.decide_layers(
                view, products, sums, remembered, decide, decide_block, values
            )
        second = recompute.second_pass(view, lambda i: decided.leaves[i][0])
        steps = [
            None if d is None else change(d, *decided.leaves[i])
            for i, d in enumerate(second.deviations)
        ]
        record = {  # in the types that init gave them
            key: jnp.broadcast_to(value, vectors[key].shape).astype(vectors[key].dtype)
            for key, value in decided.record.items()
        }
        new_state = _new_state(
            type(state),
            optax.safe_increment(state.count),
            state.anchor,
            state.layer_fingerprint,
            record,
            decided.memory,
        )
        return second.rebuild(steps), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _new_update(
    act: Callable[..., jax.Array],
    d: stage.Deviation,
    changes: jax.Array,
    coefficients: tuple[jax.Array, ...],
) -> jax.Array:
    """``act`` where the decision changes u; u elsewhere, by a select, which stops NaN."""
    new = act(d, *(c.astype(d.step.dtype) for c in coefficients))
    return jnp.where(sharded_like(changes, d.step), sharded_like(new, d.step), d.step)


def _memory_dtype(value: Any, plan: LayerPlan) -> Any:
    return jnp.int32 if jnp.issubdtype(jnp.result_type(value), jnp.integer) else plan.dtype


def _vectors(state: Any) -> dict[str, jax.Array]:
    """The per-layer vectors of a state, by name."""
    if isinstance(state, LayerwiseState):
        return {**state.record, **state.memory}
    common = ("count", "anchor", "layer_fingerprint")
    return {key: getattr(state, key) for key in state._fields if key not in common}


def _new_state(
    state_class: type | None,
    count: jax.Array,
    anchor: PyTree,
    fingerprint: jax.Array,
    record: Mapping[str, jax.Array],
    memory: Mapping[str, jax.Array],
) -> Any:
    if state_class is None or state_class is LayerwiseState:
        return LayerwiseState(count, anchor, fingerprint, dict(record), dict(memory))
    fields = {
        "count": count,
        "anchor": anchor,
        "layer_fingerprint": fingerprint,
        **record,
        **memory,
    }
    expected = getattr(state_class, "_fields", ())
    if set(expected) != set(fields):
        raise ValueError(
            f"state={state_class.__name__} has the fields {', '.join(expected)}; with the records "
            f"of decide and the memory it must be a NamedTuple with {', '.join(fields)}."
        )
    return state_class(**fields)


def _check_arguments(level: Any, memory: Mapping[str, Any], count: Any, axis_name: Any) -> None:
    if level not in ("layer", "row"):
        raise ValueError(f"level must be 'layer' or 'row', got {level!r}.")
    if level == "row":
        manual_axes.require_specs(axis_name, "level='row' sums along some of an array's axes only")
        if memory:
            raise ValueError(
                f"memory holds one value a layer, so it needs level='layer', got {[*memory]}."
            )
    checks.check_static("sums", count)
    checks.check_count("sums", count)
    for key, value in memory.items():
        checks.check_finite(f"memory[{key!r}]", value)


def _check_names(name: str, decision: Decision, memory: Mapping[str, Any]) -> None:
    """Raises if what ``decide`` returns by name is not what the state holds by name."""
    returned = set(decision.memory or {})
    if returned != set(memory):
        raise ValueError(
            f"decide of {name!r} returned the memory {sorted(returned)}, but memory= declares "
            f"{sorted(memory)}. Return each of these in Decision.memory."
        )
    taken = {*memory, "count", "anchor", "layer_fingerprint"} & set(decision.record)
    if taken:
        raise ValueError(
            f"decide of {name!r} records {sorted(taken)}, which the state already has a field for. "
            "Rename the record."
        )


def _check_products(name: str, products: Products, count: int) -> None:
    for terms in products:
        if terms is not None and (not isinstance(terms, tuple) or len(terms) != count):
            raise ValueError(
                f"measure of {name!r} must return a tuple of sums={count} arrays, got {terms!r}."
            )
