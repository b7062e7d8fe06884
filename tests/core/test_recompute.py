"""Deviations, and the inner step of a recipe, recomputed for the second pass."""

import collections
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_support import host_memory_works, primitives
from tpgm_steps import projects_only

import optax_spd
from optax_spd.core import recompute, stage
from optax_spd.layers import spec

pytestmark = projects_only

PARAMS = {
    "a": jnp.arange(6.0).reshape(2, 3),
    "ids": jnp.arange(2),
    "none": None,
    "stack": jnp.arange(12.0).reshape(3, 4),
}
STACKED = spec.stacked("stack")
PRETRAINED = jax.tree.map(lambda x: x / 3, PARAMS)


def both(pretrained: Any, changing: Any, **options: Any) -> Any:
    """The deviations of the first pass and of the second."""
    options = {"anchor": "argument", "layers": STACKED} | options
    view = stage.StageOptions(**options).view(
        PARAMS, optax.EmptyState(), PARAMS, {"anchor": pretrained}
    )
    changes = functools.partial(view.entries, changing)
    return view.deviations, recompute.second_pass(view, changes).deviations


def program_for(platform: str, function: Any, *arguments: Any) -> str:
    traced = jax.jit(function).trace(*arguments)
    return str(traced.lower(lowering_platforms=(platform,)).as_text())


@pytest.mark.parametrize("mode", ["eager", "jit", "zero"])
def test_deviations_are_the_same_numbers_read_again(mode: str) -> None:
    policy = "zero" if mode == "zero" else "argument"

    def run(pretrained: Any) -> Any:
        return both(pretrained, jnp.zeros(4, bool), anchor=policy)

    first, second = (run if mode == "eager" else jax.jit(run))(PRETRAINED)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    # XLA must not know that the anchor is the same; from zero nothing is read.
    text = program_for("cuda", run, PRETRAINED)
    assert text.count("optimization_barrier") == (0 if mode == "zero" else 2)


@pytest.mark.parametrize("stage", [optax_spd.tpgm, optax_spd.ftp])
def test_the_inner_step_is_computed_for_either_pass(stage: Any) -> None:
    inner = [optax.clip_by_global_norm(1.0), optax.adam(0.1)]
    # An array that the stage leaves alone gets the inner step all the same.
    mask = {"a": True, "stack": True, "head": False, "none": None}
    reference = optax_spd.chain(*inner, stage(mask=mask))
    tx = recompute.chain(inner, stage(mask=mask))
    params = {name: PARAMS[name] for name in ("a", "stack", "none")} | {"head": jnp.ones(3)}

    def trained(tx: Any, update: Any) -> Any:
        draw = np.random.default_rng(0)
        moved, state = params, tx.init(params)
        for _ in range(4):
            grads = jax.tree.map(lambda x: x - draw.normal(size=x.shape).astype(x.dtype), moved)
            updates, state = update(grads, state, moved)
            moved = optax.apply_updates(moved, updates)
        return moved, state

    expected = trained(reference, jax.jit(reference.update))
    found = trained(tx, jax.jit(tx.update))
    chex.assert_trees_all_close(found, expected, rtol=1e-5)
    assert not np.allclose(found[0]["head"], params["head"])
    chex.assert_trees_all_close(trained(tx, tx.update), expected, rtol=1e-5)

    arguments = params, expected[1], params
    found_primitives, plain = (
        collections.Counter(primitives(jax.make_jaxpr(t.update)(*arguments).jaxpr))
        for t in (tx, reference)
    )
    assert (found_primitives - plain)["sqrt"] >= 3  # Adam's, of each array
    # The reference has one for each anchor. On accelerators each gradient has one more.
    for platform, count in (("tpu", 3), ("cuda", 3), ("cpu", 0)):
        more, fewer = (
            program_for(platform, t.update, *arguments).count("optimization_barrier")
            for t in (tx, reference)
        )
        assert (more - fewer, fewer) == (count, 2), platform


if host_memory_works():

    def on_host(tree: Any) -> Any:
        kind = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
        return jax.device_put(tree, kind)

    @pytest.mark.parametrize("changing", [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]])
    def test_anchors_in_host_memory_are_fetched_again_for_what_changes(
        changing: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(recompute, "MIN_SIZE_TO_REFETCH", 1)
        first, second = jax.jit(both)(on_host(PRETRAINED), np.array(changing, bool))
        # An array is fetched whole if one of its layers changes.
        assert second[1:3] == [None, None]
        for needed, a, b in [
            (changing[0], first[0], second[0]),
            (any(changing[1:]), first[3], second[3]),
        ]:
            np.testing.assert_array_equal(b.step, a.step)
            np.testing.assert_array_equal(b.delta, a.delta if needed else np.zeros_like(a.delta))

    @pytest.mark.parametrize("name", ["adam_spd", "adam_tpgm", "ftp"])
    def test_batches_and_derivatives_are_those_of_an_anchor_on_the_device(
        name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(recompute, "MIN_SIZE_TO_REFETCH", 1)
        tx: Any = {
            "adam_spd": optax_spd.adam_spd(0.1, anchor="argument"),
            "adam_tpgm": optax_spd.adam_tpgm(0.1, anchor="argument"),
            "ftp": optax_spd.chain(optax.sgd(0.1), optax_spd.ftp(anchor="argument")),
        }[name]

        def trained(grad: Any, params: Any, anchor: Any) -> Any:
            state = tx.init(params)
            for _ in range(2):
                updates, state = tx.update(grad, state, params, anchor=anchor)
                params = optax.apply_updates(params, updates)
            return params

        def loss(*arguments: Any) -> Any:
            return jnp.sum(trained(*arguments) ** 2)

        one = jnp.arange(1.0, 7.0).reshape(2, 3)
        two = jnp.stack([one, -one])
        for function, grad, params, anchor in [
            (jax.vmap(trained, (0, None, None)), two, one, one / 2),
            (jax.vmap(trained, (None, 0, 0)), one, two, two / 2),
            (jax.grad(loss, (0, 1, 2)), one, one, one / 2),
            (jax.vmap(jax.grad(loss), (0, None, None)), two, one, one / 2),
            (jax.grad(jax.checkpoint(loss)), one, one, one / 2),
        ]:
            expected = jax.jit(function)(grad, params, anchor)
            found = jax.jit(function)(grad, params, on_host(anchor))
            chex.assert_tree_all_finite(expected)
            chex.assert_trees_all_close(
                jax.device_get(found), jax.device_get(expected), rtol=1e-5, atol=1e-6
            )

    @pytest.mark.parametrize(("least", "again"), [(1, 2), (7, 1), (13, 0)])
    def test_small_arrays_are_fetched_once(
        least: int, again: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(recompute, "MIN_SIZE_TO_REFETCH", least)
        run = lambda *arguments: both(*arguments)  # no trace of another test's is reused
        jaxpr = jax.jit(run).trace(on_host(PRETRAINED), np.ones(4, bool)).jaxpr
        found = list(primitives(jaxpr))
        assert found.count("cond") == again
        assert found.count("device_put") == 2 + again
