"""What the installed JAX and Flax can do, and what a program does."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P


def host_memory_works() -> bool:
    """Whether JAX leaves an array in host memory where it is: on CPU only since 0.10.2."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    on_host = jax.device_put(jnp.ones(2), NamedSharding(mesh, P(), memory_kind="pinned_host"))
    try:
        kept = jax.jit(lambda x: x)(on_host)
    except Exception:
        return False
    return bool(kept.sharding.memory_kind == "pinned_host")


def optimizer_sharding_works() -> bool:
    """Whether Flax knows a parameter's metadata ``optimizer_sharding``."""
    with jax.set_mesh(jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))):
        model = nnx.Dict(weight=nnx.Param(jnp.ones(2), optimizer_sharding=("x",)))
        optimizer = nnx.Optimizer(model, optax.trace(0.9), wrt=nnx.Param)
    trace = optax.tree.get(optimizer.opt_state, "trace")["weight"]
    return "out_sharding" in trace.get_metadata()


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, inner ones included."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, tuple | list) else (parameter,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def primitives(jaxpr: Any) -> Iterator[str]:
    """Names of all primitives of a jaxpr, inner ones included."""
    return (equation.primitive.name for equation in equations(jaxpr))
