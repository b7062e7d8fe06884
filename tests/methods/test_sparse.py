"""Sparse increments: the original's trajectories, which entries are chosen, what the inner sees."""

import collections
import functools
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract_runs import assert_same_bits

import optax_spd
from optax_spd.methods.sparse import selection

# Replays -----------------------------------------------------------------------------------------

CASES = golden.settings("sift")


def group_of(case: dict[str, Any]) -> Any:
    """What decides about the optimizer. The original's decay of sparse entries does nothing."""
    options = {k: v for k, v in case["optimizer_kwargs"].items() if k != "weight_decay"}
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return case["sparse_rate"], case["adam_count_offset"], tuple(sorted(options.items()))


WHOLE = ("theta", "score")  # without a step axis
GROUPS = collections.defaultdict(list)
for settings in CASES:
    GROUPS[group_of(settings)].append(settings)


def recorded(case: dict[str, Any], tensor: dict[str, Any], fields: dict[str, Any]) -> Any:
    """A tensor from its own first step on: θ₀, |g₀|, and gradient, rate and θ of each step."""
    steps, theta, grads = case["steps"], fields["theta0"], fields["grads"]
    if "used_grad" in fields:
        first, used = tensor["first_optimizer_step"], np.zeros((steps, theta.size))
        used[:, fields["idx"]] = fields["used_grad"]
        used = used.reshape(steps, *theta.shape)
    else:
        # The first gradient is dropped; a tensor that lags gets each of the others a step late.
        first = 1 + tensor["lag"]
        used = np.concatenate([grads[: tensor["lag"]], grads])[:steps]
    rate = np.broadcast_to(case["rates"].reshape(-1, *[1] * theta.ndim), (steps, *[1] * theta.ndim))
    late = lambda x: np.concatenate([x[first:], np.zeros((first, *x.shape[1:]))])
    after = np.concatenate([fields["params"][first:], np.repeat(fields["params"][-1:], first, 0)])
    return {"theta": theta, "score": abs(grads[0]), "g": late(used), "lr": late(rate), "end": after}


def trees_of(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The tensors of a group's cases, stacked by name: each array is compiled, which takes long."""
    stacks = collections.defaultdict(list)
    for case in cases:
        sparse = [t for t in case["tensors"] if t["role"] == "sparse" and t["selected"]]
        loaded = golden.load("sift", case | {"tensors": sparse})
        case = case | {"rates": np.asarray(loaded.lr, float)}
        for tensor in sparse:
            stacks[tensor["name"]].append(recorded(case, tensor, loaded.fields[tensor["name"]]))
    found = {}
    for name, layers in stacks.items():
        layers = [*layers, layers[0]]  # at least two
        found[f"{name}/stack"] = {
            key: np.stack([x[key] for x in layers], axis=1 + (key not in WHOLE))
            for key in layers[0]
        }
    return found


def replay_error(group: Any, dtype: Any) -> float:
    """The largest error of any parameter at any step."""
    fraction, offset, options = group
    rows = trees_of(GROUPS[group])
    trees = {
        field: {name: jnp.asarray(x[field], dtype) for name, x in rows.items()}
        for field in ("theta", "score", "g", "lr", "end")
    }
    numbers = dict(options)
    if "betas" in numbers:
        inner = optax.scale_by_adam(*numbers["betas"], numbers["eps"])
    else:
        inner = optax.trace(numbers["momentum"])
    tx = optax_spd.with_sparse(
        inner,
        fraction,
        score=lambda path, grad, param: trees["score"][path],
        layers=optax_spd.stacked("/stack$", axis=1),
        mask=optax_spd.path_mask("/"),
    )
    frozen = jnp.ones((2, 4), dtype)
    params = trees["theta"] | {"frozen.weight": frozen}
    state = tx.init(params)
    if offset:
        state = state._replace(inner_state=state.inner_state._replace(count=jnp.int32(offset)))

    def step(carry: Any, rows: Any) -> Any:
        params, state = carry
        g, lr = rows
        updates, state = tx.update(g | {"frozen.weight": frozen}, state, params)
        scaled = {name: -lr[name] * updates[name] for name in g}
        scaled["frozen.weight"] = updates["frozen.weight"]
        params = optax.apply_updates(params, scaled)
        return (params, state), params

    run = jax.jit(lambda *start: jax.lax.scan(step, start, (trees["g"], trees["lr"]))[1])
    found = run(params, state)
    assert np.all(found.pop("frozen.weight") == 1)
    errors = jax.tree.map(lambda x, y: np.abs(x - y).max(), found, trees["end"])
    return float(max(errors.values()))


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: "-".join(map(str, group[:2])))
def test_the_original_is_replayed_in_a_stack(group: Any, x64: None) -> None:
    assert replay_error(group, jnp.float64) <= 1e-9
    assert replay_error(group, jnp.float32) <= 1e-5


