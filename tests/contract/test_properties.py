"""Properties of the methods over random parameter trees. Each counts how often they acted."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import optax_spd
from optax_spd import trees

# Few shapes and dtypes, so that eager operations are compiled once and examples stay cheap.
SHAPES = [(), (1,), (3,), (2, 3), (0,), (2, 0), (2, 2, 3)]
DTYPES = [jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16]

pytestmark = pytest.mark.usefixtures("x64")
EXAMPLES = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
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
TREES = st.dictionaries(KEYS, NODES, min_size=1, max_size=3)


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
        anchor = rng.normal(size=leaf.shape)
        delta = rng.normal(size=leaf.shape)
        outward = rng.choice([1.0, -1.0], p=[0.7, 0.3])
        updates = 0.1 * (outward * delta + 0.3 * rng.normal(size=leaf.shape))
        grad = rng.choice([1.0, -1.0], p=[0.7, 0.3]) * delta
        return Step(*(jnp.asarray(x, leaf.dtype) for x in (anchor + delta, anchor, updates, grad)))

    drawn = jax.tree.map(draw, tree, is_leaf=lambda x: isinstance(x, Leaf))
    is_step = lambda x: isinstance(x, Step)
    return Step(*(jax.tree.map(lambda s, i=i: s[i], drawn, is_leaf=is_step) for i in range(4)))


def apply(
    step: Step, weight_decay: float = 1.0, anchor: Any = "argument"
) -> tuple[Any, np.ndarray]:
    """The stage's new updates, and the ratios of its layers."""
    tx = optax_spd.spd(weight_decay, anchor=anchor)
    extra = {"anchor": step.anchor} if anchor == "argument" else {}
    updates, state = tx.update(
        step.updates, tx.init(step.params), step.params, grad=step.grad, **extra
    )
    names = optax_spd.layer_names(step.params)
    return updates, np.asarray(state.spd_ratio)[: len(names)]


class Tally:
    """How many layers were seen and how many fired, over all examples of a test."""

    def __init__(self) -> None:
        self.layers = 0
        self.fired = 0

    def add(self, ratios: np.ndarray) -> None:
        self.layers += ratios.size
        self.fired += int((ratios > 0).sum())

    def check(self) -> None:
        assert self.layers >= 40
        assert self.fired >= 0.2 * self.layers, f"fired on {self.fired} of {self.layers} layers"


@pytest.fixture
def tally() -> Any:
    count = Tally()
    yield count
    count.check()


def for_random_trees(check: Callable[[Any, int], None]) -> None:
    """Runs a check on random trees of Leafs and seeds."""
    EXAMPLES(given(TREES, st.integers(0, 2**16))(check))()


def test_structure_and_dtypes_are_those_of_the_updates(tally: Tally) -> None:
    def check(tree: Any, seed: int) -> None:
        step = random_step(tree, seed)
        updates, ratios = apply(step)
        tally.add(ratios)
        assert jax.tree.structure(updates) == jax.tree.structure(step.updates)
        for new, old in zip(jax.tree.leaves(updates), jax.tree.leaves(step.updates), strict=True):
            assert (new.shape, new.dtype) == (old.shape, old.dtype)

    for_random_trees(check)


def test_zero_decay_is_the_identity(tally: Tally) -> None:
    def check(tree: Any, seed: int) -> None:
        step = random_step(tree, seed)
        updates, ratios = apply(step, weight_decay=0.0)
        tally.add(ratios)
        for new, old in zip(jax.tree.leaves(updates), jax.tree.leaves(step.updates), strict=True):
            np.testing.assert_array_equal(new, old)

    for_random_trees(check)


def test_no_layer_grows_on_a_step_where_spd_fires(tally: Tally) -> None:
    def check(tree: Any, seed: int) -> None:
        step = random_step(tree, seed)
        # With the zero anchor Δ is θ itself.
        step = step._replace(params=jax.tree.map(jnp.subtract, step.params, step.anchor))
        updates, ratios = apply(step, anchor="zero")
        tally.add(ratios)
        flat, new = trees.flatten(step.params), trees.flatten(updates)
        ratio_of = dict(zip(optax_spd.layer_names(step.params), ratios, strict=True))
        for path, theta, u in zip(flat.paths, flat.leaves, new.leaves, strict=True):
            if ratio_of.get(trees.path_name(path), 0) <= 0:
                continue
            dtype = u.dtype
            theta, u = np.asarray(theta, np.float64), np.asarray(u, np.float64)
            # u' is rounded to the update's dtype; the rest is exact here.
            rounding = float(jnp.finfo(dtype).eps)
            allowed = np.linalg.norm(theta) * (1 + 1e-6) + rounding * np.linalg.norm(u)
            assert np.linalg.norm(theta + u) <= allowed

    for_random_trees(check)


