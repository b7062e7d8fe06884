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
def sgd_spd(learning_rate: optax.ScalarOrSchedule, weight_decay: float = 1.0) -> Any:
    return optax_spd.chain(optax.sgd(learning_rate, momentum=0.9), optax_spd.spd(weight_decay))


def clipped_adam_spd(learning_rate: optax.ScalarOrSchedule, weight_decay: float = 1.0) -> Any:
    return optax_spd.with_gradient(
        optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(learning_rate), optax_spd.spd(weight_decay)
        )
    )


def shared_anchor(learning_rate: optax.ScalarOrSchedule, weight_decay: float = 1e-4) -> Any:
    return optax_spd.with_gradient(
        optax_spd.with_anchor(
            optax.chain(
                optax_spd.l2_sp(weight_decay, anchor="argument"),
                optax.adam(learning_rate),
                optax_spd.spd(1.0, anchor="argument"),
            )
        )
    )


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


FACTORIES = {
    "adam_spd": optax_spd.adam_spd,
    "adam_ftp": optax_spd.adam_ftp,
    "adamw_l2_sp": optax_spd.adamw_l2_sp,
    "sgd_spd": sgd_spd,
    "sgd_ftp": optax_spd.sgd_ftp,
    "clipped_adam_spd": clipped_adam_spd,
    "shared_anchor": shared_anchor,
    "tpgm_in_fixed_balls": tpgm_in_fixed_balls,
    "sgd_freeze_embed": sgd_freeze_embed,
    "adamp": optax_spd.adamp,
    "sgdp": optax_spd.sgdp,
    "sgd_fednar": optax_spd.sgd_fednar,
    "balanced_layerwise_adam": balanced_layerwise_adam,
}

# One row per optimizer: a name for the test class, the factory and its arguments. The suite
# minimizes four functions in 30,000 steps, to 3e-2: the rates must allow that. adam_tpgm cannot:
# without validation data its radii never grow, so it is only in the other tables.
CONTRIB_TABLE = {
    "adam_spd": ("adam_spd", {"learning_rate": 1e-2}),
    "adam_spd_strong": ("adam_spd", {"learning_rate": 1e-2, "weight_decay": 1.5}),
    "adam_spd_from_zero": ("adam_spd", {"learning_rate": 1e-2, "anchor": "zero"}),
    "adamw_l2_sp": ("adamw_l2_sp", {"learning_rate": 1e-2, "weight_decay": 1e-4}),
    "sgd_spd": ("sgd_spd", {"learning_rate": 1e-3}),
    "clipped_adam_spd": ("clipped_adam_spd", {"learning_rate": 1e-2}),
    "shared_anchor": ("shared_anchor", {"learning_rate": 1e-2}),
    "adam_ftp": ("adam_ftp", {"learning_rate": 1e-2, "k": 0.5}),
    "sgd_ftp_l2": ("sgd_ftp", {"learning_rate": 1e-3, "momentum": 0.9, "norm": "l2"}),
    "tpgm_in_fixed_balls": ("tpgm_in_fixed_balls", {"learning_rate": 1e-2}),
    "sgd_freeze_embed": ("sgd_freeze_embed", {"learning_rate": 1e-3}),
    "adamp": ("adamp", {"learning_rate": 1e-2, "nesterov": True}),
    "sgdp": ("sgdp", {"learning_rate": 1e-3, "momentum": 0.9, "nesterov": True}),
    "sgd_fednar": ("sgd_fednar", {"learning_rate": 1e-3, "weight_decay": 0.0, "max_norm": 1e3}),
    "balanced_layerwise_adam": ("balanced_layerwise_adam", {"learning_rate": 1e-2}),
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
    "clipped_adam_spd": clipped_adam_spd(1.0),
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
    ("clipped_adam_spd", clipped_adam_spd, {"learning_rate": 0.1}),
    ("sgd_freeze_embed", sgd_freeze_embed, {"learning_rate": falling(0.1)}),
    ("frozen_adam_spd", frozen_adam_spd, {"learning_rate": 0.1}),
    (
        "layerwise_lr_decay",
        optax_spd.layerwise_lr_decay,
        {"decay": 0.5, "depth": len, "min_scale": falling(0.1)},
    ),
]
ONE = optax_spd.LayerSpec(group="one")


def contrib_suite(rows: dict[str, Any]) -> Any:
    entries = tuple(
        {"opt_name": name, "opt_kwargs": kwargs, "wrapper_name": None, "wrapper_kwargs": None}
        for name, kwargs in rows.values()
    )
    tables = {"_MAIN_OPTIMIZERS_UNDER_TEST": entries, "_ALL_OPTIMIZERS_UNDER_TEST": entries}
    return optax_suite.load(CONTRIB, {**tables, "_get_opt_factory": FACTORIES.__getitem__})


# Kept in a dictionary besides: pytest would collect a class again under a second name.
# One class per optimizer: the suite numbers its cases, and a number says nothing of what failed.
CASES: dict[str, type[unittest.TestCase]] = {
    label: optax_suite.adopt(
        contrib_suite({label: row}).ContribTest, f"ContribTest_{label}", globals()
    )
    for label, row in CONTRIB_TABLE.items()
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


def assert_complete(
    module: str, class_name: str, case: type[unittest.TestCase], sizes: dict[str, int]
) -> int:
    """Checks that each of Optax's tests has the cases that tables of these sizes imply."""
    assert globals()[case.__name__] is case  # or pytest does not see it
    original = optax_suite.load(module, {})
    theirs = optax_suite.cases_by_test(module, getattr(original, class_name))
    ours = optax_suite.cases_by_test(module, case)
    for test, table in optax_suite.parametrized_tests(module).items():
        per_entry = theirs[test] / len(vars(original)[table])
        assert ours[test] == per_entry * sizes[table] > 0, test
    assert ours.total() == len(unittest.TestLoader().getTestCaseNames(case))
    return ours.total()


@pytest.mark.parametrize("label", CONTRIB_TABLE)
def test_collects_the_whole_suite_for_contributed_optimizers(label: str) -> None:
    sizes = {"_MAIN_OPTIMIZERS_UNDER_TEST": 1, "_ALL_OPTIMIZERS_UNDER_TEST": 1}
    assert assert_complete(CONTRIB, "ContribTest", CASES[label], sizes) >= 16


def test_collects_the_whole_float64_suite() -> None:
    sizes = {"ALL_MODULES": len(FLOAT64_TABLE)}
    found = assert_complete(FLOAT64, "Float64Test", CASES[FLOAT64], sizes)
    assert found >= len(FLOAT64_TABLE)


@pytest.mark.filterwarnings("ignore:Specifying a key will be required")  # of Optax's own table
def test_collects_the_whole_sharding_suite() -> None:
    if SHARDING not in CASES:
        assert tuple(map(int, optax.__version__.split(".")[:3])) < (0, 2, 7)
        return
    sizes = {"OPTIMIZERS": len(SHARDING_TABLE)}
    found = assert_complete(SHARDING, "ShardingTest", CASES[SHARDING], sizes)
    assert found >= 3 * len(SHARDING_TABLE)


def test_a_suite_that_would_skip_fails() -> None:
    """So that no case above passes by being skipped, for JAX's version or anything else."""

    class Skipping(unittest.TestCase):
        def test_it(self) -> None:
            self.skipTest("some version")

    result = optax_suite.adopt(Skipping, "Adopted", {"__name__": __name__})("test_it").run()
    assert result is not None
    assert not result.skipped
    assert "would skip this test: some version" in result.failures[0][1]
