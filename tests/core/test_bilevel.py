"""TPGM's bi-level step on its own: start, clip, the radii's gradient, and the loop over batches."""

import re
from typing import Any

import ball_oracles
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_spd
from optax_spd.core import balls, bilevel
from optax_spd.layers import plans, trees

both_norms = pytest.mark.parametrize("norm", ["l2", "mars"])
LAYERS: dict[str, Any] = {
    "per array": None,
    "stacked": optax_spd.stacked("^blocks/"),
    "by module": optax_spd.by_module(layers=optax_spd.stacked("^blocks/")),
    "attention": optax_spd.outputs("attention", (1, 2)),
}
SHAPES = {
    "attention/kernel": (3, 2, 2),
    "blocks/bias": (2, 4),
    "blocks/kernel": (2, 3, 4),
    "dense/bias": (3,),
    "dense/kernel": (4, 3),
    "scale": (),
}


def arrays(seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {path: draw.normal(size=shape) for path, shape in SHAPES.items()}


def constraint_of(
    deltas: dict[str, Any], norm: str, layers: Any = None, active: Any = None
) -> bilevel.Constraint:
    flat = trees.flatten(jax.tree.map(jnp.asarray, deltas))
    plan = plans.plan_layers(flat, layers)
    (norms,) = balls.ball_norms(norm, plan, None, flat.leaves)
    active = jnp.isfinite(norms.largest) if active is None else jnp.asarray(active)
    return bilevel.Constraint(plan, flat.leaves, norms, active, None)


# The gradient of the radii -----------------------------------------------------------------------


@both_norms
@pytest.mark.parametrize("layers", LAYERS)
def test_radius_gradient_is_that_of_numpy_and_of_jax(layers: str, norm: str, x64: None) -> None:
    deltas, slopes = arrays(0), arrays(1)
    ball = ball_oracles.Balls(deltas, norm, LAYERS[layers])
    assert list(ball.members) == optax_spd.layer_names(deltas, layers=LAYERS[layers])

    @jax.jit
    def gradients(deltas: Any, slopes: Any, radii: jax.Array) -> Any:
        constraint = constraint_of(deltas, norm, LAYERS[layers])

        def score(radii: jax.Array) -> Any:
            factors = constraint.factors(radii)
            moved = zip(slopes.values(), factors, constraint.deltas, strict=True)
            return sum(jnp.sum(g * f * delta) for g, f, delta in moved)

        return constraint.radius_gradient(radii, list(slopes.values())), jax.grad(score)(radii)

    cut = 0
    for share in (0.1, 0.5, 0.8, 1.3):  # 1.3: all rows are inside their ball
        radii = {name: share * ball.largest(name) for name in ball.members}
        vector = jnp.asarray(list(radii.values()))
        found, by_jax = gradients(deltas, slopes, vector)
        expected = list(ball.radius_gradient(radii, slopes).values())
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(found, by_jax, rtol=1e-12, atol=1e-12)
        cut += int((np.asarray(found) == 0).sum())
    assert cut >= len(ball.members)


@both_norms
def test_no_gradient_flows_where_the_ratio_is_exactly_one(norm: str) -> None:
    # In float32 n + 1e-8 is n for n >= 0.25: a radius of n gives a ratio of exactly 1.
    deltas = {"a": jnp.array([0.5, 0.25]), "b": jnp.array([0.75])}
    constraint = constraint_of(deltas, norm)
    slopes = [jnp.ones(2), jnp.ones(1)]
    at = lambda radii: constraint.radius_gradient(radii, slopes)
    np.testing.assert_array_equal(at(constraint.norms.largest), [0.0, 0.0])
    below = at(jnp.nextafter(constraint.norms.largest, 0.0))
    lengths = [0.75 if norm == "mars" else np.hypot(0.5, 0.25), 0.75]
    np.testing.assert_allclose(below, [0.75 / lengths[0], 1.0], rtol=1e-6)
    # A clip's own derivative there is one half, and no gradient flows above the surface.
    np.testing.assert_array_equal(at(2 * constraint.norms.largest), [0.0, 0.0])


@both_norms
def test_no_gradient_flows_at_radius_zero_or_without_a_deviation(norm: str) -> None:
    constraint = constraint_of({"a": jnp.array([0.5, 0.25]), "b": jnp.zeros(2)}, norm)
    slopes = [jnp.full(2, 3.0), jnp.full(2, 3.0)]
    for radius in (0.0, -1.0):
        gradient = constraint.radius_gradient(jnp.full(2, radius), slopes)
        np.testing.assert_array_equal(gradient, [0.0, 0.0])
    assert constraint.radius_gradient(jnp.full(2, 1e-9), slopes)[0] != 0


def test_half_precision_gradients_are_summed_in_float32() -> None:
    size = 70_001  # more than the largest float16, and no bfloat16
    constraint = constraint_of({"a": jnp.ones(size)}, "mars")
    for dtype in (jnp.bfloat16, jnp.float16):
        gradient = constraint.radius_gradient(jnp.ones(1), [jnp.ones(size, dtype)])
        np.testing.assert_allclose(gradient, [1.0], rtol=1e-6)


# Start and clip ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("radius", "largest", "expected"),
    [
        (0.5, 2.0, 0.5),
        (3.0, 2.0, 2.0),
        (np.inf, 2.0, 2.0),
        (0.0, 2.0, 1e-8),
        (-1.0, 2.0, 1e-8),
        (5e-9, 2.0, 1e-8),
        (0.5, 3e-9, 3e-9),  # the upper end wins
        (0.0, 3e-9, 3e-9),
        (0.5, 0.0, 0.0),
        (0.0, 0.0, 0.0),
    ],
)
def test_clip(radius: float, largest: float, expected: float) -> None:
    constraint = constraint_of({"w": jnp.array([-largest])}, "mars")
    clipped = constraint.clipped(jnp.array([radius]))
    np.testing.assert_array_equal(clipped, np.float32([expected]))


