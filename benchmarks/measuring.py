"""Measures several optimizers' training steps: step time, compile time and memory."""

import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_spd

Tree = Any

WARMUP_STEPS = 2

BASELINE = "adamw"
# The optimizers compared with it: each recipe, then the same chain written by hand.
RECIPES: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "adam_spd": optax_spd.adam_spd,
    "chain(adam, spd)": lambda rate: optax_spd.chain(optax.adam(rate), optax_spd.spd()),
    "adam_tpgm": optax_spd.adam_tpgm,
    "chain(adam, tpgm)": lambda rate: optax_spd.chain(optax.adam(rate), optax_spd.tpgm()),
    "adam_ftp": optax_spd.adam_ftp,
    "chain(adam, ftp)": lambda rate: optax_spd.chain(optax.adam(rate), optax_spd.ftp()),
    "adamw_l2_sp": optax_spd.adamw_l2_sp,
}

# JAX does not annotate this function.
wait_for: Callable[[Tree], Tree] = jax.block_until_ready


@dataclasses.dataclass
class Candidate:
    """An optimizer to measure, with its training state and the measurements so far.

    Every step donates parameters and state.

    Attributes:
      tx: the optimizer.
      function: its step: (params, state, *arguments) -> (params, state).
      params: its own copy of the parameters.
      state: its state.
      step: the compiled step.
      trace_seconds: per compilation, the time in Python (tracing and lowering).
      compile_seconds: per compilation, the time in XLA.
      trace_cpu_seconds: per compilation, the CPU time in Python.
      compile_cpu_seconds: per compilation, the CPU time in XLA, of all threads.
      step_seconds: per sample, the time of one step.
      fired: per sample, the shares of layers and of parameters where SPD fired.
    """

    tx: optax.GradientTransformation
    function: Callable[..., tuple[Tree, Tree]]
    params: Tree
    state: Tree
    step: Any = None
    trace_seconds: list[float] = dataclasses.field(default_factory=list)
    compile_seconds: list[float] = dataclasses.field(default_factory=list)
    trace_cpu_seconds: list[float] = dataclasses.field(default_factory=list)
    compile_cpu_seconds: list[float] = dataclasses.field(default_factory=list)
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    fired: list[tuple[float, float]] = dataclasses.field(default_factory=list)


def make_candidate(
    tx: optax.GradientTransformation,
    anchor: Tree,
    params: Tree,
    function: Callable[..., tuple[Tree, Tree]] | None = None,
) -> Candidate:
    """A candidate that was initialized at ``anchor`` and is now at ``params``.

    Its step is ``function``, by default the optimizer's update with given gradients.
    """
    state = tx.init(jax.tree.map(jnp.array, anchor))
    params = jax.tree.map(jnp.array, params)
    return Candidate(tx, function or update_only(tx), params, state)


def update_only(tx: optax.GradientTransformation) -> Callable[..., tuple[Tree, Tree]]:
    """A step that applies given gradients, without a model: TPGM projects and does not learn."""

    def step(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "update got no validation data")
            updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def whole_step(
    tx: optax.GradientTransformation,
    loss: Callable[[Tree, Tree], jax.Array],
    *,
    validates: bool = False,
) -> Callable[..., tuple[Tree, Tree]]:
    """A training step on a batch; only what ``validates`` (TPGM) uses the validation batches."""

    def step(params: Tree, state: Tree, batch: Tree, validation: Tree = None) -> tuple[Tree, Tree]:
        grads = jax.grad(loss)(params, batch)
        extra = {"validation_fn": loss, "validation_batches": validation} if validates else {}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def compile_step(candidate: Candidate, *arguments: Tree) -> None:
    """Compiles the candidate's step, without a cache, and records how long that took."""

    def step(params: Tree, state: Tree, *arguments: Tree) -> tuple[Tree, Tree]:
        return candidate.function(params, state, *arguments)

    start, start_cpu = time.perf_counter(), time.process_time()
    jitted = jax.jit(step, donate_argnums=(0, 1))
    lowered = jitted.lower(candidate.params, candidate.state, *arguments)
    traced, traced_cpu = time.perf_counter(), time.process_time()
    candidate.step = lowered.compile()
    candidate.trace_seconds.append(traced - start)
    candidate.compile_seconds.append(time.perf_counter() - traced)
    candidate.trace_cpu_seconds.append(traced_cpu - start_cpu)
    candidate.compile_cpu_seconds.append(time.process_time() - traced_cpu)


