"""Layer-wise decay: the applied step is scaled, by the right power, for every layer and client."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_spd

NUMBER = r"layer_(\d+)/"
LAYERS = 3


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def model() -> dict[str, Any]:
    """An embedding, three layers, and what follows them; of few shapes, which compiles faster."""
    blocks = {
        f"layer_{i}": {"kernel": normal(i, 4, 2), "bias": normal(9 + i, 2)} for i in range(LAYERS)
    }
    return {
        "embed": {"embedding": normal(5, 4, 2)},
        "encoder": blocks,
        "final_norm": {"scale": normal(6, 2)},
        "head": {"kernel": normal(7, 4, 2)},
    }


HEIGHTS = {"embed": 4, "layer_0": 3, "layer_1": 2, "layer_2": 1, "final_norm": 0, "head": 0}


def heights_of(params: Any) -> Any:
    """How many layers below the head each array of the model is."""
    height = lambda path: next(h for name, h in HEIGHTS.items() if name in path)
    return jax.tree.map_with_path(lambda p, _: height(jax.tree_util.keystr(p)), params)


def gradients(params: Any, seed: int = 0) -> Any:
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten([normal(20 + seed + i, *np.shape(x)) for i, x in enumerate(leaves)])


def train(tx: optax.GradientTransformation, params: Any, steps: int = 3) -> Any:
    """The parameters after some steps on given gradients."""
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_close(a: Any, b: Any, rtol: float = 1e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-7), a, b)


def scaled_ones(tx: optax.GradientTransformation, params: Any) -> Any:
    """What the stage makes of an update of ones: each array's scale."""
    updates, _ = tx.update(jax.tree.map(np.ones_like, params), tx.init(params), params)
    return jax.tree.map(lambda u: float(np.ravel(u)[0]), updates)


# Where it stands ---------------------------------------------------------------------------------


def test_adamw_s_weight_decay_is_scaled_with_the_rate() -> None:
    # As in BEiT, where each layer is a parameter group with a rate of its own.
    params = model()
    rates = jax.tree.map(lambda h: str(h), heights_of(params))
    groups = {str(h): optax.adamw(0.1 * 0.5**h, weight_decay=0.3) for h in range(5)}
    ours = optax.chain(
        optax.adamw(0.1, weight_decay=0.3), optax_spd.layerwise_lr_decay(0.5, NUMBER)
    )
    assert_close(train(ours, params), train(optax.partition(groups, rates), params), rtol=1e-5)


# Depths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 12])
@pytest.mark.parametrize("decay", [0.65, 1.0])
def test_depths_are_beit_s(count: int, decay: float) -> None:
    # BEiT: scales decay^(L + 1 - i) for i = 0 (embeddings), 1, ..., L (last layer), L + 1 (head).
    scales = [decay ** (count + 1 - i) for i in range(count + 2)]
    names = ["Transformer/posembed_input/pos_embedding"]
    names += [f"Transformer/encoderblock_{i}/kernel" for i in range(count)]
    params = {name: jnp.ones(1) for name in [*names, "head/kernel"]}
    tx = optax_spd.layerwise_lr_decay(decay, r"encoderblock_(\d+)/")
    found = scaled_ones(tx, params)
    np.testing.assert_allclose([found[n] for n in params], scales, rtol=1e-5)


def test_numbers_need_not_be_contiguous_and_the_first_match_counts() -> None:
    params = {name: jnp.ones(1) for name in ("block2/unit1", "block4/unit3", "conv_root/kernel")}
    found = scaled_ones(optax_spd.layerwise_lr_decay(0.5, r"(?:block)(\d+)/"), params)
    assert list(found.values()) == [0.5**3, 0.5, 0.5**4]  # one below the lowest number


def test_a_layer_s_own_embedding_is_not_the_model_s() -> None:
    params = {"block_0/pos_embedding": jnp.ones(1), "block_1/kernel": jnp.ones(1)}
    found = scaled_ones(optax_spd.layerwise_lr_decay(0.5, r"block_(\d+)"), params)
    assert list(found.values()) == [0.25, 0.5]


@pytest.mark.parametrize("shift", [0, -5, 5])
def test_of_a_function_s_depths_only_the_differences_matter(shift: int) -> None:
    """Depths may be counted from the top, as negative numbers; the head is at the largest."""
    params = {name: jnp.ones(1) for name in "abcd"}
    depth = {"a": -1 + shift, "b": np.float32(0.5 + shift), "c": 2 + shift, "d": None}.__getitem__
    found = scaled_ones(optax_spd.layerwise_lr_decay(0.25, depth), params)
    assert list(found.values()) == [0.25**3, 0.25**1.5, 1.0, 1.0]
    everywhere = scaled_ones(optax_spd.layerwise_lr_decay(0.25, lambda name: None), params)
    assert set(everywhere.values()) == {1.0}


