"""PathProx: the original's trajectories, NumPy in float64, and what the balance keeps."""

import functools
import itertools
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import replays
from jax.sharding import PartitionSpec as P

import optax_spd
from optax_spd.layers.pairs import Pair
from optax_spd.methods import path_prox as module

CASES = {case["name"]: case for case in golden.settings("pathprox")}
# Replayed below without what the original does wrong. No case is replayed in PyTorch's layout:
# pairs= finds kernels in Flax's, so all arrays are transposed.
NOT_EXPRESSED = {
    "pathprox_mlp_no_output_bias": "the pair behind a V without a bias is not compensated",
    "pathprox_mlp_dead_row_live_bias": "the bias of a unit without incoming weights grows by 1e6",
}
FLOOR = 1e-6


class Case:
    """A case's arrays as trees {layer: {"kernel": ..., "bias": ...}}, some over steps."""

    def __init__(self, name: str, dtype: Any = np.float64) -> None:
        self.settings, self.dtype = CASES[name], dtype
        self.fields = replays.fields("pathprox", self.settings)
        with np.load(golden.DATA / "pathprox.npz") as arrays:
            self.lr = arrays[f"{name}/lr"]

    def tree(self, field: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for tensor in self.settings["tensors"]:
            layer, kind = tensor["name"].split(".")
            array = self.fields[tensor["name"]].get(field)
            if array is None:
                continue
            if kind == "weight":  # from (out, in, ...) to (..., in, out)
                first = array.ndim - len(tensor["shape"])
                array = np.moveaxis(array, (first + 1, first), (-2, -1))
            key = "kernel" if kind == "weight" else "bias"
            found.setdefault(layer, {})[key] = array.astype(self.dtype)
        return found

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return [(f"^{w}/", f"^{v}/") for w, v in self.settings["grouped_layers"]]

    def decayed(self, params: Any) -> Any:
        """The weights that SGD decays, outside of the pairs."""
        both, others = self.settings["regularize_bias"], self.settings["other_layers"]
        outs = [v for _, v in self.settings["grouped_layers"]]
        decays = lambda layer, key: (
            layer in others if key == "kernel" else both and layer in (*others, *outs)
        )
        return {layer: {k: decays(layer, k) for k in keys} for layer, keys in params.items()}

    def optimizer(self) -> optax.GradientTransformation:
        lam, momentum = self.settings["weight_decay"], self.settings["momentum"] or None
        rate = lambda count: jnp.asarray(self.lr)[count]
        return optax.chain(
            optax.add_decayed_weights(lam, self.decayed),
            optax.sgd(rate, momentum),
            optax_spd.path_prox(
                rate, lam, self.pairs, regularize_bias=self.settings["regularize_bias"]
            ),
        )

    def run(self) -> Any:
        """The parameters after every step."""
        recorded = replays.Recording(self.tree("theta0"), self.tree("grads"), self.lr)
        return jax.device_get(jax.jit(lambda r: replays.run(self.optimizer(), r))(recorded))


def assert_close(found: Any, expected: Any, atol: float) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", sorted(CASES.keys() - NOT_EXPRESSED.keys()))
def test_replays_the_original(name: str, dtype: Any, x64: None) -> None:
    case = Case(name, dtype)
    found, expected = case.run(), case.tree("params")
    assert_close(found, expected, 1e-9 if dtype == np.float64 else 1e-5)
    kernels = [found[v]["kernel"] for _, v in case.settings["grouped_layers"]]
    # A unit is off when all that leaves it is exactly zero.
    off = [np.all(x == 0, axis=(*range(1, x.ndim - 2), -1)).sum() for x in kernels]
    assert sum(off) == case.settings["stats"]["zero_units"]


def pairs_of(case: Case, params: Any) -> list[Pair]:
    return [
        Pair(*(params[layer].get(key) for layer in (w, v) for key in ("kernel", "bias")))
        for w, v in case.settings["grouped_layers"]
    ]


# Against NumPy -----------------------------------------------------------------------------------


def numpy_step(
    pairs: list[list[Any]], tau: float, *, balance: bool = True, skip_without_bias: bool = False
) -> list[list[Any]]:
    """Steps 2 and 3 of golden/README.md, section 8, in float64; changes the pairs in place."""
    norm = lambda x, axis: np.sqrt(np.sum(x**2, axis=tuple(a for a in range(x.ndim) if a != axis)))
    into, out = (lambda p: norm(p[0], p[0].ndim - 1)), (lambda p: norm(p[2], p[2].ndim - 2))
    path = [np.sum(into(p) * out(p)) for p in pairs]
    mean = np.prod(np.maximum(path, FLOOR)) ** (1 / len(path))
    for number, pair in enumerate(pairs if balance else []):
        s = mean / max(path[number], FLOOR)
        pair[2] = pair[2] * s
        if pair[3] is None and skip_without_bias:
            continue
        pair[3] = None if pair[3] is None else pair[3] * s
        if number + 1 < len(pairs):
            following = pairs[number + 1]
            following[1] = None if following[1] is None else following[1] * s
            following[2] = following[2] / s
            path[number + 1] /= max(s, FLOOR)
    for pair in pairs:
        r, n = into(pair), out(pair)
        alive = r > 0
        scale = np.where(alive, np.maximum(r, FLOOR), 1)
        pair[0] = pair[0] / scale
        pair[1] = None if pair[1] is None else pair[1] / scale
        kept = np.where(n <= tau, 0, 1 - tau / np.maximum(n, FLOOR))
        pair[2] = pair[2] * kept[:, None]
    return pairs


def test_a_pair_behind_one_without_a_bias_is_compensated(x64: None) -> None:
    """The original forgets it: NumPy with that is the original, without it is ours."""
    case = Case("pathprox_mlp_no_output_bias")
    lam, found = case.settings["weight_decay"], case.run()
    at = lambda tree, step: jax.tree.map(lambda x: x[step], tree)
    for forgets, trajectory in ((True, case.tree("params")), (False, found)):
        before = case.tree("theta0")
        for step, rate in enumerate(case.lr):
            grads = at(case.tree("grads"), step)
            stepped = jax.tree.map(lambda x, g, rate=rate: x - rate * g, before, grads)
            pairs = [list(pair) for pair in pairs_of(case, stepped)]
            numpy_step(pairs, lam * rate, skip_without_bias=forgets)
            before = at(trajectory, step)
            for pair, wanted in zip(pairs_of(case, before), pairs, strict=True):
                assert_close(list(pair), wanted, 1e-9)
    assert np.abs(found["l3"]["bias"] - case.tree("params")["l3"]["bias"]).max() > 1e-3


def test_the_bias_of_a_unit_without_incoming_weights_is_left_alone(x64: None) -> None:
    case = Case("pathprox_mlp_dead_row_live_bias")
    found, expected, dead = case.run(), case.tree("params"), 0
    assert expected["a1"]["bias"][0, dead] > 1e5
    by_sgd = case.tree("theta0")["a1"]["bias"] - case.lr[0] * case.tree("grads")["a1"]["bias"][0]
    expected["a1"]["bias"][0, dead] = by_sgd[dead]
    assert_close(found, expected, 1e-9)


def network(seed: int, convolutions: bool = False, biases: bool = True) -> dict[str, Any]:
    """Three pairs, each fed by the one before."""
    draw = np.random.default_rng(seed)
    sizes, window = [3, 5, 4, 6, 3, 4, 2], (3,) if convolutions else ()
    tree = {}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        tree[f"layer_{i}"] = {"kernel": draw.normal(size=(*window, inputs, outputs))}
        if biases or i % 2 == 0:
            tree[f"layer_{i}"]["bias"] = draw.normal(size=outputs)
    return tree


PAIRS = [(f"layer_{i}/", f"layer_{i + 1}/") for i in (0, 2, 4)]


def listed(tree: dict[str, Any]) -> list[list[Any]]:
    """The pairs of a network, as NumPy changes them."""
    layers = [(tree[f"layer_{i}"], tree[f"layer_{i + 1}"]) for i in (0, 2, 4)]
    return [[layer.get(key) for layer in pair for key in ("kernel", "bias")] for pair in layers]


def forward(tree: dict[str, Any], x: Any) -> Any:
    for i in range(len(tree)):
        kernel, bias = tree[f"layer_{i}"]["kernel"], tree[f"layer_{i}"].get("bias", 0)
        if kernel.ndim == 2:
            x = x @ kernel + bias
        else:
            x = jax.lax.conv_general_dilated(
                x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            )
            x = x + bias
        x = jnp.maximum(x, 0) if i + 1 < len(tree) else x
    return x


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("convolutions", [False, True])
def test_the_balance_keeps_the_function_and_evens_the_path_norms(
    convolutions: bool, biases: bool, x64: None
) -> None:
    tree = network(0, convolutions, biases)
    x = np.random.default_rng(1).normal(size=(4, 7, 3) if convolutions else (9, 3))
    pairs = module.balanced([Pair(*pair) for pair in listed(tree)])
    norms = [float(jnp.sum(module.input_norms(p) * module.output_norms(p))) for p in pairs]
    np.testing.assert_allclose(norms, norms[0], rtol=1e-12)
    changed = {}
    for i, p in zip((0, 2, 4), pairs, strict=True):
        changed[f"layer_{i}"] = {"kernel": p.w, "bias": 0 if p.b is None else p.b}
        changed[f"layer_{i + 1}"] = {"kernel": p.v, "bias": 0 if p.c is None else p.c}
    assert np.abs(changed["layer_1"]["kernel"] - tree["layer_1"]["kernel"]).max() > 0.1
    np.testing.assert_allclose(forward(changed, x), forward(tree, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("convolutions", [False, True])
def test_a_step_is_that_of_numpy(convolutions: bool, balance: bool, x64: None) -> None:
    """With schedules, and behind any step."""
    params, steps = network(0, convolutions), network(1, convolutions)
    tx = optax_spd.path_prox(
        lambda count: 0.5 / (1 + count), lambda count: 1.0 + count, PAIRS, balance=balance
    )
    state, update = tx.init(params), jax.jit(tx.update)
    for count in range(3):
        expected = listed(jax.tree.map(np.add, params, steps))
        numpy_step(expected, 0.5, balance=balance)  # 0.5 / (1 + count) * (1 + count)
        updates, state = update(steps, state, params)
        params = jax.tree.map(np.add, params, jax.device_get(updates))
        for pair, arrays in zip(listed(params), expected, strict=True):
            for x, y in zip(pair, arrays, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)
        assert state.count == count + 1


# Corners -----------------------------------------------------------------------------------------


def pair_step(decay: float, dtype: Any = np.float32, **kernels: Any) -> Any:
    """The parameters of one pair after a step on an update of zero."""
    params = {
        "up": {"kernel": jnp.asarray(kernels["w"], dtype), "bias": jnp.asarray([1.0, 2.0], dtype)},
        "down": {"kernel": jnp.asarray(kernels["v"], dtype)},
    }
    tx = optax_spd.path_prox(1.0, decay, [("up", "down")])
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    return jax.device_get(optax.apply_updates(params, updates))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_threshold_is_zero_exactly_and_includes_equality(dtype: Any) -> None:
    found = pair_step(5.0, dtype, w=[[2.0, 0.0], [0.0, 0.5]], v=[[3.0, 4.0], [6.0, 8.0]])
    np.testing.assert_array_equal(found["down"]["kernel"], jnp.array([[0, 0], [3, 4]], dtype))
    np.testing.assert_array_equal(found["up"]["kernel"], jnp.eye(2, dtype=dtype))
    np.testing.assert_array_equal(found["up"]["bias"], jnp.array([0.5, 4], dtype))


def test_without_decay_weights_are_normalised_all_the_same() -> None:
    found = pair_step(0.0, w=[[3.0, 0.0], [4.0, 2.0]], v=[[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(found["up"]["kernel"], [[0.6, 0], [0.8, 1]], rtol=1e-6)
    np.testing.assert_array_equal(found["down"]["kernel"], [[3, 4], [0, 0]])


@pytest.mark.parametrize("sick", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("layer", ["layer_2", "layer_3"])
def test_sick_weights_are_left_alone_and_nothing_is_balanced(layer: str, sick: float) -> None:
    params = jax.tree.map(np.float32, network(0))
    zeros = jax.tree.map(np.zeros_like, params)
    zeros[layer]["kernel"][1, 2] = sick
    tx = optax_spd.path_prox(0.5, 1.0, PAIRS)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    found = jax.tree.map(np.add, params, jax.device_get(updates))
    expected = [[np.float64(x) for x in pair] for pair in listed(params)]
    numpy_step(expected, 0.5, balance=False)
    # Of the pair in the middle: the unit's incoming weights and bias, or its outgoing weights.
    stepped = jax.tree.map(np.add, params, zeros)
    if layer == "layer_2":
        expected[1][0][:, 2] = stepped[layer]["kernel"][:, 2]
        expected[1][1][2] = stepped[layer]["bias"][2]
    else:
        expected[1][2][1] = stepped[layer]["kernel"][1]
    for pair, arrays in zip(listed(found), expected, strict=True):
        for x, y in zip(pair, arrays, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_arrays_of_no_pair_keep_their_update_and_bias_of_the_last_layer_too() -> None:
    params = network(0) | {"head": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}}
    tx = optax_spd.path_prox(0.1, 1.0, PAIRS[:1])
    updates, _ = tx.update(params, tx.init(params), params)
    for layer in ("layer_2", "layer_3", "head"):
        for key in params[layer]:
            assert updates[layer][key] is params[layer][key]
    np.testing.assert_allclose(updates["layer_1"]["bias"], params["layer_1"]["bias"], rtol=1e-6)


# Errors ------------------------------------------------------------------------------------------


def test_arrays_that_shard_map_splits_are_refused() -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    params = {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 4))}
    tx = optax_spd.path_prox(0.1, 1.0, [("a", "b")])
    step = lambda params: tx.update(params, tx.init(params), params)[0]
    for specs in ({"a": P("x"), "b": P()}, {"a": P(), "b": P(None, "x")}):
        split = jax.shard_map(step, mesh=mesh, in_specs=(specs,), out_specs=specs)
        with pytest.raises(ValueError, match=r"needs whole arrays, but shard_map splits '[ab]'"):
            jax.eval_shape(split, params)
    whole = jax.shard_map(step, mesh=mesh, in_specs=(P(),), out_specs=P())
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, jax.jit(whole)(params), jax.jit(step)(params))


@pytest.mark.parametrize("gap", [None, optax.MaskedNode()])
def test_a_pair_is_trained_as_a_whole_or_not_at_all(gap: Any) -> None:
    params = {"a": np.ones((4, 2)), "b": np.ones((2, 4)), "c": np.ones(3)}
    tx = optax_spd.path_prox(0.1, 1.0, [("a", "b")])
    state = tx.init(params)
    with pytest.raises(ValueError, match="at 'b', which is in pairs=, while other arrays"):
        tx.update(params | {"b": gap}, state, params)
    updates, _ = tx.update(params | {"a": gap, "b": gap}, state, params)
    assert updates == {"a": gap, "b": gap, "c": params["c"]}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be finite and at least 0"),
        ({"balance": 1}, TypeError, "balance must be True or False"),
        ({"regularize_bias": None}, TypeError, "regularize_bias must be True or False"),
        ({"pairs": []}, ValueError, "pairs is empty"),
    ],
)
def test_wrong_arguments_are_refused(change: Any, error: type[Exception], message: str) -> None:
    arguments = {"learning_rate": 0.1, "weight_decay": 1.0, "pairs": [("a", "b")]} | change
    with pytest.raises(error, match=message):
        optax_spd.path_prox(**arguments)