# Which entries are chosen ------------------------------------------------------------------------


def expected_entries(score: np.ndarray, k: int) -> np.ndarray:
    """Of one layer, by a stable sort; its size where fewer than k scores are numbers."""
    flat = score.astype(np.float64).ravel()
    order = np.argsort(-flat, kind="stable")  # NaN comes last
    found = np.sort(order[: min(k, np.sum(~np.isnan(flat)))])
    return np.concatenate([found, np.full(k - len(found), flat.size)])


SCORE = np.random.default_rng(0).normal(size=(3, 37, 11))
SPECIAL = {
    "distinct": SCORE,
    "ties": np.round(SCORE),
    "all equal": np.zeros_like(SCORE),
    "zeros of both signs": np.where(SCORE > 0, 0.0, -0.0),
    "infinities": np.where(abs(SCORE) > 2, np.sign(SCORE) * np.inf, SCORE),
    "NaN": np.where(SCORE > 0.5, np.nan, SCORE),
    "negative NaN": np.where(SCORE > 0.5, -np.float64(np.nan), SCORE),
    "few numbers": np.where(abs(SCORE) < 0.02, SCORE, np.nan),
    "no number": np.full_like(SCORE, np.nan),
}


@functools.partial(jax.jit, static_argnames=("k", "stacked_axes"))
def chosen_entries(score: jax.Array, k: int, stacked_axes: tuple[int, ...]) -> jax.Array:
    return selection.positions({(): selection.choose(score, k, stacked_axes)})[()]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_largest_scores_are_chosen_and_of_equal_ones_the_first(dtype: str, x64: None) -> None:
    for kind, score in SPECIAL.items():
        score = score.astype(dtype)
        for axis in (0, 2):
            layers = np.moveaxis(score, axis, 0)
            for k in (1, 33, layers[0].size):
                found = chosen_entries(score, k, (axis,))
                expected = [expected_entries(layer, k) for layer in layers]
                np.testing.assert_array_equal(found, expected, err_msg=f"{kind} {axis} {k}")
        whole = chosen_entries(score, 100, ())
        np.testing.assert_array_equal(whole[0], expected_entries(score, 100), err_msg=kind)


PARAMS = {
    "blocks": {"kernel": np.random.default_rng(1).normal(size=(5, 3, 7)).astype(np.float32)},
    "scale": np.ones((), np.float32),
    "scales": np.ones(3, np.float32),
}
GRADS = jax.tree.map(lambda x: (x**2 + 1).astype(np.float32), PARAMS)
LAYERS = optax_spd.stacked("kernel|scales", axis=-1)


def first_step(tx: Any, params: Any = PARAMS, grads: Any = GRADS, **extra: Any) -> Any:
    return jax.jit(tx.update)(grads, tx.init(params), params, **extra)


def top(score: Any, fraction: float, axis: int) -> np.ndarray:
    layers = np.moveaxis(np.asarray(score), axis, 0)
    k = min(int(fraction * layers[0].size) + 1, layers[0].size)
    return np.stack([expected_entries(layer, k) for layer in layers])


