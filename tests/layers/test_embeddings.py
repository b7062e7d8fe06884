"""The default patterns against parameter paths of real models.

The paths are written down from the models' code, which tests/data/embedding_paths.txt names: "+"
before those of the embedding layer, "-" before some of the others.
"""

import re
from typing import NamedTuple

import jax.numpy as jnp
import pytest
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
