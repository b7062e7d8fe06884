"""Steps layer after layer: the numbers, states and errors of the chain, in less memory.

These tests run with eight virtual devices, where the library takes the chain; that there is a
single one they pretend. test_one_cpu.py starts a process where it is so; here one is started for
the memory that steps take, which the tests' XLA flags would change.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import temporaries_worker as worker
from flax import nnx
from flax.core import freeze
from jax.sharding import SingleDeviceSharding
from jax_support import host_memory_works, primitives

import optax_spd
from optax_spd import in_turn, one_cpu, plans, portions, trees

RATE = 0.1


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """Pretends that there is one CPU device, for what is traced inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_cpu, "cpu_devices", lambda: 1)
        yield


class Sizes(NamedTuple):
    """The modules' constants, made small so that small trees meet all that large ones do."""

    small_array: int
    largest_stack: int
    under_way: int


@contextlib.contextmanager
def sizes_set(sizes: Sizes | None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if sizes:
            patch.setattr(portions, "SMALL_ARRAY", sizes.small_array)
            patch.setattr(portions, "LARGEST_STACK", sizes.largest_stack)
            patch.setattr(in_turn, "UNDER_WAY", sizes.under_way)
        yield


def is_in_turn(jaxpr: Any) -> bool:
    """Whether a traced update holds more than the chain."""
    return "platform_index" in set(primitives(jaxpr))


FORMS: dict[str, Callable[[], Any]] = {"in turn": one_device, "chain": contextlib.nullcontext}


# The same as the chain ---------------------------------------------------------------------------


SHAPES: dict[str, Any] = {
    "blocks": {"bias": (3, 4), "kernel": (3, 4, 5)},
    "dense_0": {"bias": (5,), "kernel": (4, 5)},
    "dense_1": {"bias": (5,), "kernel": (4, 5)},
    "dense_2": {"bias": (5,), "kernel": (4, 5)},
    "norm": {"scale": ()},
    "table": (9, 7),
}
IS_SHAPE = lambda node: isinstance(node, tuple)
LEAVES = trees.flatten(SHAPES, IS_SHAPE)


def numbers(seed: int, dtypes: Any = jnp.float32, scale: float = 1.0) -> Any:
    """Numbers for the model, in one dtype or in several in turn; and what else a tree may hold."""
    draw = np.random.default_rng(seed)
    dtypes = dtypes if isinstance(dtypes, list) else [dtypes]
    drawn = [
        jnp.asarray(scale * draw.normal(size=shape), dtypes[i % len(dtypes)])
        for i, shape in enumerate(LEAVES.leaves)
    ]
    tree: dict[str, Any] = LEAVES.unflatten(drawn)
    return tree | {"empty": jnp.ones((0, 2)), "none": None, "node": optax.MaskedNode()}


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimizer with all that its update takes."""

    make: Callable[..., Any] = optax_spd.adam_spd
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    sizes: Sizes | None = None
    dtypes: Any = jnp.float32
    grad_dtypes: Any = None
    wrapper: Callable[..., Any] | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


STACKED = optax_spd.stacked("^blocks/")
STATIC = ("anchor", "anchor_dtype", "layers", "mask", "axis_name", "mu_dtype")
ONE_BY_ONE = Sizes(0, 0, 0)
CASES = {
    "one stack of each kind": Case(),
    "two in a stack, a few under way": Case(options={"anchor": "zero"}, sizes=Sizes(20, 40, 300)),
    "one by one": Case(
        options={"anchor": numbers(1, scale=0.5), "weight_decay": 1.7, "layers": STACKED},
        sizes=ONE_BY_ONE,
    ),
    "groups and stacked layers, judged by another gradient": Case(
        options={"anchor_dtype": jnp.bfloat16, "layers": optax_spd.by_module(layers=STACKED)},
        sizes=Sizes(9, 99, 0),
        extra={"grad": numbers(3)},
    ),
    "masked, on schedules": Case(
        options={
            "learning_rate": optax.linear_schedule(0.2, 0.05, 5),
            "weight_decay": optax.linear_schedule(2.0, 0.5, 5),
            "mask": lambda params: {k: k not in ("dense_1", "empty") for k in params},
            "eps_root": 1e-4,
        },
        sizes=Sizes(20, 99, 0),
    ),
    "an anchor as argument, several dtypes": Case(
        options={"anchor": "argument", "mu_dtype": jnp.float32},
        sizes=Sizes(20, 40, 0),
        dtypes=[jnp.float32, jnp.bfloat16, jnp.bfloat16, jnp.float16],
        extra={"anchor": numbers(2, scale=0.5)},
    ),
    "halves with gradients in float32": Case(
        options={"layers": optax_spd.by_module()}, dtypes=jnp.bfloat16, grad_dtypes=jnp.float32
    ),
    "TPGM": Case(optax_spd.adam_tpgm, {"learning_rate": optax.linear_schedule(0.2, 0.05, 5)}),
    "TPGM of modules, one by one": Case(
        optax_spd.adam_tpgm,
        {"norm": "l2", "anchor": "zero", "layers": optax_spd.by_module(layers=STACKED)},
        sizes=ONE_BY_ONE,
    ),
    "FTP, rows first": Case(
        optax_spd.adam_ftp,
        # Of arrays of one shape two have their rows on one axis and the third on the other.
        {"layers": optax_spd.outputs("^dense_[01]", 0, layers=STACKED), "weight_decay": 0.1},
        sizes=Sizes(20, 40, 300),
    ),
    "FTP, masked, several dtypes": Case(
        optax_spd.adam_ftp,
        {
            "k": optax.linear_schedule(1.0, 0.2, 5),
            "state_dtype": jnp.bfloat16,
            "mask": lambda params: {k: k not in ("dense_1", "empty") for k in params},
        },
        sizes=Sizes(20, 99, 0),
        dtypes=[jnp.float32, jnp.bfloat16, jnp.bfloat16],
        extra={"grad": numbers(3)},
    ),
    "SGD with FTP": Case(
        optax_spd.sgd_ftp,
        {"momentum": 0.9, "weight_decay": optax.constant_schedule(0.1), "norm": "l2"},
    ),
    "SGD with FTP, without momentum": Case(
        optax_spd.sgd_ftp, {"mask": lambda params: {k: k != "dense_1" for k in params}}
    ),
    "injected": Case(
        options={"weight_decay": optax.linear_schedule(2.0, 0.5, 5)},
        wrapper=lambda **options: optax.inject_hyperparams(optax_spd.adam_spd, static_args=STATIC)(
            **options
        ),
    ),
    "MultiSteps": Case(
        wrapper=lambda **options: optax.MultiSteps(optax_spd.adam_spd(**options), 2)
    ),
}


def optimizer(case: Case) -> Any:
    return (case.wrapper or case.make)(**({"learning_rate": RATE} | case.options))


@functools.cache
def step_of(name: str, form: str) -> Any:
    """The jitted update of a case, traced as on one CPU or as the chain."""
    case = CASES[name]
    tx = optimizer(case)

    @jax.jit
    def update(grads: Any, state: Any, params: Any) -> Any:
        with FORMS[form](), sizes_set(case.sizes):
            return tx.update(grads, state, params, **case.extra)

    return update


def gradients(name: str, steps: int = 5) -> list[Any]:
    case = CASES[name]
    return [numbers(10 + i, case.grad_dtypes or case.dtypes) for i in range(steps)]


def trained(name: str) -> Iterator[tuple[Any, Any, Any, Any, Any]]:
    """Each step's gradient, state, parameters, and what comes of them: updates and state."""
    params = numbers(0, CASES[name].dtypes)
    state = optimizer(CASES[name]).init(params)
    for grads in gradients(name):
        updates, new_state = step_of(name, "in turn")(grads, state, params)
        yield grads, state, params, updates, new_state
        params, state = optax.apply_updates(params, updates), new_state


def ratios(state: Any) -> np.ndarray:
    return np.asarray(optax.tree.get(state, "spd_ratio"))


def radii(state: Any) -> np.ndarray | None:
    """Of a state of FTP or TPGM."""
    found = [optax.tree.get(state, name) for name in ("ftp_radii", "tpgm_radii")]
    return next((np.asarray(x) for x in found if x is not None), None)


def assert_close(found: Any, expected: Any) -> None:
    """The same structure and types, weak ones included, and nearly the same numbers."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, expected)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        rtol = 0.0
        if jnp.issubdtype(a.dtype, jnp.floating):
            rtol = max(1e-5, float(jnp.finfo(a.dtype).eps))
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6, err_msg=jax.tree_util.keystr(path))


def assert_equal(found: Any, expected: Any) -> None:
    """To the bit."""
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_the_chains(name: str) -> None:
    steps = {form: step_of(name, form) for form in FORMS}
    fired = []
    for grads, state, params, *found in trained(name):
        expected = steps["chain"](grads, state, params)
        assert_close(tuple(found), expected)
        if radii(state) is None:
            fired.append(ratios(found[1]) > 0)
    if radii(state) is not None:
        assert len(np.unique(radii(state))) > 3  # each layer's its own, as far as they differ
    else:
        assert 0.1 < np.mean(fired) < 0.9
        if CASES[name].options.keys().isdisjoint({"anchor", "anchor_dtype"}):
            assert not np.any(fired[0])  # all layers stand at the anchor
    for form, step in steps.items():
        assert is_in_turn(step.trace(grads, state, params).jaxpr) == (form == "in turn")
    # The types of the state are kept as the chain keeps them: nothing more is compiled.
    assert steps["in turn"]._cache_size() == steps["chain"]._cache_size()


def test_two_runs_are_equal_to_the_bit() -> None:
    name = "two in a stack, a few under way"
    assert_equal(*(list(trained(name)) for _ in range(2)))


@pytest.mark.parametrize("poison", [np.nan, -np.inf])
def test_what_is_not_finite_stays_in_its_layer_also_in_a_stack(poison: float) -> None:
    name = "two in a stack, a few under way"
    update, adam = step_of(name, "in turn"), jax.jit(optax.adam(RATE).update)
    grads, state, params, updates, (healthy, _) = list(trained(name))[3]
    before = ratios(update(grads, state, params)[1])
    for number, victim in enumerate(LEAVES.paths):
        flat = trees.flatten(grads)
        leaf = flat.by_path[victim]
        sick = trees.replace_leaves(grads, {victim: leaf.at[(0,) * leaf.ndim].set(poison)})
        sick_updates, (sick_adam, sick_spd) = update(sick, state, params)
        expected = np.where(np.arange(len(LEAVES.paths)) == number, 0, before)
        np.testing.assert_array_equal(sick_spd.spd_ratio, expected)
        # The sick layer gets what Adam gives, and the others what they got before.
        of_adam = adam(sick, state[0])
        for found, well, alone in [
            (sick_updates, updates, of_adam[0]),
            (sick_adam[0].mu, healthy[0].mu, of_adam[1][0].mu),
            (sick_adam[0].nu, healthy[0].nu, of_adam[1][0].nu),
        ]:
            of_victim = (trees.flatten(tree).by_path[victim] for tree in (found, alone))
            np.testing.assert_allclose(*of_victim, rtol=1e-5, err_msg=str(victim))
            hidden = {victim: jnp.zeros(())}
            assert_equal(*(trees.replace_leaves(tree, hidden) for tree in (found, well)))
    assert np.count_nonzero(before) >= 3


@pytest.mark.parametrize("name", ["TPGM", "FTP, rows first"])
def test_what_is_not_finite_stays_in_its_layer_of_balls(name: str) -> None:
    step = step_of(name, "in turn")
    grads, state, params, *well = list(trained(name))[3]
    plan = plans.plan_layers(trees.flatten(params), CASES[name].options.get("layers"))
    for victim, entry in zip(LEAVES.paths, [x for x in plan.arrays if x is not None], strict=True):
        leaf = trees.flatten(grads).by_path[victim]
        sick = trees.replace_leaves(grads, {victim: jnp.full_like(leaf, np.nan)})
        found = step(sick, state, params)
        hidden = {victim: jnp.zeros(())}
        for a, b in zip(like_params(found), like_params(well), strict=True):
            assert np.any(np.isnan(trees.flatten(a).by_path[victim]))
            assert_equal(*(trees.replace_leaves(tree, hidden) for tree in (a, b)))
        others = np.delete(np.arange(len(plan.names)), list(entry.numbers))
        for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(well[1]), strict=True):
            if a.shape == (len(plan.names),):
                np.testing.assert_array_equal(a[others], b[others])


def like_params(result: Any) -> list[Any]:
    """Updates and Adam's moments, which a gradient that is not finite spoils."""
    updates, (adam, *_) = result
    moments = adam if isinstance(adam, optax.ScaleByAdamState) else adam[0]
    return [updates, moments.mu, moments.nu]


# Where it is called ------------------------------------------------------------------------------


def small(seed: int) -> dict[str, Any]:
    """Two arrays of a shape, and one by itself."""
    draw = np.random.default_rng(seed)
    shapes = {"a": {"kernel": (3, 4)}, "b": {"kernel": (3, 4)}, "scale": (5,)}
    return jax.tree.map(
        lambda shape: jnp.asarray(draw.normal(size=shape), jnp.float32), shapes, is_leaf=IS_SHAPE
    )


def run(tx: Any, params: Any, state: Any, grads: Any) -> Any:
    """Parameters and state at the end of a scan, and the ratios of all steps."""

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), optax.tree.get(state, "spd_ratio")

    return jax.lax.scan(step, (params, state), grads)


