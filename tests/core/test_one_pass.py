"""Sums for one CPU and SPD's form made of them: against float64 NumPy and the reference form.

These tests run with eight virtual devices, where the library takes the reference form; that there
is a single one most of them pretend, and one starts a process where it is so.
"""

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax_support import primitives

import optax_spd
from optax_spd.core import one_cpu


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """Pretends that there is one CPU device, for what is traced inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_cpu, "cpu_devices", lambda: 1)
        yield


def normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Sums --------------------------------------------------------------------------------------------

# Shape and stacked axes. Pieces of one dimension, of several, none at all, and the largest.
SUMS: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((), ()),
    ((1,), ()),
    ((5,), ()),
    ((8,), ()),
    ((13,), ()),
    ((64,), ()),
    ((127,), ()),
    ((130,), ()),
    ((4096,), ()),
    ((7,), (0,)),
    ((3, 5), ()),
    ((9, 11), ()),
    ((16, 24), ()),
    ((128, 67), ()),
    ((1, 1, 1), ()),
    ((4, 30), (0,)),
    ((30, 4), (1,)),
    ((3, 40), (0, 1)),
    ((2, 3, 32), (0,)),
    ((2, 3, 32), (1,)),
    ((2, 3, 32), (2,)),
    ((2, 3, 32), (0, 1)),
    ((2, 3, 32), (0, 2)),
    ((32, 3, 2), (1,)),
    ((3, 2, 4, 5), (1, 2)),
    ((5, 2, 4, 6), (0, 2)),
]


def sum_id(case: Any) -> str:
    return "x".join(map(str, case[0])) + "-" + ",".join(map(str, case[1]))


def terms_of(shape: tuple[int, ...], count: int) -> list[np.ndarray]:
    return [normal(shape, seed) for seed in range(count)]


@functools.cache
def all_sums() -> list[np.ndarray]:
    """The sums of all cases, in one program."""
    terms = [terms_of(shape, count=2 + i % 3) for i, (shape, _) in enumerate(SUMS)]
    axes = [stacked for _, stacked in SUMS]
    program = jax.jit(lambda terms: [one_cpu.sums(*case) for case in zip(terms, axes, strict=True)])
    found: list[np.ndarray] = jax.device_get(program([tuple(t) for t in terms]))
    return found


@pytest.mark.parametrize("index", range(len(SUMS)), ids=[sum_id(case) for case in SUMS])
def test_sums_equal_numpy_in_float64(index: int) -> None:
    shape, stacked = SUMS[index]
    over = tuple(a for a in range(len(shape)) if a not in stacked)
    terms = [t.astype(np.float64) for t in terms_of(shape, count=2 + index % 3)]
    found = all_sums()[index]
    assert found.dtype == np.float32
    assert found.shape == (len(terms), *(shape[a] for a in stacked))
    for numbers, term in zip(found, terms, strict=True):
        rounding = 1e-6 * np.abs(term).sum(axis=over)
        np.testing.assert_array_less(np.abs(numbers - term.sum(axis=over)), rounding)


def test_float64_is_summed_in_float64(x64: None) -> None:
    terms = tuple(np.random.default_rng(seed).normal(size=(3, 70)) for seed in range(2))
    found = jax.jit(lambda *terms: one_cpu.sums(terms, (0,)))(*terms)
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, [t.sum(axis=1) for t in terms], rtol=1e-14)


@pytest.mark.parametrize(
    ("shape", "stacked", "tolerance"),
    [((1000, 1000), (), 1e-6), ((2, 500_000), (0,), 1e-6), ((500, 2, 1000), (1,), 1e-5)],
    ids=["a matrix", "stacked first", "stacked in the middle"],
)
def test_many_equal_terms_lose_few_digits(
    shape: tuple[int, ...], stacked: tuple[int, ...], tolerance: float
) -> None:
    term = np.full(shape, 0.1, np.float32)
    layers = int(np.prod([shape[a] for a in stacked]))
    exact = np.float64(np.float32(0.1)) * term.size / layers
    one_by_one = np.cumsum(term.ravel(), dtype=np.float32)[term.size // layers - 1]
    assert abs(one_by_one / exact - 1) > 1e-4  # what adding them one after the other would give
    found = jax.jit(lambda x: one_cpu.sums((x, 2 * x), stacked))(term)
    expected = np.broadcast_to([[exact], [2 * exact]], (2, layers))
    np.testing.assert_allclose(found.reshape(2, layers), expected, rtol=tolerance)


def test_the_sums_have_derivatives_and_batches() -> None:
    # 96 elements behind the stacked axis, so that they are summed in pieces.
    x, dx = normal((2, 2, 48), 0), normal((2, 2, 48), 1)
    weights = normal((3, 2), 2)

    def loss(x: jax.Array, sums: Any) -> jax.Array:
        return jnp.sum(weights * sums((x, x**2, x**3), (0,)))

    def reference(terms: tuple[jax.Array, ...], stacked: tuple[int, ...]) -> jax.Array:
        return jnp.stack([jnp.sum(term, axis=(1, 2)) for term in terms])

    @functools.partial(jax.jit, static_argnums=1)
    def everything(x: jax.Array, sums: Any) -> Any:
        value = functools.partial(loss, sums=sums)
        gradient = jax.grad(value)
        return {
            "value": value(x),
            "grad": gradient(x),
            "jvp": jax.jvp(value, (x,), (dx,))[1],
            "second derivative": jax.jvp(gradient, (x,), (dx,))[1],
            "vmap": jax.vmap(value)(jnp.stack([x, dx, -x])),
            "vmap of grad": jax.vmap(gradient)(jnp.stack([x, dx])),
            "checkpoint": jax.grad(jax.checkpoint(value))(x),
        }

    found, expected = everything(x, one_cpu.sums), everything(x, reference)
    for name, value in expected.items():
        assert np.abs(value).max() > 0.1
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    variadic = jax.make_jaxpr(lambda x: one_cpu.sums((x, x, x), (0,)))(x)
    assert "reduce" in set(primitives(variadic.jaxpr))


# Where it is possible ----------------------------------------------------------------------------


def possible_inside(*arrays: Any) -> bool:
    """Of arrays that are arguments of a traced program."""
    seen = []

    def look(*arrays: Any) -> None:
        seen.append(one_cpu.possible(*arrays))

    jax.eval_shape(look, *arrays)
    return seen[0]


def test_only_traced_programs_of_one_cpu() -> None:
    x = jnp.ones(2)
    assert one_cpu.cpu_devices() == jax.device_count("cpu") == 8
    assert not possible_inside(x)
    assert not one_cpu.possible(x)
    with one_device():
        assert possible_inside(x)
        assert possible_inside({"a": x, "none": None, "node": optax.MaskedNode()})
        assert not one_cpu.possible(x, np.ones(2), 1.0)
        assert not one_cpu.possible()
        assert not one_cpu.possible({"none": None})


def test_one_traced_array_suffices() -> None:
    constant = jnp.ones(2)
    seen = []

    def look(x: jax.Array) -> jax.Array:
        seen.append(one_cpu.possible({"a": np.ones(2)}, [constant, x, 1.0]))
        seen.append(one_cpu.possible(constant))
        return x

    with one_device():
        jax.eval_shape(look, jnp.ones(2))
    assert seen == [True, False]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@pytest.mark.parametrize("size", [1, 8])
def test_not_where_an_explicit_mesh_splits_an_array(axis_type: AxisType, size: int) -> None:
    mesh = jax.make_mesh((size,), ("x",), axis_types=(axis_type,), devices=jax.devices()[:size])
    whole, split = (
        jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, spec))
        for spec in (P(), P(None, "x"))
    )
    with jax.set_mesh(mesh), one_device():
        assert possible_inside(whole)
        assert possible_inside(whole, {"a": split}) == (axis_type is AxisType.Auto)


def test_without_cpu_devices_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def device_count(backend: str) -> int:
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "device_count", device_count)
    assert one_cpu.cpu_devices() == 0
    assert not possible_inside(jnp.ones(2))


# SPD's form --------------------------------------------------------------------------------------


class Step(NamedTuple):
    """The trees of one update."""

    params: Any
    anchor: Any
    updates: Any
    grad: Any


STACKED = {"blocks": 0, "columns": 1}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "blocks": {"bias": (3, 4), "kernel": (3, 4, 5)},  # a stacked module
    "columns": {"kernel": (4, 3)},  # stacked on its last axis
    "dense": {"bias": (5,), "kernel": (4, 5)},
    "large": {"half": (16, 24), "kernel": (16, 24), "scale": ()},
    "head": {"kernel": (4, 2)},  # masked out
    "lacking": {"bias": (5,), "kernel": (4, 5)},  # without an update for its bias
    "without": {"kernel": (2,)},  # without any
}
LAYERS = optax_spd.stacked(
    "columns", 1, layers=optax_spd.stacked("blocks", layers=optax_spd.by_module())
)
STAGE: dict[str, Any] = {
    "anchor": "argument",
    "layers": LAYERS,
    "mask": optax_spd.path_mask("^(?!head)"),
}


def random_step(seed: int) -> Step:
    """Numbers such that SPD fires on some of the layers, and everything else that a tree may hold.

    (The group "large" has arrays of several dtypes.)
    """
    draw = np.random.default_rng(seed)
    signs = {m: draw.choice([1.0, -1.0], p=[0.7, 0.3], size=(2, 3)) for m in SHAPES}

    def array(module: str, name: str, shape: tuple[int, ...]) -> Step:
        delta, anchor, noise = draw.normal(size=(3, *shape))
        sizes = [-1 if axis == STACKED.get(module) else 1 for axis in range(len(shape))]
        chosen = signs[module] if module in STACKED else signs[module][:, :1]
        outward, uphill = (s.reshape(sizes) for s in chosen)
        updates = 0.1 * (outward * delta + 0.3 * noise)
        gone = (module, name) in [("lacking", "bias"), ("without", "kernel")]
        dtype = jnp.bfloat16 if name == "half" else jnp.float32
        numbers = (anchor + delta, anchor, updates, uphill * delta)
        step = Step(*(jnp.asarray(x, dtype) for x in numbers))
        return step._replace(updates=None, grad=None) if gone else step

    drawn = {
        module: {name: array(module, name, shape) for name, shape in arrays.items()}
        for module, arrays in SHAPES.items()
    }
    others = {
        "ids": jnp.arange(3),
        "empty": jnp.ones((0, 2)),
        "none": None,
        "node": optax.MaskedNode(),
    }
    is_step = lambda x: isinstance(x, Step)
    return Step(
        *(
            jax.tree.map(lambda s, i=i: s[i], drawn, is_leaf=is_step) | {"others": others}
            for i in range(4)
        )
    )


@functools.cache
def update_of(form: str) -> Any:
    """SPD's update, compiled in one of its two forms. λ is an argument."""

    def update(step: Step, decay: jax.Array) -> Any:
        tx = optax_spd.spd(decay, **STAGE)
        return tx.update(
            step.updates, tx.init(step.params), step.params, grad=step.grad, anchor=step.anchor
        )

    jitted = jax.jit(update)
    with one_device() if form == "one CPU" else contextlib.nullcontext():
        traced = jitted.trace(random_step(0), jnp.asarray(1.0))
        found = set(primitives(traced.jaxpr))
        assert ("platform_index" in found) == (form == "one CPU")
        return traced.lower().compile()


