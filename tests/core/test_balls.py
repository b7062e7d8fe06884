"""Norms of deviations, and the factor that takes a row into its ball."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_spd.core import balls
from optax_spd.layers import plans, trees


def test_the_factor_has_no_slope_where_it_is_clipped() -> None:
    """Not even at the ends, where jnp.clip's slope is 1/2."""
    radii = jnp.array([-1.0, 0.0, 0.25, 1.0, 2.0, jnp.inf])
    one = jnp.ones(())
    np.testing.assert_array_equal(balls.ball_factor(radii, one), [0, 0, 0.25, 1, 1, 1])
    slopes = [jax.vmap(jax.grad(balls.ball_factor, i), (0, None))(radii, one) for i in (0, 1)]
    np.testing.assert_array_equal(slopes[0], [0, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(slopes[1], [0, 0, -0.25, 0, 0, 0])


def test_norms_of_several_trees_are_measured_together() -> None:
    arrays = {"a": jnp.array([[3.0, 0.0], [4.0, -1.0]]), "b": jnp.array([-2.0, 2.0]), "n": None}
    flat = trees.flatten(arrays)
    plan = plans.plan_layers(flat)
    leaves = [None if trees.is_missing(x) else x for x in flat.leaves]
    double = [None if x is None else 2 * x for x in leaves]
    mars, twice = balls.ball_norms("mars", plan, None, leaves, double)
    np.testing.assert_array_equal(mars.smallest, [1.0, 4.0])
    np.testing.assert_array_equal(mars.largest, [7.0, 4.0])
    np.testing.assert_array_equal(twice.largest, [14.0, 8.0])
    assert mars.rows[2] is None
    (l2,) = balls.ball_norms("l2", plan, None, leaves)
    expected = [np.sqrt(26), np.sqrt(8)]
    np.testing.assert_allclose([l2.smallest, l2.largest], [expected] * 2, rtol=1e-6)


@pytest.mark.parametrize(("norm", "before"), [("l2", 5.0), ("mars", 7.0)])
def test_the_slope_is_along_the_previous_deviation(norm: str, before: float, x64: None) -> None:
    plan = plans.plan_layers(trees.flatten([jnp.zeros(2)]))
    previous, current, grads = ([jnp.array(x)] for x in ([3.0, 4.0], [1.0, 0.0], [2.0, 1.0]))
    norms, slope = balls.norms_and_slope(norm, plan, None, previous, current, grads)
    np.testing.assert_allclose(norms.largest, [1.0])
    np.testing.assert_allclose(slope, [10.0 / (before + 1e-8)], rtol=1e-14)


@pytest.mark.parametrize("radii", [-1.0, np.nan, -np.inf, [1.0, -1e-9], [1.0, np.nan]], ids=repr)
def test_radii_that_are_negative_or_nan_are_refused(radii: Any) -> None:
    for given in (radii, jnp.asarray(radii)):
        with pytest.raises(ValueError, match="radii must not be negative or NaN, got"):
            balls.check_radii(given)
    balls.check_radii(np.abs(np.nan_to_num(radii)))
    jax.jit(balls.check_radii)(np.asarray(radii))  # a tracer is not looked at
    for wrong in ("1", None, 1j, {"a": 1.0}, True):
        with pytest.raises(TypeError, match="radii"):
            balls.check_radii(wrong)