def test_the_scales_are_in_the_state_before_the_first_step_and_after() -> None:
    params = model()
    tx = optax_spd.layerwise_lr_decay(0.5, NUMBER, min_scale=0.2)
    state = tx.init(params)
    expected = [max(0.2, 0.5**h) for h in jax.tree.leaves(heights_of(params))]
    np.testing.assert_allclose(state.layer_decay_scale, expected)
    _, after = tx.update(params, state, params)
    np.testing.assert_allclose(after.layer_decay_scale, expected)
    assert after.count == 1


def test_zero_trains_only_the_head_and_one_changes_nothing() -> None:
    params = model()
    found = scaled_ones(optax_spd.layerwise_lr_decay(0.0, NUMBER), params)
    assert found == jax.tree.map(lambda h: float(h == 0), heights_of(params))
    tx = optax_spd.layerwise_lr_decay(1.0, NUMBER)
    updates, _ = tx.update(params, tx.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, params)


def test_the_derivative_by_the_decay_is_finite_at_zero() -> None:
    params = model()

    def total(decay: jax.Array) -> jax.Array:
        tx = optax_spd.layerwise_lr_decay(decay, NUMBER)
        ones = jax.tree.map(jnp.ones_like, params)
        updates, _ = tx.update(ones, tx.init(params), params)
        return optax.tree.sum(updates)

    # d(decay^h)/d(decay) at 0 is 1 for h = 1, and 0 elsewhere; half where s_min = 0 is as large.
    heights = jax.tree.map(lambda h, x: (h == 1) * np.size(x), heights_of(params), params)
    assert jax.grad(total)(0.0) == optax.tree.sum(heights) / 2 > 0


def test_a_group_with_an_embedding_in_it_is_one() -> None:
    params = {"embed": {"embedding": jnp.ones(1)}, "layer_0": {"kernel": jnp.ones(1)}}
    tx = optax_spd.layerwise_lr_decay(0.5, r"layer_(\d+)", layers=optax_spd.by_module())
    assert jax.tree.leaves(scaled_ones(tx, params)) == [0.25, 0.5]


# Masks and parts ---------------------------------------------------------------------------------


def test_what_is_masked_out_passes_through_and_does_not_count() -> None:
    params = model()
    mask = optax_spd.path_mask(r"embed", r"layer_[01]", "head")
    tx = optax_spd.layerwise_lr_decay(0.5, NUMBER, mask=mask)
    updates, state = tx.update(params, tx.init(params), params)
    assert updates["encoder"]["layer_2"]["kernel"] is params["encoder"]["layer_2"]["kernel"]
    np.testing.assert_allclose(updates["encoder"]["layer_1"]["bias"], normal(10, 2) * 0.5)
    np.testing.assert_allclose(updates["embed"]["embedding"], normal(5, 4, 2) * 0.5**3)
    assert state.layer_decay_scale.shape == (6,)


def test_each_tower_of_a_partition_has_a_top_of_its_own() -> None:
    params = {
        "text": {"layer_0": jnp.ones(1), "layer_1": jnp.ones(1)},
        "vision": {f"layer_{i}": jnp.ones(1) for i in range(4)},
    }
    decay = optax_spd.layerwise_lr_decay(0.5, r"layer_(\d+)")
    labels = {"text": "text", "vision": "vision"}
    parts = optax.partition({"text": decay, "vision": decay}, labels)
    assert scaled_ones(parts, params)["text"] == {"layer_0": 0.25, "layer_1": 0.5}
    assert scaled_ones(decay, params)["text"] == {"layer_0": 0.5**4, "layer_1": 0.5**3}


def test_a_part_with_nothing_but_the_embedding_cannot_tell_how_deep_it_is() -> None:
    params = model()
    decay = optax_spd.layerwise_lr_decay(0.5, NUMBER)
    with pytest.raises(ValueError, match=r"distance of .*behind the partition") as error:
        optax.masked(decay, optax_spd.path_mask("embed")).init(params)
    assert "embed/embedding" in str(error.value)
    # Without embeddings nothing is lost: whatever it sees is at full rate.
    head = optax.masked(decay, optax_spd.path_mask("head"))
    assert set(jax.tree.leaves(scaled_ones(head, params))) == {1.0}


# Blocks that the pattern leaves out --------------------------------------------------------------

DENSE = ("kernel", "bias")
BLOCK = ("attention/kernel", "attention/bias", "mlp/kernel", "mlp/bias", "norm/scale")
CONV_BLOCK = ("conv/kernel", "norm/scale", "norm/bias")


def blocks(prefix: str, count: int, arrays: tuple[str, ...] = BLOCK) -> list[str]:
    return [f"{prefix}{i}/{array}" for i in range(count) for array in arrays]


def tree_of(names: list[str]) -> dict[str, Any]:
    return {name: jnp.ones(1) for name in names}