def test_in_a_scan_and_over_a_batch_of_models() -> None:
    tx = optax_spd.adam_spd(RATE)
    params = jax.tree.map(lambda *x: jnp.stack(x), small(0), small(1))
    draw = np.random.default_rng(2)
    # Axes: models, steps.
    grads = jax.tree.map(lambda x: draw.normal(size=(2, 6, *x.shape[1:])).astype("f"), params)

    def train(params: Any, grads: Any) -> Any:
        return run(tx, params, tx.init(params), grads)

    results = {}
    for form, within in FORMS.items():
        jitted = jax.jit(lambda *args: jax.vmap(train)(*args))
        with within():
            assert is_in_turn(jitted.trace(params, grads).jaxpr) == (form == "in turn")
            results[form] = jitted(params, grads)
    assert 0 < np.count_nonzero(results["chain"][1]) < results["chain"][1].size
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results.values()
    )


def test_donated_buffers_and_an_anchor_in_host_memory() -> None:
    tx, sizes = optax_spd.adam_spd(RATE), Sizes(12, 12, 0)
    kind = "pinned_host" if host_memory_works() else jax.devices()[0].default_memory().kind
    there = SingleDeviceSharding(jax.devices()[0], memory_kind=kind)
    state = optax_spd.set_anchor(tx.init(small(0)), jax.device_put(small(1), there))
    expected_state, params, expected_params = jax.tree.map(jnp.copy, (state, small(0), small(0)))
    traces = 0

    def step(params: Any, state: Any, grads: Any) -> Any:
        nonlocal traces
        traces += 1
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    donating = jax.jit(lambda *args: step(*args), donate_argnums=(0, 1))
    reference = jax.jit(lambda *args: step(*args))
    for seed in range(4):
        grads = small(10 + seed)
        given = jax.tree.leaves((params, state[0], state[1].anchor))  # no step reads the ratios
        with one_device(), sizes_set(sizes):
            params, state = donating(params, state, grads)
        assert all(x.is_deleted() for x in given)
        expected_params, expected_state = reference(expected_params, expected_state, grads)
        anchors = jax.tree.leaves(optax.tree.get(state, "anchor"))
        assert {x.sharding.memory_kind for x in anchors} == {kind}
    assert traces == 2
    assert_close((params, state), (expected_params, expected_state))
    assert_equal(optax.tree.get(state, "anchor"), small(1))


