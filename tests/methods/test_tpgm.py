"""TPGM against the original implementation, call by call, and against NumPy."""

import functools
from typing import Any, NamedTuple

import ball_oracles
import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tpgm_steps import LAYERS, SHAPES, arrays, assert_close, projects_only, radii_of, stepper

import optax_spd

CASES = golden.settings("tpgm")
# PyTorch keeps output units on the first axis.
TORCH_LAYOUT = optax_spd.outputs(".*", 0)
Params = dict[str, jax.Array]


def network(model: str, activation: Any, params: Params, x: jax.Array) -> jax.Array:
    """The networks of the recorded runs, in PyTorch's layouts."""
    linear = lambda name, x: x @ params[f"{name}.weight"].T + params[f"{name}.bias"]
    if model == "mlp":
        return linear("head", activation(linear("fc2", activation(linear("fc1", x)))))
    hidden = jax.lax.conv_general_dilated(x, params["conv.weight"], (1, 1), "VALID")
    hidden = activation(hidden + params["conv.bias"][:, None, None])
    return linear("head", hidden.reshape(len(x), -1))


def loss_of(model: str, act: str) -> Any:
    activation = {"tanh": jnp.tanh, "relu": jax.nn.relu}[act]

    def loss(params: Params, batch: Any) -> jax.Array:
        x, y = batch
        logits = network(model, activation, params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss


class Call(NamedTuple):
    """A projection of fine-tuned weights; without batches it learns nothing."""

    finetuned: Params
    projected: dict[str, np.ndarray]
    radii: dict[str, np.ndarray]
    batches: Any


def load(case: dict[str, Any]) -> tuple[Params, list[Call]]:
    with np.load(golden.DATA / "tpgm.npz") as arrays:
        prefix = f"{case['name']}/"
        data = {k.removeprefix(prefix): arrays[k] for k in arrays.files if k.startswith(prefix)}

    def tensors(start: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(start): v for k, v in data.items() if k.startswith(start)}

    calls = []
    for at in (f"call{call['index']}/" for call in case["calls"]):
        order = data.get(at + "batch_index")
        batches = None if order is None else (data["batches/x"][order], data["batches/y"][order])
        finetuned = jax.tree.map(jnp.asarray, tensors(at + "finetuned/"))
        fields = (tensors(f"{at}{field}/") for field in ("projected", "radius_final"))
        calls.append(Call(finetuned, *fields, batches))
    return jax.tree.map(jnp.asarray, tensors("anchor/")), calls


class Program(NamedTuple):
    """What two cases must have in common, besides shapes, to be the same compiled program."""

    model: str
    act: str
    norm: str
    constrained: tuple[str, ...]


def program_of(case: dict[str, Any]) -> Program:
    return Program(
        model=case["model"]["type"],
        act=case["model"].get("act", "tanh"),
        norm="l2" if "l2" in case["norm_mode"] else "mars",
        constrained=tuple(sorted(case["constrained"])),
    )


@functools.cache
def replayer(program: Program) -> Any:
    """The first state, and a jitted step to a given target; both take the radii's rate."""
    loss = loss_of(program.model, program.act)

    def stage(params: Params, rate: Any) -> optax.GradientTransformationExtraArgs:
        mask = {name: name in program.constrained for name in params}
        return optax_spd.tpgm(optax.adam(rate), norm=program.norm, layers=TORCH_LAYOUT, mask=mask)

    @jax.jit
    def step(params: Params, state: Any, target: Params, batches: Any, rate: Any) -> Any:
        updates = jax.tree.map(jnp.subtract, target, params)
        extra = {} if batches is None else {"validation_fn": loss, "validation_batches": batches}
        updates, state = stage(params, rate).update(updates, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return lambda params, rate: stage(params, rate).init(params), step


@projects_only
@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_replays_the_original(case: dict[str, Any], x64: None) -> None:
    # With x64 for float32 cases too: Optax's bias corrections need it. All arrays stay float32.
    assert_replayed(case, 1e-9 if case["dtype"] == "float64" else 1e-5)


@projects_only
@pytest.mark.parametrize(
    "case", [c for c in CASES if c["dtype"] == "float32"], ids=lambda c: c["name"]
)
def test_replays_float32_without_x64(case: dict[str, Any]) -> None:
    assert_replayed(case, 2e-5)


def assert_replayed(case: dict[str, Any], tolerance: float) -> None:
    """After every call the weights and the radii, to which all inner steps of the call lead."""
    anchor, calls = load(case)
    program = program_of(case)
    names = optax_spd.layer_names(anchor, mask={n: n in program.constrained for n in anchor})
    assert list(program.constrained) == names
    init, step = replayer(program)
    near = functools.partial(np.testing.assert_allclose, rtol=0, atol=tolerance)
    params, state = anchor, init(anchor, case["proj_lr"])
    for call in calls:
        params, state = step(params, state, call.finetuned, call.batches, case["proj_lr"])
        assert {x.dtype for x in (*params.values(), state.tpgm_radii)} == {np.dtype(case["dtype"])}
        for name, expected in call.projected.items():
            near(params[name], expected, err_msg=name)
        near(state.tpgm_radii, [call.radii[name] for name in names])


# Against NumPy, for layers that the original does not know ---------------------------------------


@pytest.mark.parametrize("norm", ["l2", "mars"])
@pytest.mark.parametrize(
    ("layers", "every"), [("per array", 1), ("stacked", 3), ("by module", 2), ("torch", 1)]
)
def test_equals_numpy_for_any_layers(layers: str, norm: str, every: int, x64: None) -> None:
    mask = {path: path != "dense/bias" for path in SHAPES}
    anchor = arrays(0, dtype=np.float64)
    tx = optax_spd.tpgm(optax.sgd(0.02), norm=norm, every=every, layers=LAYERS[layers], mask=mask)
    reference = ball_oracles.Tpgm(anchor, norm, rate=0.02, layers=LAYERS[layers], mask=mask)
    step, params, state = stepper(tx), anchor, tx.init(anchor)
    names = optax_spd.layer_names(anchor, layers=LAYERS[layers], mask=mask)
    for count in range(5):
        updates = arrays(10 + count, scale=0.3, dtype=np.float64)
        batches = arrays(20 + count, 3, dtype=np.float64)
        learns = count % every == 0
        expected = reference.step(params, updates, batches if learns else None)
        params, state = step(params, state, updates, batches)
        assert_close(params, expected, atol=1e-12)
        assert list(reference.radii) == names
        np.testing.assert_allclose(radii_of(state), list(reference.radii.values()), atol=1e-12)
        assert not np.allclose(params["dense/kernel"], anchor["dense/kernel"])
    assert state.count == 5


# Without validation data -------------------------------------------------------------------------


@projects_only
@pytest.mark.parametrize("norm", ["l2", "mars"])
@pytest.mark.parametrize("layers", ["per array", "by module"])
def test_without_validation_radii_start_at_half_the_first_step_and_never_grow(
    layers: str, norm: str
) -> None:
    anchor = arrays(0)
    tx = optax_spd.tpgm(norm=norm, layers=LAYERS[layers])
    reference = ball_oracles.Tpgm(anchor, norm, rate=0.0, layers=LAYERS[layers])
    step, params, state, last = stepper(tx), anchor, tx.init(anchor), np.inf
    for count, scale in enumerate((1.0, 3.0, 0.05, 3.0)):
        updates = arrays(10 + count, scale=scale)
        expected = reference.step(params, updates)
        params, state = step(params, state, updates)
        assert_close(params, expected, atol=1e-5)
        np.testing.assert_allclose(radii_of(state), list(reference.radii.values()), rtol=1e-4)
        assert np.all(radii_of(state) <= last)
        last = radii_of(state)


@pytest.mark.parametrize(
    "tx",
    [optax_spd.tpgm(), optax.MultiSteps(optax_spd.adam_tpgm(0.1, every=2), 2)],
    ids=["stage", "accumulated recipe"],
)
def test_a_run_without_validation_data_and_radii_warns_once_a_trace(tx: Any) -> None:
    params = arrays(0)
    state, step = tx.init(params), stepper(tx)
    with pytest.warns(UserWarning, match=r"Pass validation_fn= and.*tpgm\(radii=") as found:
        jax.eval_shape(tx.update, params, state, params)  # here, where the caller is
    assert {warning.filename for warning in found} == {__file__}
    with pytest.warns(UserWarning, match="learns no radii"):
        step(params, state, params)
    step(params, state, params)  # is not traced again


def test_nothing_warns_where_radii_are_given_learned_or_not_needed() -> None:
    """Warnings are errors in these tests."""
    params, batches = arrays(0), arrays(1, 2)
    for tx, data in (
        (optax_spd.tpgm(radii=0.5), None),
        (optax_spd.tpgm(every=3), batches),
        (optax_spd.adam_tpgm(0.1), batches),
    ):
        jax.eval_shape(stepper(tx), params, tx.init(params), params, batches=data)
    # Of a partition one part may hold no layer.
    rest, tx = {"count": jnp.arange(3), "none": None}, optax_spd.tpgm()
    tx.update(rest, tx.init(rest), rest)


VECTOR = np.array([0.5, np.inf, 0.0, 0.1, 2.0])


@pytest.mark.parametrize("norm", ["l2", "mars"])
@pytest.mark.parametrize("radii", [0.4, VECTOR], ids=["scalar", "vector"])
def test_given_radii_stay_and_the_step_is_project(radii: Any, norm: str) -> None:
    anchor = arrays(0)
    tx = optax_spd.tpgm(norm=norm, radii=radii)
    step, params, state = stepper(tx), anchor, tx.init(anchor)
    project = jax.jit(optax_spd.project, static_argnames="norm")
    for count, scale in enumerate((0.0, 1.0, 0.05, 3.0)):  # also before anything has moved
        updates = arrays(10 + count, scale=scale)
        tentative = jax.tree.map(np.add, params, updates)
        params, state = step(params, state, updates)
        np.testing.assert_array_equal(radii_of(state), np.broadcast_to(np.float32(radii), 5))
        assert_close(params, project(tentative, anchor, radii, norm=norm))


@pytest.mark.parametrize("norm", ["l2", "mars"])
def test_given_radii_are_where_learning_starts_once_the_array_moves(norm: str) -> None:
    """A warm-up whose first rate is 0 must not clip them to the size of no step."""
    params = {"a": jnp.zeros(2)}
    tx = optax_spd.tpgm(optax.sgd(0.0), norm=norm, radii=0.5)
    extra = {
        "validation_fn": lambda params, batch: jnp.sum((params["a"] - batch) ** 2),
        "validation_batches": jnp.ones((2, 2)),
    }
    state = tx.init(params)
    updates, state = tx.update({"a": jnp.zeros(2)}, state, params, **extra)
    np.testing.assert_array_equal(updates["a"], 0)
    np.testing.assert_array_equal(state.tpgm_radii, 0)
    _, clipped = tx.update({"a": jnp.array([0.1, 0.0])}, state, params, **extra)
    np.testing.assert_allclose(clipped.tpgm_radii, 0.1)
    updates, state = tx.update({"a": jnp.array([3.0, 4.0])}, state, params, **extra)
    np.testing.assert_allclose(state.tpgm_radii, 0.5)
    size = {"l2": jnp.linalg.norm, "mars": lambda x: jnp.sum(jnp.abs(x))}[norm]
    np.testing.assert_allclose(size(updates["a"]), 0.5, rtol=1e-6)


def test_the_state_does_not_alias_the_given_radii() -> None:
    # Else a step that donates its state deletes the caller's array.
    radii = jnp.asarray(VECTOR, jnp.float32)
    tx = optax_spd.tpgm(radii=radii)
    params = jax.tree.map(jnp.asarray, arrays(0))
    stepper(tx, donate_argnums=(0, 1))(params, tx.init(params), arrays(1))
    np.testing.assert_array_equal(radii, np.float32(VECTOR))
    np.testing.assert_array_equal(tx.init(arrays(0)).tpgm_radii, np.float32(VECTOR))


# An array that has not moved ---------------------------------------------------------------------


@projects_only
@pytest.mark.parametrize("norm", ["l2", "mars"])
@pytest.mark.parametrize("learns", [True, False], ids=["learning", "projection only"])
def test_an_array_that_has_not_moved_stays_and_can_leave_later(learns: bool, norm: str) -> None:
    anchor, batches = arrays(0), arrays(2, 3) if learns else None
    still = optax_spd.layer_names(anchor).index("dense/kernel")
    tx = optax_spd.tpgm(optax.sgd(0.0), norm=norm)  # so that each radius stays where it starts
    step, params, state = stepper(tx), anchor, tx.init(anchor)
    for count in range(2):
        updates = arrays(10 + count) | {"dense/kernel": np.zeros((3, 4), np.float32)}
        params, state = step(params, state, updates, batches)
        np.testing.assert_array_equal(params["dense/kernel"], anchor["dense/kernel"])
        np.testing.assert_array_equal(radii_of(state) == 0, np.arange(5) == still)
    params, state = step(params, state, arrays(12), batches)
    ball = ball_oracles.Balls({"dense/kernel": arrays(12)["dense/kernel"]}, norm)
    half = ball.half_smallest("dense/kernel")
    np.testing.assert_allclose(radii_of(state)[still], half, rtol=1e-5)
    assert np.max(np.abs(params["dense/kernel"] - anchor["dense/kernel"])) > 0.01