SCORES = {
    "gradient": lambda path, g, p: abs(g),
    "magnitude": lambda path, g, p: abs(p),
    "a function": lambda path, g, p: abs(g) / abs(p) + len(path),
}


@pytest.mark.parametrize("score", SCORES)
def test_each_layer_chooses_by_the_score(score: str) -> None:
    function = SCORES[score]
    tx = optax_spd.with_sparse(
        optax.sgd(1.0), 0.3, score=function if score == "a function" else score, layers=LAYERS
    )
    updates, state = first_step(tx, grad=GRADS)
    indices = optax.tree.get(state, "sparse_indices")
    kernel, grads = PARAMS["blocks"]["kernel"], GRADS["blocks"]["kernel"]
    expected = top(function("blocks/kernel", grads, kernel), 0.3, -1)
    np.testing.assert_array_equal(indices["blocks"]["kernel"], expected)
    assert expected.shape == (7, 5)
    np.testing.assert_array_equal(indices["scale"], [0])
    np.testing.assert_array_equal(indices["scales"], [[0], [0], [0]])
    mask = optax_spd.sparse_mask(state, PARAMS)
    for u, g, chosen in zip(*map(jax.tree.leaves, (updates, GRADS, mask)), strict=True):
        np.testing.assert_array_equal(u, np.where(chosen, -g, 0))
    assert mask["blocks"]["kernel"].sum() == 7 * 5
    assert not any(x.any() for x in jax.tree.leaves(optax_spd.sparse_mask(tx.init(PARAMS), PARAMS)))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, bool])
def test_integers_and_bools_are_scores(dtype: Any) -> None:
    score = np.array([0, 1, 0, 1, 0]).astype(dtype)
    params = {"w": np.ones(5, np.float32)}
    tx = optax_spd.with_sparse(optax.sgd(1.0), 0.2, score=lambda path, g, p: jnp.asarray(score))
    np.testing.assert_array_equal(first_step(tx, params, params)[1].sparse_indices["w"], [1, 3])


def test_random_entries_are_the_same_in_every_run_and_other_ones_for_each_path() -> None:
    params = {name: np.zeros(1000, np.float32) for name in "ab"}
    tx = optax_spd.with_sparse(optax.sgd(1.0), 0.3, score="random")
    found = [first_step(tx, params, params)[1].sparse_indices for _ in range(2)]
    assert_same_bits(*map(jax.device_get, found))
    common = np.intersect1d(found[0]["a"], found[0]["b"]).size
    assert 60 < common < 120  # 301 · 301 / 1000 by chance


def test_the_raw_gradient_chooses_and_a_nan_never_trains() -> None:
    grads = jax.tree.map(np.copy, GRADS)
    grads["blocks"]["kernel"][0, 0, 0] = np.nan
    tx = optax_spd.chain(
        optax.clip(1e-3), optax_spd.with_sparse(optax_spd.adam_spd(0.1), 0.3, layers=LAYERS)
    )
    _, state = first_step(tx, grads=grads)
    score = abs(grads["blocks"]["kernel"])
    found = optax.tree.get(state, "sparse_indices")["blocks"]["kernel"]
    np.testing.assert_array_equal(found, top(score, 0.3, -1))
    assert 0 not in found[0]


def test_with_fewer_numbers_than_k_the_rest_trains_nothing() -> None:
    params = {"w": np.arange(1.0, 6.0, dtype=np.float32)}
    grads = {"w": np.array([np.nan, 1, np.nan, 2, np.nan], np.float32)}
    tx = optax_spd.with_sparse(optax_spd.adam_spd(0.1), 0.6)
    state = tx.init(params)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(grads, state, params)
        assert np.all(np.isfinite(updates["w"]))
        np.testing.assert_array_equal(updates["w"] != 0, [False, True, False, True, False])
    np.testing.assert_array_equal(state.sparse_indices["w"], [1, 3, 5, 5])
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


# What the inner optimizer sees -------------------------------------------------------------------


