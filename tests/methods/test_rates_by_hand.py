"""TempBalance, layer-wise decay and freezing before the methods, worked out by hand."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import oracles
import pytest

import optax_spd

STEPS = 6
DEPTH = r"layer_(\d)"


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Few shapes, which compiles faster.
SHAPES = {
    "embedding/kernel": (4, 4),
    "head/kernel": (4, 4),
    "layer_0/bias": (4,),
    "layer_0/kernel": (4, 4),
    "layer_1/bias": (4,),
    "layer_1/kernel": (4, 4),
}
NAMES = tuple(SHAPES)
HEIGHTS = {"embedding": 3, "layer_0": 2, "layer_1": 1, "head": 0}


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        module, key = name.split("/")
        tree.setdefault(module, {})[key] = value
    return tree


def flat_arrays(tree: Any) -> dict[str, np.ndarray]:
    return dict(zip(NAMES, map(np.asarray, jax.tree.leaves(tree)), strict=True))


PARAMS = nested({name: normal(i, *shape) for i, (name, shape) in enumerate(SHAPES.items())})
# The gradients turn round half way, and momentum does so later: that is when SPD acts.
SIGNS = np.where(np.arange(STEPS) < STEPS // 2, 1, -1)
GRADS = nested(
    {
        name: (
            SIGNS.reshape(-1, *[1] * len(shape)) * normal(10 + i, *shape)
            + 0.3 * normal(20 + i, STEPS, *shape)
        ).astype(np.float32)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
)

# The optimizers -----------------------------------------------------------------------------------

RATE, DECAY = 0.1, 0.5
K, RADIUS_RATE, RADIUS = 0.5, 0.3, 0.1


def stages(inner: Any, last: Any) -> Any:
    """An optimizer, what sets its layers' rates, and the method that judges the step."""
    balance = optax_spd.temp_balance(every=2, min_eigenvalues=4)
    return optax_spd.chain(inner, balance, optax_spd.layerwise_lr_decay(DECAY, DEPTH), last)


def behind(last: Any) -> Any:
    """The embedding is frozen in Adam: the stages behind it see the whole tree."""
    return stages(optax_spd.with_frozen(optax.adam(RATE), "^embedding/"), last)


FORMS: dict[str, Callable[[], optax.GradientTransformationExtraArgs]] = {
    "spd": lambda: behind(optax_spd.spd(1.0)),
    "ftp": lambda: behind(optax_spd.ftp(K, norm="l2", radius_learning_rate=RADIUS_RATE)),
    "tpgm": lambda: behind(optax_spd.tpgm(norm="l2", radii=RADIUS)),
    # The embedding is frozen around all of it.
    "spd, frozen around": lambda: optax_spd.with_frozen(
        stages(optax.adam(RATE), optax_spd.spd(1.0)), "^embedding/"
    ),
}


# By hand, in NumPy --------------------------------------------------------------------------------


class Run(NamedTuple):
    """A training run.

    Attributes:
      params: at the end, by name.
      seen: the state's vectors of each step, by field, in the order of the layers.
    """

    params: dict[str, np.ndarray]
    seen: dict[str, np.ndarray]


FIELDS = ("temp_balance_scale", "layer_decay_scale", *oracles.FIELDS)


def vectors(state: Any) -> dict[str, Any]:
    """What the stages in a state did last."""
    found = {field: jax.tree.leaves(optax.tree.get(state, field)) for field in FIELDS}
    return {field: leaf for field, leaves in found.items() for leaf in leaves}


