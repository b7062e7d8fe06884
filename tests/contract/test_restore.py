"""Saved and restored with Orbax, with the anchor or without, a run goes on as if never stopped."""

import functools
import inspect
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import optax_spd

STEPS, STOP = 12, 5
MENDED_BY = "the anchor was dropped; call set_anchor"


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PRETRAINED = {"dense": {"bias": normal(0, 8), "kernel": normal(1, 4, 8)}, "head": normal(2, 8, 2)}
# The gradients turn round every third step, and momentum does so later: that is when SPD acts.
SIGNS = [1.0 if (step // 3) % 2 == 0 else -1.0 for step in range(STEPS)]


def gradient(sign: float) -> Any:
    return jax.tree.map(lambda x: sign * jnp.sin(3 * x), PRETRAINED)


GRADS = [gradient(sign) for sign in SIGNS]

METHODS = {
    "adam_spd": optax_spd.adam_spd(0.1),
    "masked, in bfloat16": optax_spd.adam_spd(
        0.1, anchor_dtype=jnp.bfloat16, mask=optax_spd.path_mask("dense")
    ),
    "adam_ftp": optax_spd.adam_ftp(0.1, k=0.5, radius_learning_rate=0.05, state_dtype=jnp.bfloat16),
    "adam_tpgm": optax_spd.adam_tpgm(0.1, norm="l2"),
    "shared anchor": optax_spd.with_gradient(
        optax_spd.with_anchor(
            optax.chain(
                optax_spd.l2_sp(0.01, anchor="argument"),
                optax.adam(0.1),
                optax_spd.spd(1.0, anchor="argument"),
            )
        )
    ),
    "partition": optax.partition(
        {"body": optax_spd.adam_spd(0.1), "head": optax.adam(0.1)},
        {"dense": "body", "head": "head"},
    ),
}
# With more to resume than one vector and an anchor, or less.
OTHERS = {
    "adamw_l2_sp": optax_spd.adamw_l2_sp(0.1, weight_decay=0.5),
    "learned radii": optax_spd.adam_tpgm(0.1, radius_optimizer=optax.adam(0.2), every=2),
    "rates": optax_spd.chain(
        optax_spd.with_frozen(optax.adam(0.1), "^head"),
        optax_spd.temp_balance(every=3, min_eigenvalues=2),
        optax_spd.layerwise_lr_decay(0.5, {"dense/bias": 0, "dense/kernel": 1}.get),
    ),
    "sgd_freeze_embed": optax_spd.sgd_freeze_embed(0.1, embedding="^dense/kernel"),
    "sgd_ftp": optax_spd.sgd_ftp(0.1, momentum=0.9, nesterov=True, radius_learning_rate=0.05),
}
OPTIMIZERS = METHODS | OTHERS
# Which of them runs each public stage, wrapper and recipe.
RUN_BY = {
    "adam_ftp": "adam_ftp",
    "adam_spd": "adam_spd",
    "adam_tpgm": "learned radii",
    "adamw_l2_sp": "adamw_l2_sp",
    "chain": "rates",
    "ftp": "adam_ftp",
    "l2_sp": "shared anchor",
    "layerwise_lr_decay": "rates",
    "sgd_freeze_embed": "sgd_freeze_embed",
    "sgd_ftp": "sgd_ftp",
    "spd": "shared anchor",
    "temp_balance": "rates",
    "tpgm": "learned radii",
    "with_anchor": "shared anchor",
    "with_frozen": "rates",
    "with_gradient": "shared anchor",
}
EACH = pytest.mark.parametrize("name", METHODS)


def test_no_public_stage_or_recipe_is_left_out() -> None:
    public = {name: getattr(optax_spd, name) for name in optax_spd.__all__}
    made = (optax.GradientTransformation, optax.GradientTransformationExtraArgs)
    makers = {
        name
        for name, function in public.items()
        if inspect.isfunction(function) and inspect.signature(function).return_annotation in made
    }
    assert makers == set(RUN_BY)
    assert set(RUN_BY.values()) <= set(OPTIMIZERS)


def distance(params: Any, batch: Any) -> jax.Array:
    return optax.tree.norm(optax.tree.sub(params, batch), squared=True)


@functools.cache
def step_of(name: str) -> Any:
    """A step compiled once for all runs of an optimizer."""
    extra: Any = {}
    if name == "learned radii":
        batches = jax.tree.map(lambda x: jnp.stack([2 * x, -x]), PRETRAINED)
        extra = {"validation_fn": distance, "validation_batches": batches}

    def step(grads: Any, state: Any, params: Any) -> Any:
        updates, state = OPTIMIZERS[name].update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


class Trainer:
    """Parameters, the state of an optimizer, and the ratios or radii of all steps so far."""

    def __init__(self, name: str) -> None:
        self.step = step_of(name)
        self.params, self.state = PRETRAINED, OPTIMIZERS[name].init(PRETRAINED)
        self.ratios: list[np.ndarray] = []

    def run(self, start: int, stop: int) -> "Trainer":
        for grads in GRADS[start:stop]:
            self.params, self.state = self.step(grads, self.state, self.params)
            self.ratios.append(decided(self.state))
        return self


def decided(state: Any) -> np.ndarray:
    """What a stage decided for each layer; empty for those that decide nothing."""
    fields = (*oracles.FIELDS, "temp_balance_scale")
    found = [optax.tree.get(state, field) for field in fields]
    return np.asarray(next((vector for vector in found if vector is not None), ()))


def assert_same_to_the_bit(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_continues(trainer: Trainer, name: str) -> None:
    """Runs to the end and compares with a run that was not interrupted; the method acts in both."""
    uninterrupted = Trainer(name).run(0, STEPS)
    trainer.run(STOP, STEPS)
    np.testing.assert_array_equal(trainer.ratios[STOP:], uninterrupted.ratios[STOP:])
    decisions = np.stack(trainer.ratios[STOP:])
    if decisions.size:
        assert np.any(decisions > 0)
    assert_same_to_the_bit(
        (trainer.params, trainer.state), (uninterrupted.params, uninterrupted.state)
    )


def on_one_device(tree: Any) -> Any:
    """Shapes with the sharding that Orbax wants to be told."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)


@pytest.fixture
def checkpointer() -> Iterator[ocp.StandardCheckpointer]:
    with ocp.StandardCheckpointer() as opened:
        yield opened


def save(checkpointer: Any, path: pathlib.Path, tree: Any) -> None:
    checkpointer.save(path, tree)
    checkpointer.wait_until_finished()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumes_to_the_bit(
    name: str, checkpointer: ocp.StandardCheckpointer, tmp_path: pathlib.Path
) -> None:
    trainer = Trainer(name).run(0, STOP)
    saved = (trainer.params, trainer.state)
    save(checkpointer, tmp_path / "full", saved)
    # As a new process would: the structure comes from init, the numbers from the checkpoint.
    target = jax.eval_shape(lambda: (PRETRAINED, OPTIMIZERS[name].init(PRETRAINED)))
    trainer.params, trainer.state = checkpointer.restore(tmp_path / "full", on_one_device(target))
    assert_same_to_the_bit((trainer.params, trainer.state), saved)
    assert_continues(trainer, name)


def test_resumes_from_the_pytree_handler(tmp_path: pathlib.Path) -> None:
    trainer = Trainer("adam_spd").run(0, STOP)
    saved = (trainer.params, trainer.state)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "full", saved)
        trainer.params, trainer.state = checkpointer.restore(
            tmp_path / "full",
            item=saved,
            restore_args=ocp.checkpoint_utils.construct_restore_args(saved),
        )
    assert_continues(trainer, "adam_spd")


@EACH
def test_saved_without_the_anchor(
    name: str, checkpointer: ocp.StandardCheckpointer, tmp_path: pathlib.Path
) -> None:
    trainer = Trainer(name).run(0, STOP)
    dropped = optax_spd.drop_anchor(trainer.state)
    fewer = len(jax.tree.leaves(trainer.state)) - len(jax.tree.leaves(dropped))
    assert fewer == (2 if name in ("masked, in bfloat16", "partition") else 3)

    save(checkpointer, tmp_path / "dropped", dropped)
    target = on_one_device(optax_spd.drop_anchor(OPTIMIZERS[name].init(PRETRAINED)))
    trainer.state = checkpointer.restore(tmp_path / "dropped", target)
    assert_same_to_the_bit(trainer.state, dropped)
    with pytest.raises(ValueError, match=MENDED_BY):
        trainer.run(STOP, STEPS)

    dtype = jnp.bfloat16 if "bfloat16" in name else None
    trainer.state = optax_spd.set_anchor(trainer.state, PRETRAINED, anchor_dtype=dtype)
    assert_continues(trainer, name)


@EACH
def test_restored_where_the_checkpoint_lacks_the_anchor(
    name: str, checkpointer: ocp.StandardCheckpointer, tmp_path: pathlib.Path
) -> None:
    """Asked for arrays that the checkpoint does not have, Orbax gives None and says nothing."""
    trainer = Trainer(name).run(0, STOP)
    save(checkpointer, tmp_path / "dropped", optax_spd.drop_anchor(trainer.state))
    trainer.state = checkpointer.restore(tmp_path / "dropped", on_one_device(trainer.state))
    anchors = optax.tree_utils.tree_get_all_with_path(trainer.state, "anchor")
    held = [anchor for _, anchor in anchors if not isinstance(anchor, optax.EmptyState)]
    assert held
    assert not jax.tree.leaves(held)
    with pytest.raises(ValueError, match=MENDED_BY):
        trainer.run(STOP, STEPS)

    dtype = jnp.bfloat16 if "bfloat16" in name else None
    trainer.state = optax_spd.set_anchor(trainer.state, PRETRAINED, anchor_dtype=dtype)
    assert_continues(trainer, name)


# NNX, whose optimizer keeps the state in variables ------------------------------------------------


class Net(nnx.Module):
    """One layer, starting from the pretrained weights."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(4, 8, rngs=rngs)
        self.dense.kernel[...] = PRETRAINED["dense"]["kernel"]
        self.dense.bias[...] = PRETRAINED["dense"]["bias"]


BODY = {"dense": PRETRAINED["dense"]}


class NNXTrainer:
    """A model and its optimizer; the gradients are given, as above."""

    def __init__(self, tx: Any) -> None:
        self.model = Net(nnx.Rngs(0))
        self.optimizer = nnx.Optimizer(self.model, tx, wrt=nnx.Param)
        self.ratios: list[np.ndarray] = []

        @nnx.jit
        def step(model: Net, optimizer: Any, grads: Any) -> None:
            boxed = nnx.state(model, nnx.Param)
            nnx.replace_by_pure_dict(boxed, grads)
            optimizer.update(model, boxed)

        self._step = step

    def run(self, start: int, stop: int) -> "NNXTrainer":
        for grads in GRADS[start:stop]:
            self._step(self.model, self.optimizer, {"dense": grads["dense"]})
            (ratio,) = jax.tree.leaves(optax.tree.get(self.optimizer.opt_state, "spd_ratio"))
            self.ratios.append(np.asarray(ratio))
        return self

    def anchor(self) -> Any:
        return nnx.to_pure_dict(optax.tree.get(self.optimizer.opt_state, "anchor"))


def test_nnx_optimizer_drops_and_gets_back_its_anchor() -> None:
    tx = optax_spd.adam_spd(0.1)
    uninterrupted = NNXTrainer(tx).run(0, STEPS)
    trainer = NNXTrainer(tx).run(0, STOP)
    size = len(jax.tree.leaves(nnx.state(trainer.optimizer)))
    trainer.optimizer.opt_state = nnx.data(optax_spd.drop_anchor(trainer.optimizer.opt_state))
    assert size - len(jax.tree.leaves(nnx.state(trainer.optimizer))) == 2
    with pytest.raises(ValueError, match=MENDED_BY):
        trainer.run(STOP, STEPS)

    trainer.optimizer.opt_state = nnx.data(optax_spd.set_anchor(trainer.optimizer.opt_state, BODY))
    trainer.run(STOP, STEPS)
    np.testing.assert_array_equal(trainer.ratios, uninterrupted.ratios)
    assert np.any(np.stack(trainer.ratios[STOP:]) > 0)
    assert_same_to_the_bit(
        nnx.to_pure_dict(nnx.state(trainer.model)), nnx.to_pure_dict(nnx.state(uninterrupted.model))
    )


@pytest.mark.parametrize("container", ["dict", "nnx.State"])
def test_nnx_optimizer_gets_the_pretrained_weights_after_init(container: str) -> None:
    """Loaded after ``tx.init``: the optimizer is made for a random model."""
    tx = optax_spd.adam_spd(0.1)
    expected = NNXTrainer(tx).run(0, STEPS)
    trainer = NNXTrainer(tx)
    started_from = Net(nnx.Rngs(0))
    for variable in (started_from.dense.kernel, started_from.dense.bias):
        variable[...] = variable[...] + 1
    trainer.optimizer = nnx.Optimizer(started_from, tx, wrt=nnx.Param)
    pretrained = BODY if container == "dict" else nnx.state(trainer.model, nnx.Param)
    trainer.optimizer.opt_state = nnx.data(
        optax_spd.set_anchor(trainer.optimizer.opt_state, pretrained)
    )
    jax.tree.map(np.testing.assert_array_equal, trainer.anchor(), BODY)
    trainer.run(0, STEPS)
    jax.tree.map(np.testing.assert_array_equal, trainer.anchor(), BODY)  # and it stays
    np.testing.assert_array_equal(trainer.ratios, expected.ratios)
    assert np.any(np.stack(trainer.ratios) > 0)