def at_entries(tree: Any) -> np.ndarray:
    """The kernel of a whole tree at the chosen entries."""
    kernel = np.moveaxis(tree["blocks"]["kernel"], -1, 0).reshape(7, 15)
    return np.take_along_axis(kernel, top(GRADS["blocks"]["kernel"], 0.3, -1), axis=1)


def chosen(tree: Any) -> Any:
    """What of a whole tree an inner optimizer sees."""
    scales = {"scale": tree["scale"].reshape(1), "scales": tree["scales"].reshape(3, 1)}
    return {"blocks": {"kernel": at_entries(tree)}, **scales}


def stepped(
    tx: Any, params: Any, state: Any, grads: Any = GRADS, *, steps: int = 3, **extra: Any
) -> Any:
    """Parameters and state after some steps on gradients that turn round."""
    update = jax.jit(functools.partial(tx.update, **extra))
    for step in range(steps):
        turned = jax.tree.map(lambda g, step=step: g * (1.0 - 0.9 * step), grads)
        updates, state = update(turned, state, params)
        params = optax.apply_updates(params, updates)
    return jax.device_get((params, state))


def test_the_chosen_entries_train_as_if_they_were_all() -> None:
    """With state, clipping norm, decay and SPD's layers of their own."""
    stack = optax_spd.stacked("kernel|scales", axis=0)
    inner = optax_spd.chain(
        optax_spd.l2_sp(0.1), optax.clip_by_global_norm(1.0), optax.adam(0.3),
        optax_spd.spd(1.0, layers=stack), optax_spd.ftp(layers=stack, radius_learning_rate=0.1),
    )  # fmt: skip
    tx = optax_spd.with_sparse(inner, 0.3, layers=LAYERS)
    found, state = stepped(tx, PARAMS, tx.init(PARAMS))
    expected, inner_state = stepped(
        inner, chosen(PARAMS), inner.init(chosen(PARAMS)), chosen(GRADS)
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, state.inner_state, inner_state)
    jax.tree.map(close, chosen(found), expected)
    untouched = ~optax_spd.sparse_mask(state, PARAMS)["blocks"]["kernel"]
    kernels = (tree["blocks"]["kernel"][untouched] for tree in (found, PARAMS))
    np.testing.assert_array_equal(*kernels)
    assert np.any(optax.tree.get(state, "spd_ratio") > 0)


FROM_VALUES = {
    "prodigy": optax.contrib.prodigy(1.0),
    "schedule-free": optax.contrib.schedule_free_adamw(0.1),
    "accumulated gradients": optax.MultiSteps(optax.sgd(1.0), 2),
    "random keys": optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.sgd(0.1)),
}


@pytest.mark.parametrize("inner", FROM_VALUES.values(), ids=FROM_VALUES)
def test_a_state_made_of_parameters_is_made_of_the_chosen_ones(inner: Any) -> None:
    draw = np.random.default_rng(0)
    grads, params = ({"w": draw.normal(size=20).astype(np.float32)} for _ in range(2))
    entries = expected_entries(abs(grads["w"]), 5)
    tx = optax_spd.with_sparse(inner, 0.2)
    # What init got is not what trains.
    state, vector = tx.init({"w": np.ones(20, np.float32)}), {"w": params["w"][entries]}
    inner_state, update = inner.init(vector), jax.jit(inner.update)
    step = jax.jit(tx.update)
    for _ in range(3):
        updates, state = step(grads, state, params)
        expected, inner_state = update({"w": grads["w"][entries]}, inner_state, vector)
        np.testing.assert_allclose(updates["w"][entries], expected["w"], rtol=1e-5)
        params, vector = optax.apply_updates(params, updates), optax.apply_updates(vector, expected)