def test_layers_that_are_not_active_keep_their_radii() -> None:
    constraint = constraint_of({"a": jnp.ones(2), "b": jnp.ones(2)}, "l2", active=[True, False])
    np.testing.assert_array_equal(constraint.clipped(jnp.array([9.0, 9.0]))[1], 9.0)
    np.testing.assert_array_equal(constraint.clipped(jnp.array([-1.0, -1.0]))[1], -1.0)
    radii, started = constraint.started(jnp.array([7.0, 7.0]), jnp.array([False, False]))
    np.testing.assert_allclose(radii, [np.sqrt(2) / 2, 7.0], rtol=1e-6)
    np.testing.assert_array_equal(started, [True, False])
    a, b = constraint.factors(jnp.zeros(2))
    np.testing.assert_array_equal(a, np.zeros(1))
    np.testing.assert_array_equal(b, np.ones(1))


def test_a_layer_starts_when_it_moves_and_a_row_need_not() -> None:
    deltas = {"some": jnp.array([[0.0, 3.0]]), "unmoved": jnp.zeros((1, 2))}
    constraint = constraint_of(deltas, "mars")
    radii, started = constraint.started(jnp.zeros(2), jnp.zeros(2, bool))
    np.testing.assert_array_equal(radii, [0.0, 0.0])
    np.testing.assert_array_equal(started, [True, False])
    np.testing.assert_array_equal(constraint.clipped(radii), np.float32([1e-8, 0.0]))


# The loop ----------------------------------------------------------------------------------------


def learn(
    deltas: dict[str, jax.Array],
    batches: Any,
    optimizer: Any,
    radii: Any,
    loss: Any,
    active: Any = None,
) -> bilevel.Learned:
    """The loop with an anchor of zeros; the loss gets a dict."""
    constraint = constraint_of(deltas, "l2", active=active)
    place = lambda factors: [f * d for f, d in zip(factors, deltas.values(), strict=True)]
    loss_fn = lambda leaves, batch: loss(dict(zip(deltas, leaves, strict=True)), batch)
    radii = jnp.asarray(radii, jnp.float32)
    state = optimizer.init(radii)
    return bilevel.learn_radii(constraint, loss_fn, place, batches, optimizer, radii, state)


