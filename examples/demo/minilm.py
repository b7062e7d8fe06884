"""all-MiniLM-L6-v2 in Flax: a BERT encoder of 6 blocks, with its published weights.

The model is that of Wang et al. (2020, MiniLM) as configured for the checkpoint: learned positions,
post-layer normalisation, exact GELU, mean pooling over the real tokens. Dropout and the
checkpoint's pooler are left out, since fine-tuning here does not use them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from safetensors import SafetensorError
from safetensors.numpy import load_file

from examples.demo.errors import DemoError

VOCABULARY = 30522
POSITIONS = 512
HIDDEN = 384
INNER = 1536
HEADS = 12
BLOCKS = 6
NORM_EPSILON = 1e-12

Params = dict[str, Any]


class Block(nn.Module):
    """A transformer block; input and output are rows, (batch * length, hidden)."""

    @nn.compact
    def __call__(self, rows: jax.Array, mask: jax.Array) -> jax.Array:
        """Attention and feed-forward, each with its residual and normalisation."""
        batch, length = mask.shape

        def heads(name: str) -> jax.Array:
            projected = nn.Dense(HIDDEN, name=name)(rows)
            return projected.reshape(batch, length, HEADS, HIDDEN // HEADS)

        mixed = jax.nn.dot_product_attention(
            heads("query"), heads("key"), heads("value"), mask=mask[:, None, None, :]
        )
        attended = nn.Dense(HIDDEN, name="attention_out")(mixed.reshape(rows.shape))
        rows = nn.LayerNorm(epsilon=NORM_EPSILON, name="attention_norm")(rows + attended)
        inner = nn.gelu(nn.Dense(INNER, name="feed_forward_in")(rows), approximate=False)
        outer = nn.Dense(HIDDEN, name="feed_forward_out")(inner)
        rows = nn.LayerNorm(epsilon=NORM_EPSILON, name="feed_forward_norm")(rows + outer)
        return rows


class Encoder(nn.Module):
    """Maps token ids and their mask, (batch, length), to mean-pooled embeddings, (batch, 384)."""

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Embeds, runs the blocks and averages over the real tokens."""
        batch, length = tokens.shape
        table = nn.Embed(VOCABULARY, HIDDEN, name="word")(tokens)
        table += nn.Embed(POSITIONS, HIDDEN, name="position")(jnp.arange(length))
        table += nn.Embed(2, HIDDEN, name="token_type")(jnp.zeros((), jnp.int32))
        # Dense layers get rows instead of (batch, length, hidden). XLA:CPU then runs one plain
        # matrix product, which makes a gradient about a third cheaper.
        rows = table.reshape(batch * length, HIDDEN)
        rows = nn.LayerNorm(epsilon=NORM_EPSILON, name="norm")(rows)
        for index in range(BLOCKS):
            rows = Block(name=f"block_{index}")(rows, mask)
        hidden = rows.reshape(batch, length, HIDDEN)
        weights = mask[:, :, None].astype(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)


class Classifier(nn.Module):
    """The encoder with a linear head: one logit per text, positive for positive sentiment."""

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Logits, shape (batch,)."""
        embedding = Encoder(name="encoder")(tokens, mask)
        return nn.Dense(1, name="head")(embedding)[:, 0]


# The names of each module's arrays in the checkpoint; "{}" is the block's number.
_EMBEDDINGS = {
    "word": "embeddings.word_embeddings",
    "position": "embeddings.position_embeddings",
    "token_type": "embeddings.token_type_embeddings",
}
_NORMS = {
    "attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "feed_forward_norm": "encoder.layer.{}.output.LayerNorm",
}
_DENSE = {
    "query": "encoder.layer.{}.attention.self.query",
    "key": "encoder.layer.{}.attention.self.key",
    "value": "encoder.layer.{}.attention.self.value",
    "attention_out": "encoder.layer.{}.attention.output.dense",
    "feed_forward_in": "encoder.layer.{}.intermediate.dense",
    "feed_forward_out": "encoder.layer.{}.output.dense",
}


def load_encoder(path: Path) -> Params:
    """Reads the encoder's parameters from a safetensors file, as NumPy arrays."""
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DemoError(f"cannot read the weights in {path}: {error}") from error

    def norm(name: str) -> Params:
        return {"scale": stored[f"{name}.weight"], "bias": stored[f"{name}.bias"]}

    def dense(name: str) -> Params:
        # The checkpoint has (out, in), Flax (in, out).
        kernel = np.ascontiguousarray(stored[f"{name}.weight"].T)
        return {"kernel": kernel, "bias": stored[f"{name}.bias"]}

    try:
        params: Params = {
            ours: {"embedding": stored[f"{theirs}.weight"]} for ours, theirs in _EMBEDDINGS.items()
        }
        params["norm"] = norm("embeddings.LayerNorm")
        for index in range(BLOCKS):
            params[f"block_{index}"] = {
                **{ours: dense(theirs.format(index)) for ours, theirs in _DENSE.items()},
                **{ours: norm(theirs.format(index)) for ours, theirs in _NORMS.items()},
            }
    except KeyError as error:
        raise DemoError(f"{path} holds no array {error}: not all-MiniLM-L6-v2") from error
    return params
