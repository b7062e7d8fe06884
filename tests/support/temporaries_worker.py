"""A process of test_recipes.py with few CPU devices: what compiled steps take for temporaries.

Run as ``python temporaries_worker.py DEVICES``, without XLA's flags: it compiles as users do. It
writes JSON: the bytes a parameter of each recipe, and of the chain that it stands for. On one
device it also makes sure that several sums are taken in one pass.
"""

import json
import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_spd
from optax_spd.core import one_pass

PAIRS: dict[str, tuple[Any, Any]] = {
    "adam_spd": (optax_spd.adam_spd(0.1), optax_spd.chain(optax.adam(0.1), optax_spd.spd())),
    "adam_tpgm": (optax_spd.adam_tpgm(0.1), optax_spd.chain(optax.adam(0.1), optax_spd.tpgm())),
    "adam_ftp": (optax_spd.adam_ftp(0.1), optax_spd.chain(optax.adam(0.1), optax_spd.ftp())),
}
ARRAYS, SIDE = 8, 256


def compiled_step(tx: Any, split: bool) -> Any:
    """A training step of square arrays, which donates parameters and state."""
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("x")) if split else None
    shapes = [jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32, sharding=sharding)] * ARRAYS

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init).lower(shapes).compile()
    held = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        jax.eval_shape(tx.init, shapes),
        state.output_shardings,
    )
    return jax.jit(step, donate_argnums=(0, 1)).lower(shapes, held, shapes)


def temporaries(tx: Any, split: bool) -> float:
    """Bytes a parameter that the compiled step takes besides its arguments and results."""
    found = compiled_step(tx, split).compile().memory_analysis()
    parts = jax.device_count() if split else 1
    return float(found.temp_size_in_bytes * parts / (ARRAYS * SIDE**2))


def check_one_pass() -> None:
    """Jitted, with three sums in one pass, a step is what it is without jit."""
    one_pass.SMALLEST_ARRAY = 1
    tx = optax_spd.adam_spd(0.1, anchor="zero")
    jitted = jax.jit(tx.update)
    draw = np.random.default_rng(0)
    params = {"a": jnp.asarray(draw.normal(size=(8, 12)), jnp.float32), "b": jnp.ones(4)}
    assert ":3 = stablehlo.reduce(" in jitted.lower(params, tx.init(params), params).as_text()
    grads = [
        jax.tree.map(lambda x: np.float32(draw.normal(size=x.shape)), params) for _ in range(4)
    ]
    results = []
    for update in (jitted, tx.update):
        state = tx.init(params)
        for grad in grads:
            updates, state = update(grad, state, params)
        results.append((updates, state))
    assert optax.tree.get(state, "spd_fired").sum() > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)


def main(devices: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    assert jax.device_count() == devices
    warnings.filterwarnings("ignore", "update got no validation data")
    if devices == 1:
        check_one_pass()
    found = {
        f"{name}{' split' * split}": [temporaries(tx, split) for tx in pair]
        for name, pair in PAIRS.items()
        for split in ([False, True] if devices > 1 else [False])
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