@pytest.mark.parametrize("seed", range(6))
def test_the_form_for_one_cpu_equals_the_reference(seed: int) -> None:
    step, decay = random_step(seed), jnp.asarray(1.0 + 0.5 * seed)
    found, expected = (update_of(form)(step, decay) for form in ("one CPU", "reference"))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, expected)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        rtol = 2.0**-7 if a.dtype == jnp.bfloat16 else 1e-6
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6, err_msg=jax.tree_util.keystr(path))
    updates, state = found
    fires = np.asarray(state.spd_ratio) > 0
    assert 0 < fires.sum() < fires.size - 1
    # A layer without an update has no ratio, and what is no layer passes through.
    assert not fires[optax_spd.layer_names(step.params, LAYERS, STAGE["mask"]).index("without")]
    np.testing.assert_array_equal(updates["head"]["kernel"], step.updates["head"]["kernel"])


def layers_of(tree: Any) -> dict[str, list[np.ndarray]]:
    """The numbers of each layer of a tree like the parameters, by its name."""
    found: dict[str, list[np.ndarray]] = {}
    for module, arrays in SHAPES.items():
        for name in arrays:
            value = tree[module][name]
            if module == "head" or value is None:
                continue
            axis = STACKED.get(module)
            slices = [value] if axis is None else list(np.moveaxis(np.asarray(value), axis, 0))
            for i, part in enumerate(slices):
                layer = module if axis is None else f"{module}[{i}]"
                found.setdefault(layer, []).append(np.asarray(part, np.float64))
    return found


