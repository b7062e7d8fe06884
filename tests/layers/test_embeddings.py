"""The default patterns against parameter paths of real models, and against two modules of Flax.

The paths are written down from the models' code, which tests/data/embedding_paths.txt names: "+"
before those of the embedding layer, "-" before some of the others.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn, nnx
from golden import DATA

import optax_spd

(PATTERN,) = optax_spd.DEFAULT_EMBEDDING_PATTERNS


class Model(NamedTuple):
    """Parameter paths of a model, the embedding layer's and some of the others."""

    embedding: list[str]
    others: list[str]


def models() -> dict[str, Model]:
    found: dict[str, Model] = {}
    for line in (DATA / "embedding_paths.txt").read_text().splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "#":
            model = found[rest.partition(":")[0]] = Model([], [])
        else:
            (model.embedding if kind == "+" else model.others).extend(rest.split())
    return found


MODELS = models()


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_embedding_layer_is_found_and_nothing_else(model: Model) -> None:
    found = [path for path in model.embedding + model.others if re.search(PATTERN, path)]
    assert found == model.embedding


@pytest.mark.parametrize("family", ["ViT", "BERT", "GPT-2", "T5", "CLIP", "ConvNeXt", "ResNet"])
def test_every_family_is_there_in_linen_and_in_nnx(family: str) -> None:
    for kind in ("(linen)", "(NNX)"):
        assert any(family in name and kind in name for name in MODELS), family


@pytest.mark.parametrize(
    "path",
    [
        "layers/0/attn/rotary_emb/inv_freq",
        "layers/0/rope_embeddings/position_embedding",
        "decoder/block_0/q_embed_proj/kernel",
        "decoder/block_0/patch_embed_proj/kernel",
        "block/reembedding/kernel",
        "head/embedding",
        "block_0/embed",
        "layer_0/conv1/kernel",
        "backbone/block/bn1/scale",
        "query_embeddings_norm/scale",
        "decoder/lm_head/kernel",
        "shared_mlp/kernel",
        "system/kernel",
        "class_head/kernel",
    ],
)
def test_names_that_only_look_alike_are_left_alone(path: str) -> None:
    assert not re.search(PATTERN, path)


def test_one_pattern_serves_every_model_in_path_mask() -> None:
    # path_mask wants each of its patterns to match: a tuple with one per family would raise.
    model = MODELS["GPT-2, Hugging Face (linen)"]
    tree = {path: jnp.zeros(1) for path in model.embedding + model.others}
    mask = optax_spd.path_mask(*optax_spd.DEFAULT_EMBEDDING_PATTERNS)(tree)
    assert [path for path, frozen in mask.items() if frozen] == sorted(model.embedding)
    with pytest.raises(ValueError, match="matches no parameter path"):
        optax_spd.path_mask(*optax_spd.DEFAULT_EMBEDDING_PATTERNS)({"dense": jnp.zeros(1)})


# Modules of Flax: its own naming, boxes and lists ------------------------------------------------


class Embeddings(nn.Module):
    def setup(self) -> None:
        init = nn.with_partitioning(nn.initializers.normal(), (None, "model"))
        self.word_embeddings = nn.Embed(8, 4, embedding_init=init)
        self.LayerNorm = nn.LayerNorm()

    def __call__(self, tokens: Any) -> Any:
        return self.LayerNorm(self.word_embeddings(tokens))


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, tokens: Any, image: Any) -> Any:
        x = Embeddings(name="embeddings")(tokens) + nn.Embed(8, 4)(tokens)
        patches = nn.Conv(4, (2, 2), (2, 2), name="embedding")(image).reshape(1, -1, 4)
        x = jnp.concatenate([self.param("cls", nn.initializers.zeros, (1, 1, 4)), patches, x], 1)
        x = nn.MultiHeadDotProductAttention(1, name="attention")(x)
        return nn.Dense(3, name="head")(nn.LayerNorm()(x))


def test_a_linen_module() -> None:
    shapes = jax.eval_shape(
        Encoder().init, jax.random.key(0), jnp.zeros((1, 3), int), jnp.zeros((1, 4, 4, 3))
    )["params"]
    mask = optax_spd.path_mask(PATTERN)(shapes)
    expected = {"cls", "embedding", "embeddings", "Embed_0"}
    assert {name for name in mask if all(jax.tree.leaves(mask[name]))} == expected
    assert {name for name in mask if any(jax.tree.leaves(mask[name]))} == expected
    assert "attention" in mask


class GPT(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.wte = nnx.Embed(8, 4, rngs=rngs)
        self.pos_embedding = nnx.Param(jnp.zeros((3, 4)))
        self.h = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.lm_head = nnx.Linear(4, 8, rngs=rngs)


def test_an_nnx_module() -> None:
    params = nnx.state(nnx.eval_shape(lambda: GPT(nnx.Rngs(0))), nnx.Param)
    names = optax_spd.layer_names(params)
    masked = optax_spd.layer_names(params, mask=optax_spd.path_mask(PATTERN))
    assert masked == ["pos_embedding", "wte/embedding"]
    assert "h/1/kernel" in names