def test_everything_else_keeps_its_value_and_has_no_state() -> None:
    params = PARAMS | {"head": np.ones(4, np.float32), "steps": jnp.arange(3), "none": None}
    grads = GRADS | {"head": np.ones(4, np.float32), "steps": jnp.arange(3), "none": None}
    tx = optax_spd.with_sparse(
        optax.adam(0.1), 0.3, layers=LAYERS, mask=optax_spd.path_mask("blocks|scale")
    )
    updates, state = tx.update(grads, tx.init(params), params)
    assert not updates["head"].any()
    assert not updates["steps"].any()
    assert updates["steps"].dtype == jnp.int32
    assert updates["none"] is None
    assert set(state.sparse_indices) == set(state.inner_state[0].mu) == set(PARAMS)


def test_an_array_without_an_update_in_the_first_step_is_never_trained() -> None:
    tx = optax_spd.with_sparse(optax.sgd(0.1), 0.3, layers=LAYERS)
    updates, state = first_step(tx, grads=GRADS | {"blocks": {"kernel": None}})
    assert updates["blocks"]["kernel"] is None
    updates, state = tx.update(GRADS, state, PARAMS)
    assert not updates["blocks"]["kernel"].any()
    assert updates["scales"].all()


def test_what_was_set_in_the_inner_state_before_the_choice_stays() -> None:
    inner = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
    tx = optax_spd.with_sparse(inner, 0.3, layers=LAYERS)
    state = optax.tree.set(tx.init(PARAMS), learning_rate=jnp.float32(0.25))
    updates, _ = jax.jit(tx.update)(GRADS, state, PARAMS)
    np.testing.assert_allclose(updates["scale"], -0.25 * GRADS["scale"])


def test_a_validation_loss_inside_is_one_of_all_parameters() -> None:
    tx = optax_spd.with_sparse(
        optax_spd.adam_tpgm(0.1, norm="l2", radius_optimizer=optax.sgd(0.1)), 0.3, layers=LAYERS
    )
    seen = []

    def loss(params: Any, batch: Any) -> jax.Array:
        seen.append(jax.tree.map(jnp.shape, params))
        return sum(jnp.sum((x - batch) ** 2) for x in jax.tree.leaves(params))

    extra = {"validation_fn": loss, "validation_batches": jnp.array([-9.0, -8.0])}
    _, state = stepped(tx, PARAMS, tx.init(PARAMS), **extra)
    assert seen
    assert all(shapes == jax.tree.map(np.shape, PARAMS) for shapes in seen)
    radii = optax.tree.get(state, "tpgm_radii")
    assert len(np.unique(radii)) > 1


# Anchors -----------------------------------------------------------------------------------------

OTHER = jax.tree.map(lambda x: x + 10, PARAMS)
SPD_INSIDE = optax_spd.with_sparse(
    optax_spd.adam_spd(0.3, layers=optax_spd.stacked("kernel|scales")), 0.3, layers=LAYERS
)


def anchor_of(state: Any) -> Any:
    return optax.tree.get(state.inner_state, "anchor")


def test_the_anchor_is_what_the_parameters_are_when_the_entries_are_chosen() -> None:
    state = SPD_INSIDE.init(OTHER)
    _, state = jax.jit(SPD_INSIDE.update)(GRADS, state, PARAMS)
    np.testing.assert_array_equal(anchor_of(state)["blocks"]["kernel"], at_entries(PARAMS))


L2_SP_INSIDE = optax_spd.with_sparse(
    optax_spd.adamw_l2_sp(0.3, weight_decay=0.1), 0.3, layers=LAYERS
)


def test_set_anchor_takes_the_whole_tree_before_the_choice() -> None:
    state = optax_spd.set_anchor(L2_SP_INSIDE.init(PARAMS), OTHER)
    found, state = stepped(L2_SP_INSIDE, PARAMS, state)
    np.testing.assert_array_equal(anchor_of(state)["blocks"]["kernel"], at_entries(OTHER))
    near, _ = stepped(L2_SP_INSIDE, PARAMS, L2_SP_INSIDE.init(PARAMS))
    assert np.abs(found["scale"] - near["scale"]) > 1e-2
    # It is kept whole, in buffers of its own, until the anchor is set again.
    np.testing.assert_array_equal(state.anchor["scales"], OTHER["scales"])
    state = optax_spd.set_anchor(state, PARAMS)
    assert state.anchor == optax.EmptyState()
    np.testing.assert_array_equal(anchor_of(state)["blocks"]["kernel"], at_entries(PARAMS))