def test_the_form_for_one_cpu_equals_the_paper() -> None:
    step = random_step(7)
    updates, state = update_of("one CPU")(step, jnp.asarray(2.0))
    flat = [
        {k: np.concatenate([np.ravel(x) for x in v]) for k, v in layers_of(tree).items()}
        for tree in (*step, updates)
    ]
    params, anchor, steps, grad, found = flat
    names = optax_spd.layer_names(step.params, LAYERS, STAGE["mask"])
    fired = 0
    for index, name in enumerate(names):
        if name in ("lacking", "without"):  # whose parameters and updates differ in length
            continue
        expected, ratio = oracles.spd_step(
            steps[name], params[name], anchor[name], grad[name], decay=2.0
        )
        np.testing.assert_allclose(state.spd_ratio[index], ratio, atol=1e-6, err_msg=name)
        atol = 2e-2 if name == "large" else 1e-6  # it holds bfloat16
        np.testing.assert_allclose(found[name], expected, atol=atol, err_msg=name)
        fired += ratio > 0
    assert fired >= 3


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_layer(poison: float) -> None:
    update, decay, healthy = update_of("one CPU"), jnp.asarray(1.0), random_step(2)
    updates, state = update(healthy, decay)
    names = optax_spd.layer_names(healthy.params, LAYERS, STAGE["mask"])
    for module, name, index, victim in [
        ("blocks", "kernel", (1, 0, 2), "blocks[1]"),
        ("columns", "kernel", (3, 2), "columns[2]"),
        ("dense", "bias", (4,), "dense"),
        ("large", "kernel", (15, 0), "large"),
    ]:
        assert state.spd_ratio[names.index(victim)] > 0
        sick = healthy.grad[module][name].at[index].set(poison)
        grad = healthy.grad | {module: healthy.grad[module] | {name: sick}}
        sick_updates, sick_state = update(healthy._replace(grad=grad), decay)
        expected = np.where(np.array(names) == victim, 0, state.spd_ratio)
        np.testing.assert_array_equal(sick_state.spd_ratio, expected)
        found, before = layers_of(sick_updates), layers_of(updates)
        for layer, arrays in layers_of(healthy.updates).items():
            # The sick layer keeps the inner optimizer's step, the others what they got before.
            wanted = arrays if layer == victim else before[layer]
            for a, b in zip(found[layer], wanted, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=f"{layer}, {victim} being sick")