def distance(params: dict[str, jax.Array], batch: Any) -> Any:
    return sum(jnp.sum((x - batch) ** 2) for x in params.values())


DELTAS = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([-6.0, 8.0])}


def test_losses_are_those_before_each_step_and_the_last_radii_are_clipped() -> None:
    learned = learn(DELTAS, jnp.zeros(2), optax.sgd(1.0), [2.0, 1.0], distance)
    # L = γ_a² + γ_b²: from (2, 1) to (-2, -1), which the next step takes for (1e-8, 1e-8).
    np.testing.assert_allclose(learned.losses, [5.0, 0.0], atol=1e-6)
    np.testing.assert_array_equal(learned.radii, np.float32([1e-8, 1e-8]))
    learned = learn(DELTAS, jnp.array([9.0]), optax.sgd(9.0), [2.0, 1.0], distance)
    np.testing.assert_allclose(learned.radii, [5.0, 10.0])
    # A step starts from clipped radii, also where the optimizer needs no gradient.
    decay = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1))
    learned = learn(DELTAS, jnp.zeros(1), decay, [9.0, 20.0], distance)
    np.testing.assert_allclose(learned.radii, [4.75, 9.5], rtol=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize(
    "loss",
    [
        distance,
        # Its gradient is finite.
        lambda params, batch: distance(params, 0.5) + jnp.where(jnp.isfinite(batch), 0, batch),
    ],
    ids=["gradient too", "loss alone"],
)
def test_a_sick_loss_is_as_if_its_batch_had_not_been(loss: Any, poison: float) -> None:
    batches = np.array([0.5, poison, 1.0, 1.5, poison], np.float32)
    for optimizer in (optax.sgd(0.1, momentum=0.9), optax.adam(0.1)):
        kept = jnp.asarray(batches[np.isfinite(batches)])
        expected = learn(DELTAS, kept, optimizer, [2.0, 3.0], loss)
        found = learn(DELTAS, jnp.asarray(batches), optimizer, [2.0, 3.0], loss)
        np.testing.assert_array_equal(np.isfinite(found.losses), np.isfinite(batches))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
            (found.radii, found.optimizer_state),
            (expected.radii, expected.optimizer_state),
        )
        assert np.max(np.abs(found.radii - np.array([2.0, 3.0]))) > 0.1


def test_a_layer_that_is_not_active_stays_where_it_is_whatever_its_optimizer_does() -> None:
    """A decay or a momentum moves a radius without a gradient."""
    decay = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1, momentum=0.9))
    active = [True, False]
    learned = learn(DELTAS, jnp.ones(3), decay, [2.0, 3.0], distance, active=active)
    assert learned.radii[1] == 3
    assert abs(learned.radii[0] - 2) > 0.1


@jax.custom_vjp
def poisoned(x: jax.Array, poison: jax.Array) -> jax.Array:
    """x itself, with a gradient of ``poison`` where that is not finite."""
    return x


poisoned.defvjp(
    lambda x, poison: (x, poison),
    lambda poison, g: (jnp.where(jnp.isfinite(poison), g, poison), jnp.zeros_like(poison)),
)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, momentum=0.9), optax.adam(0.1)])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_sick_gradient_of_one_layer_stops_that_layer_alone(optimizer: Any, poison: float) -> None:
    def loss(params: dict[str, jax.Array], batch: Any) -> Any:
        return distance(params | {"a": poisoned(params["a"], batch)}, 0.5)

    healthy = learn(DELTAS, jnp.zeros(4), optimizer, [2.0, 3.0], loss)
    sick = learn(DELTAS, jnp.full(4, poison), optimizer, [2.0, 3.0], loss)
    assert np.all(np.isfinite(sick.losses))
    np.testing.assert_array_equal(sick.radii, [2.0, healthy.radii[1]])
    assert abs(healthy.radii[0] - 2.0) > 0.1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(sick.optimizer_state))