def test_set_anchor_takes_the_whole_tree_after_the_choice() -> None:
    first, state = stepped(L2_SP_INSIDE, PARAMS, L2_SP_INSIDE.init(PARAMS), steps=1)
    state = optax_spd.set_anchor(state, OTHER)
    assert state.anchor == optax.EmptyState()
    np.testing.assert_array_equal(anchor_of(state)["blocks"]["kernel"], at_entries(OTHER))
    updates, _ = L2_SP_INSIDE.update(GRADS, state, first)
    assert updates["scale"] > 0  # toward the anchor, against the gradient


@pytest.mark.parametrize("steps", [0, 2])
def test_a_dropped_anchor_is_missed_until_it_is_set_again(steps: int) -> None:
    params, state = stepped(SPD_INSIDE, PARAMS, SPD_INSIDE.init(PARAMS), steps=steps)
    dropped = optax_spd.drop_anchor(state)
    before, after = (sum(x.nbytes for x in jax.tree.leaves(s)) for s in (state, dropped))
    assert before - after == 4 * (7 * 5 + 1 + 3)
    with pytest.raises(ValueError, match="the anchor was dropped; call set_anchor"):
        SPD_INSIDE.update(GRADS, dropped, params)
    mended = optax_spd.set_anchor(dropped, PARAMS)
    runs = (stepped(SPD_INSIDE, params, s, steps=2)[0] for s in (mended, state))
    assert_same_bits(*runs)


def test_a_whole_anchor_that_does_not_match_is_refused() -> None:
    state = SPD_INSIDE.init(PARAMS)
    turned = PARAMS | {"blocks": {"kernel": PARAMS["blocks"]["kernel"].T}}
    with pytest.raises(ValueError, match=r"'blocks/kernel'.*shape \(7, 3, 5\).*shape \(5, 3, 7\)"):
        optax_spd.set_anchor(state, turned)
    with pytest.raises(ValueError, match=r"anchor has no array at 'scales'.*nearest.*'scale'"):
        optax_spd.set_anchor(state, {k: PARAMS[k] for k in ("blocks", "scale")})
    plain = optax_spd.with_sparse(optax.adam(0.1), 0.3)
    with pytest.raises(ValueError, match="The state holds no anchor"):
        optax_spd.set_anchor(plain.init(PARAMS), PARAMS)


# Memory and wrong input --------------------------------------------------------------------------


def test_state_takes_memory_for_the_chosen_entries_only() -> None:
    """At most 0.65 bytes a parameter at 5 %, and an anchor inside adds 4 · 5 %."""
    params = {f"w{i}": jax.ShapeDtypeStruct((512, 512), jnp.float32) for i in range(3)}
    size = 3 * 512 * 512
    chosen = 3 * (int(0.05 * 512 * 512) + 1)

    def state_bytes(inner: Any) -> int:
        state = optax_spd.with_sparse(inner, 0.05).init(params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))

    adam = state_bytes(optax.adam(0.1))
    assert adam <= 0.65 * size
    for stage in (optax_spd.spd(), optax_spd.l2_sp(0.1)):
        added = state_bytes(optax.chain(optax.adam(0.1), stage)) - adam
        assert 4 * chosen <= added <= 4 * chosen + 64
    ftp = state_bytes(optax.chain(optax.adam(0.1), optax_spd.ftp())) - adam
    assert 8 * chosen <= ftp <= 8 * chosen + 128  # an anchor and the last deviation


