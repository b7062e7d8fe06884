"""The TempBalance stage: the original's learning rates, and how it sits in a training run."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tempbalance_golden as golden

import optax_spd
from optax_spd.layers import trees


def scales(tx: optax.GradientTransformation, params: Any) -> Any:
    """What the first update of ones is multiplied by."""
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(tx.update)(ones, tx.init(params), params)
    return jax.device_get(updates)


def assert_scales(tree: Any, parameters: list[str], expected: Any, tolerance: float) -> None:
    for parameter, value in zip(parameters, expected, strict=True):
        np.testing.assert_allclose(
            golden.at(tree, parameter), value, rtol=0, atol=tolerance, err_msg=parameter
        )


# The original's numbers ---------------------------------------------------------------------------

ASSIGN = {"tb_linear_map": "linear", "tb_sqrt": "sqrt", "tb_log2": "log2", "tb_step": "step"}


def follows_in(case: dict[str, Any]) -> Any:
    """Which layer a normalisation follows, as the case's settings have it."""
    settings = case["settings"]

    def follows(module: str) -> str:
        if settings.get("batchnorm", True) and module.startswith("bn"):
            # By name, and in this network by order too.
            return module.replace("bn", "conv")
        if settings.get("layernorm", False) and module.startswith("ln"):
            return module.replace("ln", "fc")
        return module

    return follows


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", golden.cases("param_groups"), ids=lambda c: c["name"])
def test_parameter_groups_of_the_original(case: dict[str, Any]) -> None:
    settings = case["settings"]
    parameters = [name for group in case["groups"] for name in group["params"]]
    params = golden.tree("net_vision", parameters)
    tx = optax_spd.temp_balance(
        fit=settings.get("pl_fitting", "median"),
        assign=ASSIGN[settings["assign_func"]],
        min_eigenvalues=settings.get("eigs_thresh", 50),
        skip_first=settings.get("remove_first_layer", True),
        skip_last=settings.get("remove_last_layer", True),
        follows=follows_in(case),
    )
    updates = scales(tx, params)
    for rates, base in (("lr_init", "untuned_lr"), ("lr_after_step", "untuned_lr_step")):
        expected = [
            rate / case[base]
            for rate, group in zip(golden.array(case["name"], rates), case["groups"], strict=True)
            for _ in group["params"]
        ]
        assert len(set(np.round(expected, 9))) > 3, "the case should tell layers apart"
        assert_scales(updates, parameters, expected, 1e-9)


WITHIN = {"schedule_func": {"sigmoid": "sigmoid", "linear_map": "linear", "rank": "step"}}
BODY = optax_spd.path_mask("^roberta/encoder")


def balanced(case: dict[str, Any], **changes: Any) -> optax.GradientTransformation:
    """The case's spectra and numbers, with the rule for learning rates to be filled in."""
    settings = case["settings"]
    arguments = {
        "xmin_pos": settings["xmin_pos"],
        "min_scale": settings["lr_min_ratio"],
        "max_scale": settings["lr_min_ratio"] + settings["lr_slope"],
        "sigmoid_min": settings["sigmoid_min"],
        "sigmoid_max": settings["sigmoid_max"],
        "temperature": settings["exp_temp"],
        # The classifier's first layer is left out for being last; embeddings are no linear layer.
        "mask": optax_spd.path_mask("^roberta/encoder", "^classifier/dense")
        if settings["remove_last_layer"] == "False"
        else BODY,
    }
    return optax_spd.temp_balance(**(arguments | changes))


def follows_dense(module: str) -> str:
    return module.replace("LayerNorm", "dense")