BOXES: dict[str, Callable[[Any], Any]] = {
    "FrozenDict": freeze,
    "nnx.State": lambda tree: nnx.State(jax.tree.map(nnx.Param, tree)),
    "Partitioned": lambda tree: jax.tree.map(
        lambda x: nn.Partitioned(x, names=(None,) * x.ndim), tree
    ),
}


@functools.cache
def boxed_step(box: str) -> tuple[Any, Any]:
    """Updates and state of a second step, on which SPD fires in all layers but one of a stack."""
    boxed = BOXES.get(box, lambda tree: tree)
    tx = optax_spd.adam_spd(RATE, anchor="zero")
    uphill = small(0)
    outward = jax.tree.map(jnp.negative, uphill) | {"b": uphill["b"]}
    params, first, second = map(boxed, (uphill, outward, jax.tree.map(lambda x: 0.1 * x, uphill)))

    def two_steps(first: Any, second: Any, params: Any) -> Any:
        _, state = tx.update(first, tx.init(params), params)
        return tx.update(second, state, params)

    with one_device():
        return jax.jit(two_steps)(first, second, params)


@pytest.mark.parametrize("box", BOXES)
def test_numbers_do_not_depend_on_containers_and_boxes(box: str) -> None:
    updates, state = boxed_step(box)
    expected, expected_state = boxed_step("dict")
    np.testing.assert_array_equal(expected_state[1].spd_ratio > 0, [True, False, True])
    assert jax.tree.structure(updates) == jax.tree.structure(BOXES[box](expected))
    for field in ("mu", "nu"):
        assert jax.tree.structure(getattr(state[0][0], field)) == jax.tree.structure(updates)
    pairs = zip(
        jax.tree.leaves((updates, state)), jax.tree.leaves((expected, expected_state)), strict=True
    )
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)


