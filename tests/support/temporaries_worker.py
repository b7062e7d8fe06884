"""The process of test_in_turn.py that has one CPU: what compiled steps take for temporaries.

Run as ``python temporaries_worker.py``, without XLA's flags: it compiles as users do. Writes JSON:
for every case and either form how many of its arrays would take as much memory. The test imports
this module too, for what it compares with.
"""

import json
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax

import optax_spd
from optax_spd import in_turn, portions
from optax_spd.core import one_cpu

RECIPES = [optax_spd.adam_spd, optax_spd.adam_tpgm, optax_spd.adam_ftp, optax_spd.sgd_ftp]
# So large that each is by itself under way; and so small that a few are taken as one stack.
LARGE = 8 * [math.isqrt(in_turn.UNDER_WAY)]
SMALL = 48 * [math.isqrt(portions.SMALL_ARRAY)]
CASES: dict[str, tuple[Callable[..., Any], list[int]]] = {
    **{recipe.__name__: (recipe, LARGE) for recipe in RECIPES},
    "stacks": (optax_spd.adam_spd, SMALL),
}


def traced_step(make: Callable[..., Any], sides: list[int]) -> Any:
    """A training step of square arrays."""
    tx = make(0.1)
    shapes = [jax.ShapeDtypeStruct((side, side), jnp.float32) for side in sides]

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    return jitted.trace(shapes, jax.eval_shape(tx.init, shapes), shapes)


def temporaries(make: Callable[..., Any], sides: list[int]) -> float:
    """What the compiled step takes besides its arguments and results, in arrays."""
    found = traced_step(make, sides).lower().compile().memory_analysis()
    return float(found.temp_size_in_bytes / (4 * sides[0] ** 2))


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    assert one_cpu.cpu_devices() == 1
    found = {name: {"in turn": temporaries(*case)} for name, case in CASES.items()}
    with mock.patch.object(one_cpu, "cpu_devices", return_value=8):
        for name, case in CASES.items():
            found[name]["chain"] = temporaries(*case)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
