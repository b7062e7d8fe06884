"""Optax's own tests - for contributed optimizers, sharding and float64 - on our optimizers."""

import functools
import unittest
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax_suite
import pytest
from contract_methods import METHODS
from tpgm_steps import projects_only

import optax_spd

pytestmark = projects_only  # the suites know no validation data

CONTRIB = "optax.contrib._common_test"
SHARDING = "optax._src.sharding_test"
FLOAT64 = "optax._src.float64_test"


# The factories annotate learning_rate as Optax does: only then does its suite try a schedule.
def tpgm_in_fixed_balls(learning_rate: optax.ScalarOrSchedule, radii: float = 20.0) -> Any:
    return optax_spd.chain(optax.adam(learning_rate), optax_spd.tpgm(radii=radii))


def nothing(params: Any) -> Any:
    """A mask; the suite's parameters have no embedding, and all of them must reach its target."""
    return jax.tree.map(lambda _: False, params)


def sgd_freeze_embed(learning_rate: optax.ScalarOrSchedule, momentum: float = 0.9) -> Any:
    return optax_spd.sgd_freeze_embed(learning_rate, momentum, embedding=nothing)


def frozen_adam_spd(learning_rate: optax.ScalarOrSchedule, weight_decay: float = 1.0) -> Any:
    return optax_spd.with_frozen(
        optax_spd.adam_spd(learning_rate, weight_decay=weight_decay), nothing
    )


def balanced_layerwise_adam(learning_rate: optax.ScalarOrSchedule, decay: float = 0.5) -> Any:
    return optax.chain(
        optax.adam(learning_rate),
        optax_spd.temp_balance(min_eigenvalues=1),
        optax_spd.layerwise_lr_decay(decay, lambda name: float(name.endswith("1"))),
    )


# One row per optimizer: a name for the test class, the maker and its arguments. The suite
# minimizes four functions in 30,000 steps, to 3e-2: the rates must allow that. adam_tpgm cannot:
# without validation data its radii never grow, so it is only in the other tables.
CONTRIB_TABLE = {
    "adam_spd": (optax_spd.adam_spd, {"learning_rate": 1e-2, "weight_decay": 1.5}),
    "adamw_l2_sp": (optax_spd.adamw_l2_sp, {"learning_rate": 1e-2, "weight_decay": 1e-4}),
    "adam_ftp": (optax_spd.adam_ftp, {"learning_rate": 1e-2, "k": 0.5}),
    "sgd_ftp_l2": (optax_spd.sgd_ftp, {"learning_rate": 1e-3, "momentum": 0.9, "norm": "l2"}),
    "tpgm_in_fixed_balls": (tpgm_in_fixed_balls, {"learning_rate": 1e-2}),
    "sgd_freeze_embed": (sgd_freeze_embed, {"learning_rate": 1e-3}),
    "adamp": (optax_spd.adamp, {"learning_rate": 1e-2, "nesterov": True}),
    "sgdp": (optax_spd.sgdp, {"learning_rate": 1e-3, "momentum": 0.9, "nesterov": True}),
    "sgd_fednar": (
        optax_spd.sgd_fednar,
        {"learning_rate": 1e-3, "weight_decay": 0.0, "max_norm": 1e3},
    ),
    "balanced_layerwise_adam": (balanced_layerwise_adam, {"learning_rate": 1e-2}),
}

# The lines of the contract suite whose arguments name no arrays of its model, on the parameters of
# Optax's other suites, whose matrices are small.
NAMES_ARRAYS = (
    "with_frozen", "adam_spd, masked", "layerwise_lr_decay", "path_prox", "sgd_freeze_embed",
)  # fmt: skip
LINES = {name: m for name, m in METHODS.items() if name not in NAMES_ARRAYS}


def optimizer_of(name: str, **options: Any) -> Any:
    return METHODS[name].optimizer(min_eigenvalues=1, **options)