TYPES: dict[str, Any] = {
    "weak scalars": {"a": jnp.asarray(1.0), "b": jnp.asarray(2.0), "c": jnp.ones(2)},
    "integers": {"a": jnp.ones(2), "ids": jnp.arange(3), "flags": np.zeros(2, bool)},
    "gaps": {"a": jnp.ones(2), "b": {"c": None, "d": optax.MaskedNode()}, "e": jnp.ones(3)},
    "an array": jnp.ones((2, 3)),
    "a list": [jnp.ones(2), (jnp.ones(2, jnp.bfloat16), jnp.ones((0, 2)))],
    "several dtypes": {f"p{i}": np.ones(2, d) for i, d in enumerate("efefd")},
}


@pytest.mark.parametrize("name", TYPES)
def test_types_are_the_chains_from_init_on(name: str, x64: None) -> None:
    params = TYPES[name]
    tx = optax_spd.adam_spd(RATE, mask=jax.tree.map(lambda x: jnp.ndim(x) < 3, params))
    seen: dict[str, list[Any]] = {form: [] for form in FORMS}
    for form, within in FORMS.items():
        state = jax.eval_shape(tx.init, params)
        for _ in range(2):
            with within():
                result = jax.eval_shape(lambda *args: tx.update(*args), params, state, params)
            state = result[1]
            seen[form].append(jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), result))
    assert seen["in turn"] == seen["chain"]