def trainer(case: dict[str, Any]) -> optax.GradientTransformation:
    """The stage, or chain of stages, that a setting of the RoBERTa trainer comes to."""
    settings = case["settings"]
    rule = WITHIN["schedule_func"][settings["schedule_func"]]
    if settings["temp_balance_lr"] == "tb_std_sigmoid":
        return balanced(case, assign="sigmoid", follows=follows_dense)
    if settings["tb_unit"] == "layer":  # a linear map inside of each block, around the block's rate
        inside = [
            balanced(
                case,
                assign="linear",
                follows=follows_dense,
                mask=optax_spd.path_mask(f"layer/{i}/"),
            )
            for i in range(3)
        ]
        return optax.chain(balanced(case, unit="block", assign=rule), *inside)
    return balanced(
        case, unit="block", assign=rule, normalize=settings["tb_lr_normalize"] == "True"
    )


BY_ALPHA = [
    case
    for case in golden.cases("block_trainer")
    if case["name"] not in ("net_bert/sliding_window", "net_bert/layer_groups")
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", BY_ALPHA, ids=lambda c: c["name"])
def test_block_trainer_of_the_original(case: dict[str, Any]) -> None:
    params = golden.tree("net_bert", case["param_order"])
    tx = trainer(case)
    updates = scales(tx, params)
    expected = golden.array(case["name"], "param_lr") / case["untuned_lr"]
    assert len(set(np.round(expected, 9))) > 2, "the case should tell blocks apart"
    assert_scales(updates, case["param_order"], expected, 1e-9)


# In a training run ------------------------------------------------------------------------------


def weights(seed: int = 0) -> Any:
    """Three small modules with different spectra, and normalisation."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        f"layer_{i}": {
            "bias": jnp.ones(6),
            "kernel": jax.random.normal(key, (6, 5)) * jnp.geomspace(1, 2.0**i, 5),
            "norm": {"scale": jnp.ones(6)},
        }
        for i, key in enumerate(keys)
    }


PARAMS = weights()
ONES = jax.tree.map(jnp.ones_like, PARAMS)
NAMES = optax_spd.layer_names(PARAMS)
STAGE = optax_spd.temp_balance(every=3, min_eigenvalues=5)
STEP = jax.jit(STAGE.update)


def expected(params: Any, **options: Any) -> dict[str, float]:
    """The factors by name, from the pure functions."""
    alpha = [optax_spd.power_law_alpha(params[name]["kernel"]) for name in params]
    factors = optax_spd.balance_scales(jnp.stack(alpha), **options)
    made = dict.fromkeys(NAMES, 1.0)
    for name, factor in zip(params, factors, strict=True):
        made[f"{name}/kernel"] = made[f"{name}/bias"] = float(factor)
    return made


def named(state: Any) -> dict[str, float]:
    found = optax.tree.get(state, "temp_balance_scale")
    return dict(zip(NAMES, found.tolist(), strict=True))


def test_updates_are_scaled_layer_by_layer_from_the_first_step_on() -> None:
    updates, state = STEP(ONES, STAGE.init(PARAMS), PARAMS)
    factors = expected(PARAMS)
    assert sorted(set(factors.values()))[0] == 0.5
    assert len(set(factors.values())) == 4
    assert named(state) == pytest.approx(factors, rel=1e-5)
    flat = trees.flatten(updates)
    for path, leaf in flat.by_path.items():
        np.testing.assert_allclose(leaf, factors["/".join(path)], rtol=1e-5)
    alpha = dict(zip(NAMES, optax.tree.get(state, "temp_balance_alpha").tolist(), strict=True))
    for name, value in alpha.items():
        assert (value > 1) if name.endswith("kernel") else (value == 0)


def run(tx: Any, trees: list[Any]) -> list[dict[str, float]]:
    """The factors after each of several updates, as parameters change between them."""
    step, state, found = jax.jit(tx.update), tx.init(trees[0]), []
    for params in trees:
        _, state = step(ONES, state, params)
        found.append(named(state))
    return found


def test_spectra_are_taken_every_so_many_steps() -> None:
    trees = [weights(seed) for seed in range(7)]
    found = run(STAGE, trees)
    for step, factors in enumerate(found):
        assert factors == pytest.approx(expected(trees[step // 3 * 3]), rel=1e-4)
    assert len({str(factors) for factors in found}) == 3


def test_how_often_and_how_far_may_be_schedules() -> None:
    # Wait one step, then longer and longer: spectra at 0, 1, 3, 7.
    tx = optax_spd.temp_balance(
        every=lambda count: 1 + count // 2,
        min_scale=lambda count: 1.0 / (1 + count),
        max_scale=optax.linear_schedule(1.0, 7.0, 6),
        min_eigenvalues=5,
    )
    trees = [weights(seed) for seed in range(7)]
    taken = [0, 1, 1, 3, 3, 3, 3]
    for factors, at in zip(run(tx, trees), taken, strict=True):
        wanted = expected(trees[at], min_scale=1 / (1 + at), max_scale=1.0 + at)
        assert factors == pytest.approx(wanted, rel=1e-4)


def test_only_the_steps_that_are_due_pay() -> None:
    jaxpr = jax.make_jaxpr(STAGE.update)(ONES, STAGE.init(PARAMS), PARAMS).jaxpr
    (choice,) = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
    names = [str(branch) for branch in choice.params["branches"]]
    assert ["eigh" in text for text in names] == [False, True]
    rest = "\n".join(str(e) for e in jaxpr.eqns if e is not choice)
    assert "eigh" not in rest
    assert "dot_general" not in rest


def test_a_nan_in_one_layer_reaches_no_other() -> None:
    broken = PARAMS | {
        "layer_1": PARAMS["layer_1"] | {"kernel": PARAMS["layer_1"]["kernel"].at[0, 0].set(jnp.nan)}
    }
    updates, state = STEP(ONES, STAGE.init(PARAMS), broken)
    others = expected({name: PARAMS[name] for name in ("layer_0", "layer_2")})
    assert named(state) == pytest.approx(others, rel=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    assert np.isfinite(optax.tree.get(state, "temp_balance_alpha")).all()


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_sharded_stack_is_gathered_a_few_layers_at_a_time(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compiled and not run: the loop's collectives on eight virtual devices that share two cores can
    # wait for each other forever.
    monkeypatch.setattr("optax_spd.methods.temp_balance.spectra.BATCH_BYTES", 2**18)
    P, axis = jax.sharding.PartitionSpec, getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis,))
    tx = optax_spd.temp_balance(layers=optax_spd.stacked("w", 1))
    with jax.set_mesh(mesh):
        sharding = jax.sharding.NamedSharding(mesh, P(None, None, "x"))
        params = {"w": jax.device_put(jnp.ones((64, 12, 128)), sharding)}
        step = jax.jit(tx.update).lower(params, tx.init(params), params).compile()
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", step.as_text())
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in gathered]
    assert max(sizes, default=0) < params["w"].size / 2, gathered


def test_a_tree_without_weights_that_count_passes_through() -> None:
    params = {"a": jnp.ones((4, 4)), "b": jnp.ones(3)}
    tx = optax_spd.temp_balance()
    updates, state = tx.update(params, tx.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, params)
    assert state.count == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fit": "hill"}, ValueError, "fit must be one of"),
        ({"assign": "cosine"}, ValueError, "assign must be one of"),
        ({"unit": "model"}, ValueError, "unit must be one of 'layer', 'block', got 'model'"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"min_scale": 3.0}, ValueError, "min_scale must not exceed max_scale"),
        ({"min_eigenvalues": 0}, ValueError, "min_eigenvalues must be at least 1"),
        ({"min_eigenvalues": lambda _: 9}, TypeError, "min_eigenvalues shapes the program"),
        ({"block": "(", "unit": "block"}, ValueError, "is not valid"),
        ({"block": "layer"}, ValueError, "block='layer' needs unit=\"block\""),
        ({"follows": "norm"}, ValueError, "follows must be a function"),
        ({"follows": str, "unit": "block"}, ValueError, 'for unit="layer" only'),
        ({"skip_last": 1}, TypeError, "skip_last must be True or False"),
        ({"normalize": None}, TypeError, "normalize must be True or False"),
        ({"layers": 3}, TypeError, "layers must be a function"),
    ],
)
def test_bad_arguments(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optax_spd.temp_balance(**options)