def test_renaming_and_permuting_leaves_changes_nothing(tally: Tally) -> None:
    def check(tree: Any, seed: int) -> None:
        step = random_step(tree, seed)
        updates, ratios = apply(step)
        tally.add(ratios)
        leaves = [jax.tree.leaves(part) for part in step]
        order = np.random.default_rng(seed).permutation(len(leaves[0]))
        renamed = Step(*({f"z{i}": part[j] for i, j in enumerate(order)} for part in leaves))
        new_updates, _ = apply(renamed)
        for i, j in enumerate(order):
            np.testing.assert_array_equal(new_updates[f"z{i}"], jax.tree.leaves(updates)[j])

    for_random_trees(check)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 3.0])
def test_layers_do_not_influence_each_other(tally: Tally, poison: float) -> None:
    def check(tree: Any, seed: int) -> None:
        step = random_step(tree, seed)
        updates, ratios = apply(step)
        tally.add(ratios)
        count = len(jax.tree.leaves(step.params))
        if count == 0:
            return
        victim = seed % count
        poisoned = Step(
            *(
                jax.tree.unflatten(
                    jax.tree.structure(part),
                    [
                        jnp.full_like(x, poison) if i == victim else x
                        for i, x in enumerate(jax.tree.leaves(part))
                    ],
                )
                for part in step
            )
        )
        new_updates, new_ratios = apply(poisoned)
        paths = [trees.path_name(path) for path in trees.flatten(step.params).paths]
        present = [
            p
            for p, x in zip(paths, trees.flatten(step.params).leaves, strict=True)
            if x is not None
        ]
        names = optax_spd.layer_names(step.params)
        for name, new_ratio, old_ratio in zip(names, new_ratios, ratios, strict=True):
            assert name == present[victim] or new_ratio == old_ratio
        pairs = zip(jax.tree.leaves(new_updates), jax.tree.leaves(updates), strict=True)
        for i, (new, old) in enumerate(pairs):
            if i != victim:
                np.testing.assert_array_equal(new, old)

    for_random_trees(check)


def test_ftp_leaves_each_layer_in_its_ball_whatever_the_tree(tally: Tally) -> None:
    """After any two steps, in the params' own dtypes, and each layer as if it were alone."""

    def check(tree: Any, seed: int) -> None:
        step = random_step(tree, seed)
        tx = optax_spd.ftp(anchor="argument", radius_learning_rate=1.0)
        state, updates = tx.init(step.params), step.updates
        for _ in range(2):
            updates, state = tx.update(
                step.updates, state, step.params, grad=step.updates, anchor=step.anchor
            )
        assert jax.tree.structure(updates) == jax.tree.structure(step.updates)
        names = optax_spd.layer_names(step.params)
        radii = np.asarray(state.ftp_radii)[: len(names)]
        tally.add(radii)
        radius_of = dict(zip(names, radii, strict=True))
        flat, new = trees.flatten(step.params), trees.flatten(updates)
        anchors = trees.flatten(step.anchor).leaves
        for path, theta, u, theta_0 in zip(
            flat.paths, flat.leaves, new.leaves, anchors, strict=True
        ):
            if trees.path_name(path) not in radius_of:
                continue
            assert (u.shape, u.dtype) == (theta.shape, theta.dtype)
            delta, u = (np.asarray(x, np.float64) for x in (theta - theta_0, u))
            sizes = np.abs(delta + u)
            rows = sizes.reshape(-1, sizes.shape[-1]).sum(axis=0) if u.ndim > 1 else sizes.sum()
            # Δ and u' are rounded to the dtype; Δ is what bfloat16 and float16 make of θ - θ₀.
            rounding = float(jnp.finfo(theta.dtype).eps)
            allowed = rounding * (np.abs(delta) + np.abs(u)).sum() + 1e-6
            assert np.max(rows) <= radius_of[trees.path_name(path)] + allowed

    settings(EXAMPLES, max_examples=24)(given(TREES, st.integers(0, 2**16))(check))()