def test_a_gradient_whose_square_overflows_or_a_step_that_is_infinite_is_not_taken() -> None:
    huge = lambda params, batch: 1e25 * jnp.sum(params["a"]) + distance(params, batch)
    learned = learn(DELTAS, jnp.ones(3), optax.adam(0.1), [2.0, 3.0], huge)
    assert learned.radii[0] == 2
    assert abs(learned.radii[1] - 3) > 0.1
    assert np.isfinite(learned.optimizer_state[0].nu).all()
    leap = optax.stateless(lambda grads, params: grads * jnp.array([jnp.inf, -0.1]))
    learned = learn(DELTAS, jnp.ones(1), leap, [2.0, 3.0], distance)
    assert learned.radii[0] == 2
    assert learned.radii[1] != 3


def test_the_state_keeps_its_dtypes_where_the_optimizer_widens_them(x64: None) -> None:
    def update(grads: Any, state: Any, params: Any = None) -> Any:
        return -0.1 * grads, state + jnp.float64(1) * grads

    widening = optax.GradientTransformation(jnp.zeros_like, update)
    learned = learn(DELTAS, jnp.ones(3, jnp.float32), widening, [2.0, 3.0], distance)
    assert learned.optimizer_state.dtype == learned.radii.dtype == jnp.float32
    assert np.all(learned.optimizer_state != 0)


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "shown"),
    [
        (jnp.ones((2, 3)), "float32[2, 3]"),
        (jnp.int32(1), "int32[]"),
        (True, "bool"),
        ("0.5", "str"),
        ((1.0, {"accuracy": 0.5}), "accuracy"),
        (None, "None"),
    ],
    ids=repr,
)
def test_a_validation_loss_is_one_real_number(loss: Any, shown: str) -> None:
    with pytest.raises(ValueError, match="validation_fn must return one real number") as error:
        bilevel.scalar_loss(lambda params, batch: loss, {}, None)
    assert shown in str(error.value)
    for fine in (0.5, np.float64(0.5), np.array(0.5), jnp.bfloat16(0.5)):
        assert bilevel.scalar_loss(lambda params, batch, x=fine: x, {}, None) == 0.5


BATCHES_REFUSED: dict[str, tuple[Any, str]] = {
    "unequal": ({"x": np.ones((3, 2)), "y": np.ones(2)}, "leading axes that differ: 3 at 'x', 2"),
    "scalar": ({"x": np.ones((3, 2)), "y": np.float32(1)}, "leading axis.* shape () at 'y'"),
    "number": (1.0, "leading axis.* shape () at the tree itself"),
    "zero length": ((np.ones((0, 2)),), "leading axis.* shape (0, 2) at '0'"),
    "no arrays": ({"x": None, "y": {}}, "validation_batches holds no array"),
    "empty": ((), "validation_batches holds no array"),
}


@pytest.mark.parametrize("kind", BATCHES_REFUSED)
def test_batches_have_one_leading_axis(kind: str) -> None:
    batches, message = BATCHES_REFUSED[kind]
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    with pytest.raises(ValueError, match=pattern):
        bilevel.check_validation(distance, batches)


def test_a_validation_function_is_a_function_and_any_tree_of_arrays_makes_batches() -> None:
    for fine in (np.ones(1), [np.ones((2, 1)), np.arange(2)], {"x": jnp.ones(3), "none": None}):
        bilevel.check_validation(distance, fine)
    for given in (None, 3.0):
        with pytest.raises(TypeError, match="validation_fn must be a function"):
            bilevel.check_validation(given, np.ones(2))


def test_an_optimizer_of_the_radii_is_a_transformation() -> None:
    for wrong in (1e-2, "adam", optax.adam, lambda radii: radii):
        for build in (bilevel.checked_optimizer, optax_spd.tpgm):
            with pytest.raises(TypeError, match="radius_optimizer must be a gradient transf"):
                build(wrong)
    assert bilevel.checked_optimizer(None) is bilevel.DEFAULT_OPTIMIZER
