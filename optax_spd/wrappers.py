"""Wrappers that pass the raw gradient, or one shared anchor, to the stages inside.

Optax passes extra information to stages as extra arguments. The raw gradient is named ``grad``, as
in its line searches. Most training loops pass no extra arguments, so a wrapper adds it.
"""

from typing import Any, Literal, NamedTuple

import optax

from optax_spd.anchors import policy
from optax_spd.layers.types import DType, PyTree
from optax_spd.sharding import placement


@policy.holds_anchor
class WithAnchorState(NamedTuple):
    """State of :func:`with_anchor`.

    Attributes:
      anchor: θ₀, a tree like params, shared by the stages inside.
      inner_state: state of the wrapped transformation.
    """

    anchor: PyTree
    inner_state: Any


def with_gradient(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Passes the gradient that ``update`` receives to every stage inside, as ``grad=``.

    Wrap the whole optimizer, so that the incoming updates *are* the gradient. With gradient
    clipping inside, the stages see the unclipped gradient. With gradient accumulation write
    ``optax.MultiSteps(with_gradient(...), k)``: the stages then see the accumulated gradient.

    Args:
      inner: a transformation, usually a chain.

    Returns:
      A transformation with a plain three-argument ``update``. A ``grad=`` that the caller passes
      takes precedence.

    Raises:
      TypeError: ``inner`` is not a transformation.
      ValueError: ``inner`` is an ``optax.MultiSteps``.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_spd
      >>> tx = optax_spd.with_gradient(
      ...     optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-4), optax_spd.spd(1.0)))
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": jnp.ones((2, 2))}, state, params)
    """
    _check_stage(inner, "with_gradient")
    inner = optax.with_extra_args_support(inner)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        if extra_args.get("grad") is None:
            extra_args["grad"] = updates
        new_updates, new_state = inner.update(updates, state, params, **extra_args)
        return new_updates, new_state

    def init(params: PyTree) -> Any:
        return placement.shard_like_params(inner.init(params), params)

    return optax.GradientTransformationExtraArgs(init, update)


def chain(*stages: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``optax.chain`` that passes on the raw gradient: ``with_gradient(optax.chain(*stages))``.

    Args:
      *stages: transformations of this library and of Optax, in order.

    Returns:
      A transformation whose ``update`` needs no ``grad=``.

    Raises:
      TypeError: a stage is not a transformation.
      ValueError: no stage is given, or one is an ``optax.MultiSteps``.

    Example:
      >>> import optax
      >>> import optax_spd
      >>> tx = optax_spd.chain(optax.adam(1e-4), optax_spd.spd(1.0))
    """
    if not stages:
        raise ValueError("chain needs at least one stage, got none.")
    for stage in stages:
        _check_stage(stage, "chain")
    return with_gradient(optax.chain(*stages))


def with_anchor(
    inner: optax.GradientTransformation,
    anchor: Literal["initial"] | PyTree = "initial",
    anchor_dtype: DType = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps one anchor for all stages inside that have ``anchor="argument"``.

    Args:
      inner: a transformation, usually a chain.
      anchor: "initial" (a copy of the params given to ``init``), or a tree like params (copied in
        ``init``; in a jitted ``init`` it becomes a constant of the program, so use "initial" there
        and :func:`optax_spd.set_anchor` afterwards).
      anchor_dtype: dtype to store the anchor in; None for its own. bfloat16 stores a bfloat16
        checkpoint without loss.

    Returns:
      A transformation that passes ``anchor=`` on to ``inner``. An ``anchor=`` that the caller
      passes takes precedence. Stages inside with an anchor of their own are not affected.

    Raises:
      TypeError, ValueError: at construction for an unknown policy or dtype; in ``init`` for a tree
        that does not match params; in ``update`` for a dropped anchor.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_spd
      >>> tx = optax_spd.with_gradient(optax_spd.with_anchor(optax.chain(
      ...     optax_spd.l2_sp(0.01, anchor="argument"),
      ...     optax.adam(1e-3),
      ...     optax_spd.spd(1.0, anchor="argument"),
      ... )))
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": jnp.ones((2, 2))}, state, params)
    """
    policy.check_anchor(anchor, anchor_dtype, policies=("initial",))
    inner = optax.with_extra_args_support(as_transformation("with_anchor", inner))

    def init(params: PyTree) -> WithAnchorState:
        held = policy.init_anchor(anchor, params, anchor_dtype=anchor_dtype)
        if not isinstance(anchor, str):
            held = placement.shard_like_params(held, params)
        return WithAnchorState(held, inner.init(params))

    def update(
        updates: PyTree, state: WithAnchorState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, WithAnchorState]:
        if extra_args.get("anchor") is None:
            extra_args["anchor"] = state.anchor
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        return updates, WithAnchorState(state.anchor, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _multi_steps(stage: Any) -> optax.MultiSteps | None:
    """The ``optax.MultiSteps`` of a stage that is one, or its ``gradient_transformation``."""
    owner = getattr(getattr(stage, "update", None), "__self__", None)
    return next((x for x in (stage, owner) if isinstance(x, optax.MultiSteps)), None)


def _check_stage(stage: Any, where: str) -> None:
    if _multi_steps(stage):
        raise ValueError(
            f"{where} around optax.MultiSteps would pass on the micro-step's gradient, if any. "
            "Put it inside: optax.MultiSteps(optax_spd.chain(...), k). Stages that need no "
            "gradient, such as tpgm, may stand behind it in optax.chain."
        )
    if not (hasattr(stage, "init") and hasattr(stage, "update")):
        raise TypeError(
            f"{where} takes gradient transformations, got {stage!r}. A stage must be called "
            "(spd(1.0), not spd), and a list of stages unpacked (chain(*stages))."
        )


def require_gradient(extra_args: dict[str, Any], stage: str) -> PyTree:
    """The raw gradient among an update's extra arguments.

    Raises:
      ValueError: there is none; the message shows three fixes. There is no fallback to the update:
        with it SPD would almost never act.
    """
    grad = extra_args.get("grad")
    if grad is None:
        raise ValueError(
            f"{stage} needs the raw gradient and update got none. Either pass it "
            "(tx.update(grads, state, params, grad=grads)), or build the optimizer with "
            "optax_spd.chain(...) in place of optax.chain(...), or wrap it in "
            "optax_spd.with_gradient(...)."
        )
    return grad


def as_transformation(name: str, inner: Any) -> optax.GradientTransformation:
    """The transformation that a wrapper was given; of ``optax.MultiSteps`` one that passes on.

    ``MultiSteps.gradient_transformation`` passes no extra arguments on. This one passes all but
    ``grad``: that is the micro-step's, and the stages inside need the accumulated one.

    Raises:
      TypeError: it is none; names the wrapper.
    """
    if accumulator := _multi_steps(inner):

        def update(
            updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
        ) -> tuple[PyTree, Any]:
            extra_args.pop("grad", None)
            updates, state = accumulator.update(updates, state, params, **extra_args)
            return updates, state

        return optax.GradientTransformationExtraArgs(accumulator.init, update)
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(
            f"{name} takes a gradient transformation, got {inner!r}. A factory must be called: "
            "optax.adam(1e-3), not optax.adam."
        )
    result: optax.GradientTransformation = inner
    return result