SPLIT_AXIS = optax_spd.stacked("", axis=1)
SHARDING_TABLE = {
    **{name: optimizer_of(name) for name in LINES},
    "adam_spd, bfloat16 anchor": optimizer_of("adam_spd", anchor_dtype=jnp.bfloat16),
    "adam_spd, from zero": optimizer_of("adam_spd", anchor="zero"),
    "adam_spd, stacked": optimizer_of("adam_spd", layers=optax_spd.stacked("", axis=0)),
    "adam_spd, stacked axis is sharded": optimizer_of("adam_spd", layers=SPLIT_AXIS),
    "adam_tpgm, stacked": optimizer_of("adam_tpgm", layers=optax_spd.stacked("", axis=0)),
    "sgd_ftp, stacked axis is sharded": optimizer_of("sgd_ftp", layers=SPLIT_AXIS),
    "sgd_freeze_embed": sgd_freeze_embed(1.0),
    "frozen_adam_spd": frozen_adam_spd(1.0),
    "layerwise_lr_decay, stacked axis is sharded": optax_spd.layerwise_lr_decay(
        0.5, r"\[(\d+)\]$", layers=SPLIT_AXIS
    ),
}


def falling(value: float) -> Any:
    return lambda count: value / (1 + count)


FLOAT64_TABLE = [
    *((name, functools.partial(optimizer_of, name), {}) for name in LINES),
    *(
        (
            f"{name}, schedules",
            functools.partial(optimizer_of, name),
            {number: falling(value) for number, value in method.numbers.items()},
        )
        for name, method in LINES.items()
        if method.numbers
    ),
    ("adam_spd, by module", optimizer_of, {"name": "adam_spd", "layers": lambda *_: ONE}),
    ("adam_spd, bfloat16 anchor", optimizer_of, {"name": "adam_spd", "anchor_dtype": "bfloat16"}),
    ("adam_spd, from zero", optimizer_of, {"name": "adam_spd", "anchor": "zero"}),
    ("sgd_freeze_embed", sgd_freeze_embed, {"learning_rate": falling(0.1)}),
    ("frozen_adam_spd", frozen_adam_spd, {"learning_rate": 0.1}),
    (
        "layerwise_lr_decay",
        optax_spd.layerwise_lr_decay,
        {"decay": 0.5, "depth": len, "min_scale": falling(0.1)},
    ),
]
ONE = optax_spd.LayerSpec(group="one")


def contrib_suite(label: str) -> Any:
    maker, options = CONTRIB_TABLE[label]
    entry = {"opt_name": label, "opt_kwargs": options, "wrapper_name": None, "wrapper_kwargs": None}
    tables = ("_MAIN_OPTIMIZERS_UNDER_TEST", "_ALL_OPTIMIZERS_UNDER_TEST")
    replaced = dict.fromkeys(tables, (entry,)) | {"_get_opt_factory": lambda name: maker}
    return optax_suite.load(CONTRIB, replaced)


# Kept in a dictionary besides: pytest would collect a class again under a second name.
# One class per optimizer: the suite numbers its cases, and a number says nothing of what failed.
CASES: dict[str, type[unittest.TestCase]] = {
    label: optax_suite.adopt(contrib_suite(label).ContribTest, f"ContribTest_{label}", globals())
    for label in CONTRIB_TABLE
}
CASES[FLOAT64] = optax_suite.adopt(
    optax_suite.load(FLOAT64, {"ALL_MODULES": FLOAT64_TABLE}).Float64Test, "Float64Test", globals()
)
if optax_suite.exists(SHARDING):  # from Optax 0.2.7 on
    CASES[SHARDING] = optax_suite.adopt(
        optax_suite.load(SHARDING, {"OPTIMIZERS": SHARDING_TABLE}).ShardingTest,
        "ShardingTest",
        globals(),
    )


@pytest.mark.parametrize(
    ("suite", "least"),
    [(label, 16) for label in CONTRIB_TABLE]
    + [(FLOAT64, len(FLOAT64_TABLE)), (SHARDING, 3 * len(SHARDING_TABLE))],
)
def test_pytest_collects_the_whole_suite(suite: str, least: int) -> None:
    if suite == SHARDING and not optax_suite.exists(suite):
        assert tuple(map(int, optax.__version__.split(".")[:3])) < (0, 2, 7)
        return
    assert globals()[CASES[suite].__name__] is CASES[suite]
    assert len(unittest.TestLoader().getTestCaseNames(CASES[suite])) >= least


def test_a_suite_that_would_skip_fails() -> None:
    """So that no case above passes by being skipped, for JAX's version or anything else."""

    class Skipping(unittest.TestCase):
        def test_it(self) -> None:
            self.skipTest("some version")

    result = optax_suite.adopt(Skipping, "Adopted", {"__name__": __name__})("test_it").run()
    assert result is not None
    assert not result.skipped
    assert "would skip this test: some version" in result.failures[0][1]