def gap_for(path: str, gap: Any) -> Any:
    return small(0) | {path: gap}


@dataclasses.dataclass(frozen=True)
class Rare:
    """A call that is left to the chain."""

    params: Any
    changed: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    axes: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    make: Callable[..., Any] = optax_spd.adam_spd


RARE = {
    # Whether Adam takes these is up to Optax's version.
    "a missing update": Rare(small(0), {"updates": gap_for("scale", None)}),
    "a masked update": Rare(small(0), {"updates": gap_for("a", optax.MaskedNode())}),
    "a gap in another gradient": Rare(
        small(0),
        {"grad": gap_for("a", None)},
        {"mask": {"a": False, "b": True, "scale": True}},
    ),
    "an update without a parameter": Rare(
        small(0) | {"none": None},
        {"updates": small(0) | {"none": jnp.ones(2)}},
        make=optax_spd.sgd_ftp,  # Adam refuses it
    ),
    "no layers": Rare({"ids": jnp.arange(3), "none": None}),
    "mapped axes": Rare(small(0), options={"axis_name": "x"}, axes=[("x", 1)]),
}


@pytest.mark.parametrize("name", RARE)
def test_what_is_rare_is_the_chains(name: str) -> None:
    rare = RARE[name]
    tx = rare.make(RATE, **rare.options)
    given = {"updates": rare.params, "state": tx.init(rare.params), "params": rare.params}

    def outcome() -> str:
        traced = jax.make_jaxpr(lambda given: tx.update(**given), axis_env=rare.axes)
        try:
            return str(traced(given | rare.changed))
        except (TypeError, ValueError) as error:  # an older Optax refuses more
            return str(error)

    expected = outcome()
    with one_device():
        assert outcome() == expected