def test_a_layer_too_large_for_int32_is_refused() -> None:
    shape = lambda *sizes: {"w": jax.ShapeDtypeStruct(sizes, jnp.float32)}
    tx = optax_spd.with_sparse(optax.identity(), 0.0)
    assert tx.init(shape(2**31 - 1)).sparse_indices["w"].shape == (1,)
    with pytest.raises(
        ValueError, match=r"'w' of shape \(65536, 32768\) has 2,147,483,648 .*int32"
    ):
        tx.init(shape(2**16, 2**15))
    stacked = optax_spd.with_sparse(optax.identity(), 0.0, layers=optax_spd.stacked("w"))
    assert stacked.init(shape(2**16, 2**15)).sparse_indices["w"].shape == (2**16, 1)
    with pytest.raises(ValueError, match=r"4,096 layers of 67,108,864 .* Split the array") as error:
        stacked.init(shape(4096, 2**26))
    assert "stacked(" not in str(error.value)


def sparse(fraction: Any = 0.1, inner: Any = None, **options: Any) -> Any:
    return optax_spd.with_sparse(inner or optax.sgd(0.1), fraction, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"inner": optax.adam}, TypeError, r"called: optax\.adam"),
        ({"fraction": -0.1}, ValueError, "fraction must be finite and between 0 and 1"),
        ({"fraction": 1.1}, ValueError, "fraction must be finite and between 0 and 1"),
        ({"score": "weight"}, ValueError, "score must be one of 'gradient', .* got 'weight'"),
        ({"score": lambda path, g, p: g.sum()}, ValueError, r"for 'blocks/kernel' .* float32\[\]"),
        ({"score": lambda path, g, p: g * 1j}, ValueError, r"one real number .* complex64\["),
    ],
)
def test_wrong_arguments_are_refused(arguments: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        first_step(sparse(**arguments))


def test_the_fraction_is_no_tracer() -> None:
    with pytest.raises(TypeError, match="fraction shapes the program"):
        jax.eval_shape(lambda x: sparse(x).init(PARAMS), 0.1)


def test_a_state_of_another_choice_is_refused() -> None:
    wrong = (
        sparse(0.2).init(PARAMS)._replace(sparse_indices=sparse(0.8).init(PARAMS).sparse_indices)
    )
    with pytest.raises(ValueError, match=r"shape \(85,\) at 'blocks/kernel', .* need \(22,\)"):
        sparse(0.2).update(GRADS, wrong, PARAMS)
    with pytest.raises(ValueError, match="no choice of entries"):
        optax_spd.sparse_mask(optax.sgd(0.1).init(PARAMS), PARAMS)


# Host functions and errors -----------------------------------------------------------------------


def test_check_state_and_the_report_know_stacks_on_any_axis() -> None:
    params = {"layers": {"kernel": jnp.ones((6, 3, 8))}}
    layers = optax_spd.stacked("^layers/", axis=1)
    inner = optax_spd.adam_spd(0.1, layers=optax_spd.stacked("^layers/", axis=0))
    state = optax_spd.with_sparse(inner, 0.2, layers=layers).init(params)
    optax_spd.check_state(state, params, layers=layers)
    report = optax_spd.layer_report(params, params, state, layers=layers)
    assert set(report.rows[0].state) == {"spd_ratio", "spd_fired"}
    with pytest.raises(ValueError, match="other layers"):
        optax_spd.check_state(state, params)


def test_shard_map_is_refused() -> None:
    tx = optax_spd.with_sparse(optax.sgd(0.1), 0.1)
    params = {"kernel": jnp.ones((16, 8))}
    specs = {"kernel": jax.sharding.PartitionSpec("x")}
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(params: Any) -> Any:
        return tx.update(params, tx.init(params), params)[0]

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(specs,), out_specs=specs)
    with pytest.raises(ValueError, match=r"shard_map splits 'kernel'.*jit with NamedSharding"):
        mapped(params)


def test_set_anchor_needs_to_know_whether_the_choice_is_made() -> None:
    params = {"kernel": jnp.ones((4, 8))}
    state = optax_spd.with_sparse(optax_spd.adam_spd(0.1), 0.1).init(params)
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda state: optax_spd.set_anchor(state, params))(state)