def test_layers_at_the_anchor_or_moved_onto_it_keep_their_step() -> None:
    step = random_step(3)
    at_rest = step._replace(anchor=step.params)
    updates, state = update_of("one CPU")(at_rest, jnp.asarray(1.0))
    np.testing.assert_array_equal(state.spd_ratio, np.zeros_like(state.spd_ratio))
    jax.tree.map(np.testing.assert_array_equal, updates, step.updates)
    back = jax.tree.map(
        lambda p, a, u: None if u is None else (a - p).astype(p.dtype),
        *(tree["dense"] for tree in (step.params, step.anchor, step.updates)),
    )
    onto = step._replace(updates=step.updates | {"dense": back})
    updates, _ = update_of("one CPU")(onto, jnp.asarray(1.0))
    jax.tree.map(np.testing.assert_array_equal, updates["dense"], back)


# In a process that has one CPU --------------------------------------------------------------------

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np, optax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)
import optax_spd

assert one_cpu.cpu_devices() == 1
draw = np.random.default_rng(0)
params = {"a": draw.normal(size=(8, 12)), "b": draw.normal(size=(4,)), "c": draw.normal(size=(4,))}
params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
grads = [jax.tree.map(lambda x: np.float32(draw.normal(size=x.shape)), params) for _ in range(4)]
adam = dict(learning_rate=0.1)
for tx in (
    optax_spd.adam_spd(**adam, anchor="zero"),
    optax_spd.chain(optax.adam(**adam), optax_spd.spd(anchor="zero")),
):
    jitted = jax.jit(tx.update)
    text = jitted.lower(params, tx.init(params), params).as_text()
    assert ":3 = stablehlo.reduce(" in text, text  # three sums in one pass
    results = []
    for update in (jitted, tx.update):
        state, fired = tx.init(params), []
        for grad in grads:
            updates, state = update(grad, state, params)
            fired.append(np.asarray(optax.tree.get(state, "spd_ratio")))
        results.append((updates, state))
    assert 0 < np.count_nonzero(fired) < np.size(fired)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)
print("alike")
"""


def test_on_one_cpu_a_jitted_step_takes_the_form_for_it() -> None:
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = " ".join(flag for flag in flags if "device_count" not in flag)
    environment = os.environ | {"XLA_FLAGS": kept, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.stdout.endswith("alike\n"), ended.stderr
    assert ended.returncode == 0