TEXT, VISION = blocks("text/layer_", 4), blocks("vision/layer_", 4)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (r"text/layer_(\d+)", TEXT + VISION),
        (r"vision/layer_(\d+)/", VISION + blocks("text/layer_", 2)),  # a shallower tower
        (r"^bert/layer/(\d+)/", blocks("bert/layer/", 3) + blocks("vit/layer/", 3, CONV_BLOCK)),
        (r"text/layer_(\d+)", [f"{t}/layer_{i}" for t in ("text", "vision") for i in range(2)]),
        (r"layer_(1\d)/", blocks("encoder/layer_", 12)),  # the lower half
    ],
)
def test_blocks_that_the_pattern_leaves_out_are_warned_of(pattern: str, names: list[str]) -> None:
    tx, params = optax_spd.layerwise_lr_decay(0.5, pattern), tree_of(names)
    with pytest.warns(UserWarning, match=r"does not match the \d+ blocks.*, so they have the full"):
        state = tx.init(params)
    left_out = [not re.search(pattern, name) for name in optax_spd.layer_names(params)]
    np.testing.assert_array_equal(state.layer_decay_scale == 1, left_out)
    with pytest.warns(UserWarning, match="does not match the"):
        jax.eval_shape(tx.update, params, state, params)


ENCODER, LAYERS_OF = blocks("encoder/layer_", 3), blocks("encoder/layers/", 3, DENSE)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (r"encoder/layer_(\d+)/", [*ENCODER, *blocks("cls/transform_", 2, DENSE)]),
        (r"layer_(\d+)", TEXT + VISION),
        (r"encoder/layer_(\d+)/", ENCODER + blocks("mlp/layer_", 3, DENSE)),  # a dense head
        (r"encoder/layers/(\d+)/", LAYERS_OF + blocks("head/layers/", 2, DENSE)),
        (r"layer_(\d+)/", blocks("layer_", 2, DENSE) + blocks("mlp/layers_", 4)),
        (r"encoder/layer_(\d+)/", ENCODER + blocks("pooler/layer_", 1)),  # with one number
        (r"stages_(\d+)/", [f"stages_{i}/{n}" for i in range(4) for n in blocks("blocks_", 2)]),
        (r"encoder/layer_(\d+)", ENCODER + blocks("embeddings/layer_", 2)),
    ],
)
def test_heads_and_what_is_in_a_block_are_not_warned_of(pattern: str, names: list[str]) -> None:
    jax.eval_shape(optax_spd.layerwise_lr_decay(0.5, pattern).init, tree_of(names))


def test_scanned_towers_are_warned_of_and_other_stacks_are_not() -> None:
    params = {name: jnp.ones((3, 2)) for name in ("text/kernel", "text/scale", "vision/kernel")}
    params["heads/kernel"] = jnp.ones((2, 2))
    stacked = optax_spd.stacked("")
    with pytest.warns(UserWarning, match=r"the 3 blocks 'vision/kernel\[#\]'"):
        optax_spd.layerwise_lr_decay(0.5, r"text/.*\[(\d+)\]$", layers=stacked).init(params)
    both = r"(?:text|vision)/.*\[(\d+)\]$"
    optax_spd.layerwise_lr_decay(0.5, both, layers=stacked).init(params)


def test_a_tower_may_be_left_out_on_purpose() -> None:
    params = tree_of(TEXT + VISION)
    mask = optax_spd.path_mask("^text")
    one = optax_spd.layerwise_lr_decay(0.5, r"text/layer_(\d+)", mask=mask)
    assert np.all(one.init(params).layer_decay_scale < 1)
    depth = lambda name: int(name[11]) if name.startswith("text") else None
    optax_spd.layerwise_lr_decay(0.5, depth).init(params)


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"decay": 1.1}, ValueError, "decay must be finite and between 0 and 1"),
        ({"min_scale": 2}, ValueError, "min_scale must be"),
        ({"depth": "layer"}, ValueError, "has 0 groups"),
        ({"depth": r"(layer)_(\d+)"}, ValueError, "has 2 groups"),
        ({"depth": 3}, TypeError, "depth must be a regular expression"),
        ({"layers": "stacked"}, TypeError, "layers must be a function"),
        # In init:
        ({"depth": r"block_(\d+)"}, ValueError, "would be scaled.*'encoder/layer_0/bias'"),
        (
            {"depth": r"layer_\d/(\w+)"},
            ValueError,
            "matches 'bias' in the layer 'encoder/layer_0/b",
        ),
        ({"depth": r"layer(x)?"}, ValueError, "matches None in the layer 'encoder/layer_0/b"),
        ({"depth": lambda name: np.nan}, ValueError, "nan for the layer 'embed/embedding'"),
        ({"depth": lambda name: "3"}, TypeError, "got '3' for the layer 'embed/embedding'"),
        ({"depth": lambda name: True}, TypeError, "got True for the layer"),
    ],
)
def test_wrong_arguments_are_refused(arguments: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        optax_spd.layerwise_lr_decay(**{"decay": 0.5, "depth": NUMBER, **arguments}).init(model())
