"""Methods judge the step that TempBalance, layer-wise decay and freezing have scaled."""

import functools
from typing import Any

import jax
import numpy as np
import optax
import oracles
import pytest

import optax_spd

STEPS, RATE = 6, 0.1
# Few shapes, which compiles faster.
SHAPES = {
    "embedding": {"kernel": (4, 4)},
    "head": {"kernel": (4, 4)},
    "layer_0": {"bias": (4,), "kernel": (4, 4)},
    "layer_1": {"bias": (4,), "kernel": (4, 4)},
}
HEIGHTS = {"embedding": 3, "layer_0": 2, "layer_1": 1, "head": 0}


normal = functools.partial(oracles.normal_tree, SHAPES)


PARAMS = normal(0)
# The gradients turn round half way, and momentum does so later: that is when SPD acts.
SIGNS = np.where(np.arange(STEPS) < STEPS // 2, 1, -1).astype(np.float32)
GRADS = jax.tree.map(
    lambda drift, noise: SIGNS.reshape(-1, *[1] * drift.ndim) * drift + np.float32(0.3) * noise,
    normal(1),
    normal(2, STEPS),
)


def stages(inner: Any) -> Any:
    """An optimizer, what sets its layers' rates, and the method that judges the step."""
    balance = optax_spd.temp_balance(every=2, min_eigenvalues=4)
    decay = optax_spd.layerwise_lr_decay(0.5, r"layer_(\d)")
    return optax_spd.chain(inner, balance, decay, optax_spd.spd(1.0))


FROZEN_ADAM = optax_spd.with_frozen(optax.adam(RATE), "^embedding/")
# In the first the stages behind it see the whole tree; in the second none of them sees it.
FORMS: dict[str, Any] = {
    "frozen in Adam": stages(FROZEN_ADAM),
    "frozen around all": optax_spd.with_frozen(stages(optax.adam(RATE)), "^embedding/"),
}


def by_name(tree: Any) -> dict[str, Any]:
    leaves = map(np.asarray, jax.tree.leaves(tree))
    return dict(zip(optax_spd.layer_names(PARAMS), leaves, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_methods_judge_the_step_that_rates_have_scaled(form: str) -> None:
    """Step by step, with the numbers that TempBalance says it multiplies by."""
    tx, adam = FORMS[form], FROZEN_ADAM
    step, adam_step = jax.jit(tx.update), jax.jit(adam.update)
    params, state, adam_state, fired, seen = PARAMS, tx.init(PARAMS), adam.init(PARAMS), 0, []
    anchor = by_name(PARAMS)
    names = [n for n in anchor if "around" not in form or not n.startswith("embedding")]
    for count in range(STEPS):
        grads = jax.tree.map(lambda g, t=count: g[t], GRADS)
        steps, adam_state = adam_step(grads, adam_state, params)
        updates, state = step(grads, state, params)
        scale, ratios = (optax.tree.get(state, f) for f in ("temp_balance_scale", "spd_ratio"))
        u, g, theta, found = map(by_name, (steps, grads, params, updates))
        for name, factor, ratio in zip(names, scale, ratios, strict=True):
            rate = factor * 0.5 ** HEIGHTS[name.split("/")[0]]
            expected, r = oracles.spd_step(rate * u[name], theta[name], anchor[name], g[name])
            np.testing.assert_allclose(found[name], expected, rtol=1e-3, atol=1e-6, err_msg=name)
            np.testing.assert_allclose(ratio, r, rtol=1e-3, atol=1e-5, err_msg=name)
            fired += r > 1e-3
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(params["embedding"]["kernel"], anchor["embedding/kernel"])
        seen.append(np.asarray(scale))
    # Else this would compare little.
    assert 0 < fired < STEPS * len(names)
    moved = np.abs(np.diff(seen, axis=0)).max(axis=1) > 0.003
    np.testing.assert_array_equal(moved, [False, True, False, True, False])  # every 2
