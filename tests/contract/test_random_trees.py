"""SPD and FTP on random trees of arrays of several shapes and dtypes, alone and with neighbours."""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import optax_spd

# Few shapes and dtypes, so that eager operations are compiled once and examples stay cheap.
SHAPES = [(), (3,), (2, 3), (2, 0), (2, 2, 3)]
DTYPES = [jnp.float64, jnp.float32, jnp.bfloat16]

pytestmark = pytest.mark.usefixtures("x64")
EXAMPLES = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


class Leaf(NamedTuple):
    shape: tuple[int, ...]
    dtype: Any


LEAVES = st.one_of(st.builds(Leaf, st.sampled_from(SHAPES), st.sampled_from(DTYPES)), st.none())
KEYS = st.text("abc", min_size=1, max_size=2)
NODES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(KEYS, inner, min_size=1, max_size=4),
        st.lists(inner, min_size=1, max_size=3),
        st.tuples(inner, inner),
    ),
    max_leaves=8,
)
# Three or more branches, so that each version of hypothesis draws enough layers.
TREES = st.dictionaries(KEYS, NODES, min_size=3, max_size=4)


class Step(NamedTuple):
    """The trees of one update."""

    params: Any
    anchor: Any
    updates: Any
    grad: Any


def random_step(tree: Any, seed: int) -> Step:
    """Numbers for a tree of Leafs, such that SPD fires on about half of the layers."""
    # Hypothesis likes the same few seeds, which would give most trees the same first layers.
    rng = np.random.default_rng([seed, zlib.crc32(repr(tree).encode())])

    def draw(leaf: Leaf) -> Step:
        anchor, delta = rng.normal(size=leaf.shape), rng.normal(size=leaf.shape)
        outward = rng.choice([1.0, -1.0], p=[0.7, 0.3])
        updates = 0.1 * (outward * delta + 0.3 * rng.normal(size=leaf.shape))
        grad = rng.choice([1.0, -1.0], p=[0.7, 0.3]) * delta
        return Step(*(jnp.asarray(x, leaf.dtype) for x in (anchor + delta, anchor, updates, grad)))

    drawn = jax.tree.map(draw, tree, is_leaf=lambda x: isinstance(x, Leaf))
    is_step = lambda x: isinstance(x, Step)
    return Step(*(jax.tree.map(lambda s, i=i: s[i], drawn, is_leaf=is_step) for i in range(4)))


def by_name(tree: Any) -> dict[str, Any]:
    """The arrays of a tree, by the names that layers have."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


Result = tuple[Any, dict[str, float]]
"""A stage's new updates, and what it decided for each layer, by name."""


def named(step: Step, vector: Any) -> dict[str, float]:
    names = optax_spd.layer_names(step.params)
    return dict(zip(names, np.asarray(vector)[: len(names)], strict=True))


def spd(step: Step, weight_decay: float = 1.0) -> Result:
    tx = optax_spd.spd(weight_decay, anchor="argument")
    state = tx.init(step.params)
    updates, state = tx.update(step.updates, state, step.params, grad=step.grad, anchor=step.anchor)
    return updates, named(step, state.spd_ratio)


def ftp(step: Step) -> Result:
    tx = optax_spd.ftp(anchor="argument", radius_learning_rate=1.0)
    state, u = tx.init(step.params), step.updates
    for _ in range(2):
        updates, state = tx.update(u, state, step.params, grad=u, anchor=step.anchor)
    return updates, named(step, state.ftp_radii)


def check_renamed(step: Step, updates: Any, apply: Any, seed: int) -> None:
    """Neither names nor order nor containers matter."""
    leaves = [jax.tree.leaves(part) for part in step]
    order = np.random.default_rng(seed).permutation(len(leaves[0]))
    found, _ = apply(Step(*({f"z{i}": part[j] for i, j in enumerate(order)} for part in leaves)))
    for i, j in enumerate(order):
        np.testing.assert_array_equal(found[f"z{i}"], jax.tree.leaves(updates)[j])


def check_poisoned(step: Step, result: Result, apply: Any, seed: int) -> None:
    """Layers do not influence each other, whatever the numbers of one."""
    names = list(by_name(step.params))
    victim, poison = names[seed % len(names)], (np.nan, np.inf, 3.0)[seed % 3]

    def poisoned(part: Any) -> Any:
        leaves = [jnp.full_like(x, poison) if n == victim else x for n, x in by_name(part).items()]
        return jax.tree.unflatten(jax.tree.structure(part), leaves)

    updates, decided = apply(Step(*map(poisoned, step)))
    new, old = by_name(updates), by_name(result[0])
    for name in set(names) - {victim}:
        np.testing.assert_array_equal(new[name], old[name])
        assert decided.get(name) == result[1].get(name)


def check_size(step: Step, result: Result, apply: Any) -> None:
    """No layer grows where SPD fires; FTP leaves each output unit in its ball."""
    thetas, anchors, updates = map(by_name, (step.params, step.anchor, result[0]))
    for name, decided in result[1].items():
        # Δ is what the parameters' dtype makes of it, and u' is rounded to the dtype.
        delta = np.asarray(thetas[name] - anchors[name], float)
        u = np.asarray(updates[name], float)
        rounding = 2 * float(jnp.finfo(thetas[name].dtype).eps)
        allowed = 1e-6 + rounding * (np.abs(delta) + np.abs(u)).sum()
        if apply is ftp:
            sizes = np.abs(delta + u)
            rows = sizes.reshape(-1, sizes.shape[-1]).sum(axis=0) if u.ndim > 1 else sizes.sum()
            assert np.max(rows) <= decided + allowed
        elif decided > 0:
            assert np.linalg.norm(delta + u) <= np.linalg.norm(delta) + allowed


@pytest.mark.parametrize("apply", [spd, ftp])
def test_each_layer_is_judged_by_itself_whatever_the_tree(apply: Any) -> None:
    layers = acted = 0

    def check(tree: Any, seed: int) -> None:
        nonlocal layers, acted
        step = random_step(tree, seed)
        updates, decided = apply(step)
        types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        assert types(updates) == types(step.updates)
        layers += len(decided)
        acted += sum(value > 1e-7 for value in decided.values())
        if jax.tree.leaves(step.params):
            check_renamed(step, updates, apply, seed)
            check_poisoned(step, (updates, decided), apply, seed)
            check_size(step, (updates, decided), apply)
        if apply is spd:
            jax.tree.map(np.testing.assert_array_equal, spd(step, 0.0)[0], step.updates)

    EXAMPLES(given(TREES, st.integers(0, 2**16))(check))()
    # Else little was checked.
    assert layers >= 25
    assert acted >= 0.2 * layers