def balanced(weights: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The factor of each module with a kernel: PL_Alpha_Hill with xmin_pos = 2, assigned linearly.

    In float64 by singular values, and not with the library's functions.
    """
    alpha = {}
    for name, weight in weights.items():
        if weight.ndim == 2:
            e = np.sort(np.linalg.svd(weight, compute_uv=False) ** 2)
            tail = e[e.size // 2 :]
            alpha[name.split("/")[0]] = 1 + tail.size / np.sum(np.log(tail / tail[0]))
    least, most = min(alpha.values()), max(alpha.values())
    return {module: 0.5 + (a - least) / (most - least) for module, a in alpha.items()}


@functools.cache
def by_hand(form: str) -> Run:
    """The run that an optimizer comes to."""
    initial = {name: x.astype(np.float64) for name, x in flat_arrays(PARAMS).items()}
    theta, grads = dict(initial), flat_arrays(GRADS)
    names = [n for n in NAMES if "around" not in form or not n.startswith("embedding")]
    m, v = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    ftp = {name: oracles.FTP("l2") for name in names}
    seen = []
    for step in range(STEPS):
        if step % 2 == 0:
            balance = balanced({name: theta[name] for name in names})
        modules = [name.split("/")[0] for name in names]
        scale = [balance[module] for module in modules]
        decay = [DECAY ** HEIGHTS[module] for module in modules]
        judged = []
        for i, name in enumerate(names):
            g = grads[name][step].astype(np.float64)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g**2
            m_hat, v_hat = m[name] / (1 - 0.9 ** (step + 1)), v[name] / (1 - 0.999 ** (step + 1))
            u = -RATE * m_hat / (np.sqrt(v_hat) + 1e-8) * scale[i] * decay[i]
            if modules[i] == "embedding":
                u = np.zeros_like(u)
            delta = theta[name] - initial[name]
            if form == "ftp":
                rows = [[x.reshape(1, -1)] for x in (u, theta[name], initial[name], g)]
                u = ftp[name].step(*rows, K, RADIUS_RATE)[0].reshape(g.shape)
                judged.append(ftp[name].gamma)
            elif form == "tpgm":
                norm = np.linalg.norm(delta + u)
                u = min(1, RADIUS / max(norm, 1e-8)) * (delta + u) - delta
                judged.append(RADIUS)
            else:
                u, r = oracles.spd_step(u, theta[name], initial[name], g)
                judged.append(r)
            theta[name] = theta[name] + u
        field = {"ftp": "ftp_radii", "tpgm": "tpgm_radii"}.get(form, "spd_ratio")
        seen.append({"temp_balance_scale": scale, "layer_decay_scale": decay, field: judged})
    return Run(theta, {field: np.array([now[field] for now in seen]) for field in seen[0]})


def trained(tx: Any, grads: Any = GRADS) -> Run:
    """The run of a plain loop."""

    def step(carry: Any, grad: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), vectors(state)

    whole = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), grads))
    (params, _), seen = jax.device_get(whole(PARAMS))
    return Run(flat_arrays(params), seen)


def assert_same(found: Run, expected: Run, tol: float = 1e-4) -> None:
    for part, wanted in zip(found, expected, strict=True):
        assert part.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_allclose(part[name], value, rtol=tol, atol=tol, err_msg=name)


def test_the_run_by_hand_has_everything_in_it() -> None:
    """Else the tests below would compare little."""
    found = by_hand("spd, frozen around").seen
    balance, decay = found["temp_balance_scale"], found["layer_decay_scale"]
    assert np.ptp(balance, axis=1).min() == 1.0  # from s_min to s_max among the layers
    moved = np.abs(np.diff(balance, axis=0)).max(axis=1) > 0.003
    np.testing.assert_array_equal(moved, [False, True, False, True, False])  # every 2
    assert set(decay[0]) == {1.0, 0.5, 0.25}
    assert 0 < np.sum(found["spd_ratio"] > 1e-3) < found["spd_ratio"].size
    assert np.sum(np.abs(np.diff(by_hand("ftp").seen["ftp_radii"], axis=0)) > 1e-3) > STEPS
    # Some layers are held at their radius, some never get so far.
    params = by_hand("tpgm").params
    reach = [np.linalg.norm(x - flat_arrays(PARAMS)[name]) for name, x in params.items()]
    assert sum(np.isclose(r, RADIUS) for r in reach) >= 2
    assert sum(0 < r < 0.9 * RADIUS for r in reach) >= 1


@pytest.mark.parametrize("form", FORMS)
def test_methods_judge_the_step_that_rates_have_scaled(form: str) -> None:
    assert_same(trained(FORMS[form]()), by_hand(form), tol=1e-3)


def test_a_step_that_apply_if_finite_rejects_did_not_happen() -> None:
    bad, form = 3, "spd, frozen around"
    grads = jax.tree.map(lambda g: np.insert(g, bad, np.nan, axis=0), GRADS)
    found = trained(optax.apply_if_finite(FORMS[form](), 2), grads)
    kept = {field: np.delete(vector, bad, axis=0) for field, vector in found.seen.items()}
    assert_same(Run(found.params, kept), by_hand(form))
    for value in found.seen.values():
        np.testing.assert_array_equal(value[bad], value[bad - 1])