def take_steps(candidate: Candidate, steps: int, *arguments: Tree) -> float:
    """Takes steps; returns the seconds per step, from dispatch until the result is ready."""
    start = time.perf_counter()
    for _ in range(steps):
        candidate.params, candidate.state = candidate.step(
            candidate.params, candidate.state, *arguments
        )
    wait_for((candidate.params, candidate.state))
    return (time.perf_counter() - start) / steps


def fired_shares(candidate: Candidate) -> tuple[float, float] | None:
    """Shares of layers, and of their parameters, where SPD fired in the last step.

    None for an optimizer without SPD.
    """
    ratio = optax.tree_utils.tree_get(candidate.state, "spd_ratio")
    if ratio is None:
        return None
    fired = np.asarray(ratio) > 0
    sizes = [leaf.size for leaf in jax.tree.leaves(candidate.params)]
    return float(np.mean(fired)), float(np.average(fired, weights=sizes))


def measure(
    candidates: Sequence[Candidate],
    *arguments: Tree,
    samples: int,
    steps: int,
    compilations: int,
    warm_up: int = WARMUP_STEPS,
) -> None:
    """Compiles all candidates and times their steps alternately, with the same arguments."""
    for candidate in [*candidates] * compilations:
        compile_step(candidate, *arguments)
    for candidate in candidates:
        take_steps(candidate, warm_up, *arguments)
    for sample in range(samples):
        # In alternating order, so that no candidate always follows the same other one.
        for candidate in candidates if sample % 2 == 0 else reversed(candidates):
            candidate.step_seconds.append(take_steps(candidate, steps, *arguments))
            shares = fired_shares(candidate)
            if shares is not None:
                candidate.fired.append(shares)


def distinct_bytes(tree: Tree) -> int:
    """Bytes of the distinct buffers in a tree."""
    buffers = {leaf.unsafe_buffer_pointer(): leaf.nbytes for leaf in jax.tree.leaves(tree)}
    return sum(buffers.values())


def bytes_by_memory(tree: Tree) -> tuple[int, int]:
    """Bytes of the distinct buffers in a tree, as (in device memory, in host memory)."""
    kinds = {device.default_memory().kind for device in jax.devices()}
    on_host = [leaf for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind not in kinds]
    host_bytes = distinct_bytes(on_host)
    return distinct_bytes(tree) - host_bytes, host_bytes


def state_bytes(candidate: Candidate) -> tuple[int, int]:
    """Bytes of the state's distinct buffers, as (shaped like parameters, others)."""
    like_params = optax.tree_utils.tree_map_params(
        candidate.tx, lambda leaf: leaf, candidate.state, transform_non_params=lambda _: None
    )
    shaped = distinct_bytes(like_params)
    return shaped, distinct_bytes(candidate.state) - shaped


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"lower_quartile": low, "median": middle, "upper_quartile": high}


def ratio(times: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Spread of the ratios to another candidate's times.

    Both times of a pair are from the same round, so anything that slows down both cancels.
    """
    return spread([one / other for one, other in zip(times, base, strict=True)])


def summary(candidate: Candidate) -> dict[str, Any]:
    """All measurements of one candidate, as JSON values."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(candidate.params))
    like_params, other = state_bytes(candidate)
    memory = candidate.step.memory_analysis()
    layers, inside = zip(*candidate.fired, strict=True) if candidate.fired else ((), ())
    return {
        "step_seconds": spread(candidate.step_seconds),
        "trace_seconds": statistics.median(candidate.trace_seconds),
        "compile_seconds": statistics.median(candidate.compile_seconds),
        "trace_cpu_seconds": statistics.median(candidate.trace_cpu_seconds),
        "compile_cpu_seconds": statistics.median(candidate.compile_cpu_seconds),
        "state_bytes_per_parameter": like_params / parameters,
        "state_bytes_other": other,
        # Some backends have no memory analysis.
        "temporary_bytes": None if memory is None else memory.temp_size_in_bytes,
        "share_of_layers_fired": statistics.mean(layers) if layers else None,
        "share_of_parameters_in_them": statistics.mean(inside) if inside else None,
    }
