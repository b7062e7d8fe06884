"""The step-time benchmark: what it builds, counts and writes. Never how long anything takes."""

import functools
import json
import math
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_spd
from benchmarks import measuring, step_time, vit


@functools.cache
def small_run(recipe: str, fire: str) -> dict[str, Any]:
    """The JSON of one short run."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "result.json"
        sizes = ["--scale", "small", "--samples", "3", "--steps", "2", "--compilations", "1"]
        step_time.main([*sizes, "--recipe", recipe, "--fire", fire, "--json", str(file)])
        result: dict[str, Any] = json.loads(file.read_text())
    return result


@pytest.mark.parametrize("fire", ["0", "0.5", "1"])
def test_spd_fires_in_the_share_of_layers_asked_for(fire: str) -> None:
    result = small_run("adam_spd", fire)
    assert result["optimizers"]["adam_spd"]["share_of_layers_fired"] == float(fire)
    inside = result["optimizers"]["adam_spd"]["share_of_parameters_in_them"]
    assert (inside == float(fire)) if fire in "01" else (0 < inside < 1)


def test_adamw_and_l2_sp_have_no_share() -> None:
    optimizers = small_run("adamw_l2_sp", "0.5")["optimizers"]
    assert {o["share_of_layers_fired"] for o in optimizers.values()} == {None}


@pytest.mark.parametrize("recipe", ["adam_spd", "adamw_l2_sp"])
def test_state_takes_two_moments_and_the_anchor(recipe: str) -> None:
    optimizers = small_run(recipe, "0.5")["optimizers"]
    assert optimizers["adamw"]["state_bytes_per_parameter"] == 8
    assert optimizers[recipe]["state_bytes_per_parameter"] == 12


def test_other_state_is_two_counts_and_one_ratio_per_layer() -> None:
    result = small_run("adam_spd", "0.5")
    assert result["optimizers"]["adamw"]["state_bytes_other"] == 4
    assert result["optimizers"]["adam_spd"]["state_bytes_other"] == 8 + 4 * result["tree"]["arrays"]


def test_json_holds_everything_and_is_consistent() -> None:
    result = small_run("adam_spd", "0.5")
    assert result["environment"]["jax"] == jax.__version__
    assert result["environment"]["optax_spd"] == optax_spd.__version__
    assert result["environment"]["cores"] >= 1
    expected = {"recipe": "adam_spd", "scale": "small", "fire": 0.5}
    assert result["settings"] == expected | {"samples": 3, "steps": 2, "compilations": 1}
    assert result["tree"]["arrays"] == 20
    assert list(result["optimizers"]) == ["adamw", "adam_spd"]
    for optimizer in result["optimizers"].values():
        step = optimizer["step_seconds"]
        assert 0 < step["lower_quartile"] <= step["median"] <= step["upper_quartile"]
        assert optimizer["compile_seconds"] > 0
        assert optimizer["trace_seconds"] > 0
        assert optimizer["temporary_bytes"] >= 0
    assert result["time_ratio"]["median"] > 0
    limit = {"second_pass_from_memory": 12 / 7, "second_pass_from_cache": 8 / 7}
    assert result["limit_ratio"] == pytest.approx(limit)


def test_table_shows_the_numbers_of_the_json() -> None:
    result = small_run("adam_spd", "0.5")
    text = step_time.table(result)
    lines = {line[:36].strip(): line[36:].split() for line in text.splitlines()}
    assert lines["state [bytes/parameter]"] == ["8.000", "12.000"]
    assert lines["to move [bytes/parameter]"] == ["28", "32-48"]
    assert lines["layers that fired"] == ["-", "50.0%"]
    assert f"jax {jax.__version__}" in text
    assert "20 arrays" in text
    assert "1.71 (1.14" in text


def test_table_says_unknown_where_the_backend_does_not_tell() -> None:
    result = json.loads(json.dumps(small_run("adam_spd", "0.5")))
    for optimizer in result["optimizers"].values():
        optimizer["temporary_bytes"] = None
    assert "unknown" in step_time.table(result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fire", "1.5"], "a share lies between 0 and 1, got 1.5"),
        (["--fire", "nan"], "a share lies between 0 and 1, got nan"),
        (["--fire", "half"], "invalid share value: 'half'"),
        (["--samples", "0"], "at least 1 is needed, got 0"),
        (["--steps", "-1"], "at least 1 is needed, got -1"),
        (["--recipe", "sgd"], "adamw_l2_sp"),
        (["--scale", "huge"], "vit-b16"),
        (["--json", "no/such/folder/file.json"], "there is no folder 'no/such/folder'"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        step_time.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_default_tree_is_vit_b16() -> None:
    shapes = jax.tree.leaves(vit.vit_shapes(vit.SCALES["vit-b16"]), is_leaf=vit.is_shape)
    assert len(shapes) == 152
    # 86,567,656: what the literature gives as 86 M, with the head for 1000 classes.
    assert sum(math.prod(shape) for shape in shapes) == 86_567_656


def test_trees_agree_and_are_float32() -> None:
    trees = vit.make_trees(vit.SCALES["small"], 0.5)
    assert len({jax.tree.structure(tree) for tree in trees}) == 1
    for leaves in zip(*map(jax.tree.leaves, trees), strict=True):
        assert len({leaf.shape for leaf in leaves}) == 1
        assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}


def test_steps_donate_parameters_and_state() -> None:
    anchor, params, grads = vit.make_trees(vit.Scale(8, 16, 0, 2, 5, 3), 0.5)
    candidate = measuring.make_candidate(optax_spd.adam_spd(1e-3), anchor, params)
    # Each step writes spd_ratio and none reads it, so jit drops it from the arguments.
    unread = optax.tree_utils.tree_get(candidate.state, "spd_ratio")
    given = [x for x in jax.tree.leaves((candidate.params, candidate.state)) if x is not unread]
    grads = jax.tree.map(jnp.array, grads)
    measuring.compile_step(candidate, grads)
    measuring.take_steps(candidate, 1, grads)
    assert all(leaf.is_deleted() for leaf in given)


def test_a_buffer_held_twice_counts_once() -> None:
    params = {"kernel": jnp.ones((4, 4))}
    candidate = measuring.make_candidate(optax.adam(1e-3), params, params)
    adam, rest = candidate.state
    candidate.state = (adam._replace(nu=adam.mu), rest)
    assert measuring.state_bytes(candidate) == (4 * 16, 4)
