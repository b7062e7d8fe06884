"""The demo's sentence encoder in Flax NNX, with the names of the demo's parameters; its data."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.demo import assets, data, minilm


class Block(nnx.Module):
    """A transformer block; input and output are rows, (batch * length, hidden)."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        size, inner = minilm.HIDDEN, minilm.INNER
        for name in ("query", "key", "value", "attention_out"):
            setattr(self, name, nnx.Linear(size, size, rngs=rngs))
        self.feed_forward_in = nnx.Linear(size, inner, rngs=rngs)
        self.feed_forward_out = nnx.Linear(inner, size, rngs=rngs)
        for name in ("attention_norm", "feed_forward_norm"):
            setattr(self, name, nnx.LayerNorm(size, epsilon=minilm.NORM_EPSILON, rngs=rngs))

    def __call__(self, rows: jax.Array, mask: jax.Array) -> jax.Array:
        heads = lambda x: x.reshape(*mask.shape, minilm.HEADS, -1)
        query, key, value = (heads(layer(rows)) for layer in (self.query, self.key, self.value))
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
        rows = self.attention_norm(rows + self.attention_out(mixed.reshape(rows.shape)))
        inner = nnx.gelu(self.feed_forward_in(rows), approximate=False)
        return self.feed_forward_norm(rows + self.feed_forward_out(inner))


class Encoder(nnx.Module):
    """Maps token ids and their mask, (batch, length), to mean-pooled embeddings."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        size = minilm.HIDDEN
        self.word = nnx.Embed(minilm.VOCABULARY, size, rngs=rngs)
        self.position = nnx.Embed(minilm.POSITIONS, size, rngs=rngs)
        self.token_type = nnx.Embed(2, size, rngs=rngs)
        self.norm = nnx.LayerNorm(size, epsilon=minilm.NORM_EPSILON, rngs=rngs)
        for index in range(minilm.BLOCKS):
            setattr(self, f"block_{index}", Block(rngs))

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        table = self.word(tokens) + self.position(jnp.arange(tokens.shape[1]))
        rows = self.norm(table + self.token_type(jnp.zeros((), jnp.int32)))
        rows = rows.reshape(-1, minilm.HIDDEN)
        for index in range(minilm.BLOCKS):
            rows = getattr(self, f"block_{index}")(rows, mask)
        hidden = rows.reshape(*tokens.shape, minilm.HIDDEN)
        weights = mask[:, :, None].astype(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)


class Classifier(nnx.Module):
    """The encoder with a linear head: one logit per text, positive for positive sentiment."""

    def __init__(self, encoder: dict[str, Any]) -> None:
        self.encoder = Encoder(nnx.Rngs(0))
        nnx.update(self.encoder, jax.tree.map(jnp.asarray, encoder))
        self.head = nnx.Linear(minilm.HIDDEN, 1, rngs=nnx.Rngs(0))

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return self.head(self.encoder(tokens, mask))[:, 0]


def load() -> tuple[dict[str, Any], data.Splits]:
    """The encoder's pretrained parameters, and rated texts; downloaded once."""
    wanted = (assets.MINILM, assets.SENTIMENT)
    weights, tokenizer, archive = (
        path for asset in wanted for path in assets.fetch(asset, assets.cache_directory(), print)
    )
    splits = data.make_splits(data.read_domains(archive), data.load_tokenizer(tokenizer))
    return minilm.load_encoder(weights), splits