def test_with_validation_batches_the_chain_is_taken() -> None:
    tx, params = optax_spd.adam_tpgm(RATE), small(0)
    state = tx.init(params)

    def validation_fn(params: Any, batch: jax.Array) -> jax.Array:
        return jnp.sum(params["scale"] * batch) ** 2

    validation = {"validation_fn": validation_fn, "validation_batches": jnp.ones((2, 5))}
    for given, expected in ((validation, False), ({}, True), (dict.fromkeys(validation), True)):
        with one_device():
            update = jax.jit(lambda grads, given=given: tx.update(grads, state, params, **given))
            assert is_in_turn(update.trace(params).jaxpr) == expected


def test_the_chain_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = 0

    def rate(count: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return 0.1 / (1 + count)

    tx, params = optax_spd.adam_spd(rate), small(0)
    state = tx.init(params)
    of_chain = []
    for form in ("chain", "in turn", "in turn"):
        traces = 0
        with FORMS[form](), sizes_set(Sizes(12, 12, 0)):
            jax.jit(lambda grads: tx.update(grads, state, params)).trace(params)
        of_chain.append(traces)
    # In turn: three portions, two of them of a kind.
    assert of_chain == [1, 3, 3]


def test_a_schedule_is_asked_anew_in_every_trace() -> None:
    rate, params = {"now": jnp.asarray(0.1)}, small(0)
    tx = optax_spd.adam_spd(lambda count: rate["now"])
    state = tx.init(params)

    @jax.jit
    def update(now: jax.Array, grads: Any) -> Any:
        rate["now"] = now
        return tx.update(grads, state, params)[0]

    with one_device():
        once = update(0.1, params)
        update.clear_cache()  # a tracer kept from the first trace would be an error in the second
        twice = update(0.2, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(2 * a, b, rtol=1e-5), once, twice)


@pytest.mark.parametrize(
    "make", [optax_spd.adam_spd, optax_spd.adam_ftp, optax_spd.sgd_ftp, optax_spd.adam_tpgm]
)
def test_states_of_other_types_become_the_chains(make: Callable[..., Any], x64: None) -> None:
    params, tx = jax.tree.map(lambda x: x.astype(jnp.float64), small(0)), make(RATE)
    state = jax.eval_shape(tx.init, small(0))
    results = []
    for within in FORMS.values():
        with within():
            update = jax.jit(lambda *args: tx.update(*args))
            results.append(jax.eval_shape(update, params, state, params))
    assert jax.tree.map(lambda x: x.dtype, results[0]) == jax.tree.map(
        lambda x: x.dtype, results[1]
    )


@pytest.mark.parametrize("radius", [-5.0, -np.inf, np.nan])
def test_a_radius_from_a_spoilt_state_stays_in_its_layer(radius: float) -> None:
    tx, params = optax_spd.adam_tpgm(RATE), small(0)
    state = tx.init(params)
    spoilt = optax.tree.set(state, tpgm_radii=jnp.full(3, 0.1).at[0].set(radius))
    grads = small(1) | {"a": {"kernel": jnp.full((3, 4), np.nan)}}  # so that it is not mended
    spoilt = (spoilt[0], spoilt[1]._replace(tpgm_started=jnp.ones(3, bool)))
    results = []
    for within in FORMS.values():
        with within(), sizes_set(ONE_BY_ONE):
            results.append(jax.jit(lambda *args: tx.update(*args))(grads, spoilt, params))
    assert not np.any(np.isnan(results[0][0]["b"]["kernel"]))
    assert_close(*(result[0]["b"] for result in results))
    assert_close(*(result[0]["scale"] for result in results))


def test_numbers_and_numpy_arrays_wait_as_well() -> None:
    tx = optax_spd.adam_spd(RATE, anchor="zero")
    params = {"a": np.ones((2, 3)), "b": 1.5, "c": np.full(4, 2.0)}
    state = tx.init(jax.tree.map(jnp.asarray, params))
    results = []
    for within in FORMS.values():
        with within(), sizes_set(ONE_BY_ONE):
            results.append(jax.jit(lambda count: tx.update(params, state, params)[0])(1))
    jax.tree.map(np.testing.assert_allclose, *results)


def test_outside_of_jit_the_chain_is_taken() -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError(f"there are no portions of {args}")

    tx, params = optax_spd.adam_spd(RATE), jnp.ones(2)
    state = tx.init(params)
    with one_device(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(portions, "portions", refuse)
        tx.update(params, state, params)
        with pytest.raises(AssertionError, match="no portions"):
            jax.eval_shape(lambda grads: tx.update(grads, state, params), params)


# Errors ------------------------------------------------------------------------------------------


def dropped(state: Any) -> Any:
    return optax_spd.drop_anchor(state)


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A call that is refused: options, a change of the arguments, and what the error says."""

    match: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    state: Callable[[Any], Any] = lambda state: state
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: type[Exception] = ValueError


WRONG = {
    "a state of Adam's alone": Wrong("called init first", state=lambda state: state[0]),
    "a dropped anchor": Wrong("anchor was dropped; call set_anchor", state=dropped),
    "no params": Wrong("you are not passing `params`", arguments={"params": None}),
    "a gradient of another shape": Wrong(
        r"grad does not match params at 'scale': grad has shape \(2,\)",
        arguments={"grad": small(0) | {"scale": jnp.ones(2)}},
    ),
    "a gradient without a leaf": Wrong(
        "grad does not match params: it has no leaf at 'scale'",
        arguments={"grad": {k: v for k, v in small(0).items() if k != "scale"}},
    ),
    "a gap in the gradient": Wrong(
        "grad is None at 'scale'", arguments={"grad": gap_for("scale", None)}
    ),
    "no anchor": Wrong("update got no anchor", {"anchor": "argument"}),
    "an anchor of another shape": Wrong(
        "anchor does not match params at 'scale'",
        {"anchor": "argument"},
        arguments={"anchor": small(0) | {"scale": jnp.ones(2)}},
    ),
    "a state of other layers": Wrong(
        r"spd_ratio has shape \(9,\), but the parameters have 3 layers",
        state=lambda state: (state[0], state[1]._replace(spd_ratio=jnp.zeros(9))),
    ),
    "a complex gradient": Wrong(
        "grad is complex at 'a/kernel'",
        arguments={"grad": jax.tree.map(lambda x: x + 1j, small(0))},
        error=TypeError,
    ),
    "complex updates": Wrong(
        "updates is complex at 'a/kernel'",
        arguments={"updates": jax.tree.map(lambda x: x + 1j, small(0))},
        error=TypeError,
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_the_chains(name: str) -> None:
    wrong = WRONG[name]
    tx = optax_spd.adam_spd(RATE, **wrong.options)
    state = wrong.state(tx.init(small(0)))
    given = {"updates": small(1), "state": state, "params": small(0)} | wrong.arguments
    messages = []
    for within in FORMS.values():
        with within(), pytest.raises(wrong.error, match=wrong.match) as caught:
            jax.eval_shape(lambda given: tx.update(**given), given)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


# What is compiled --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def temporaries() -> dict[str, dict[str, float]]:
    """What temporaries_worker.py finds, by case and form: memory for so many arrays."""
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-W", "error", worker.__file__],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found: dict[str, dict[str, float]] = json.loads(ended.stdout)
    return found


@pytest.mark.parametrize(
    ("recipe", "arrays"),
    [
        ("adam_spd", 1.5),
        # A ball's row sums are kernels of their own, which take what they sum from memory.
        ("adam_tpgm", 6),
        ("adam_ftp", 6),
        ("sgd_ftp", 6),
    ],
)
def test_temporaries_are_a_few_arrays_and_not_a_tree(
    recipe: str, arrays: float, temporaries: dict[str, dict[str, float]]
) -> None:
    # XLA keeps the order: where it does not, steps of several arrays are there at once.
    assert temporaries[recipe]["in turn"] < arrays < temporaries[recipe]["chain"]


def test_stacks_wait_for_each_other(temporaries: dict[str, dict[str, float]]) -> None:
    # Stacks of four arrays, of which two are under way: six arrays go in and three come out.
    assert temporaries["stacks"]["in turn"] < 2 * 4 * (6 + 3) < temporaries["stacks"]["chain"]


@functools.cache
def traced_step(form: str) -> Any:
    with FORMS[form]():
        return worker.traced_step(optax_spd.adam_spd, worker.LARGE)


@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm"])
def test_for_other_platforms_it_is_the_chain(platform: str) -> None:
    def text(form: str, platform: str) -> str:
        lowered: str = traced_step(form).lower(lowering_platforms=(platform,)).as_text()
        return lowered

    def operations(text: str) -> dict[str, int]:
        names = re.findall(r"stablehlo\.(\w+)", text)
        # It still asks what it runs on, with a single answer.
        return {x: names.count(x) for x in set(names) - {"case", "return", "constant"}}

    of_three = re.compile(r":3 = stablehlo\.reduce\(")
    assert of_three.search(text("in turn", "cpu"))
    found = text("in turn", platform)
    assert not of_three.search(found)
    assert operations(found) == operations(text("chain", platform))


def test_what_makes_an_array_wait_changes_no_number() -> None:
    limits = [np.finfo(np.float16).max, -np.finfo(np.float16).tiny, 6e-5, 1 / 3]
    values = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, *limits], np.float32)
    arrays = {dtype: jnp.asarray(values, dtype) for dtype in ("float32", "bfloat16", "float16")}
    after = jax.jit(lambda ratio, arrays: jax.tree.map(lambda x: in_turn._after(ratio, x), arrays))
    for ratio in (0.0, 0.3, 1.0):
        for dtype, found in after(jnp.float32(ratio), arrays).items():
            bits = np.dtype(f"u{found.dtype.itemsize}")
            np.testing.assert_array_equal(
                np.asarray(found).view(bits), np.asarray(arrays[dtype]).view(bits), err_msg=dtype
            )
