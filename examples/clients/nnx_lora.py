"""Flax NNX with LoRA: a real sentence encoder, of which only small factors A and B are trained.

W becomes W + AB. The pretrained model is AB = 0: the anchor is "zero". ``--qwix`` has Qwix do it.
"""

import sys
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.linear_model import LogisticRegression

import optax_spd
from examples.clients.minilm_nnx import Classifier, load
from examples.demo import data, minilm

RANK, LEARNING_RATE = 8, 2e-3


def add_lora(model: Classifier, *inputs: Any, use_qwix: bool = False) -> Classifier:
    """Puts factors beside the queries' and values' kernels."""
    if use_qwix:
        import qwix

        provider = qwix.LoraProvider(module_path=".*(query|value)", rank=RANK, alpha=RANK)
        return qwix.apply_lora_to_model(model, provider, *inputs, rngs=nnx.Rngs(0))
    for index in range(minilm.BLOCKS):
        block = getattr(model.encoder, f"block_{index}")
        for name in ("query", "value"):
            layer, size = getattr(block, name), minilm.HIDDEN
            rngs = nnx.Rngs(index)
            setattr(block, name, nnx.LoRA(size, RANK, size, base_module=layer, rngs=rngs))
    return model


def loss_fn(model: Classifier, tokens: Any, mask: Any, labels: Any) -> jax.Array:
    return optax.sigmoid_binary_cross_entropy(model(tokens, mask), labels).mean()


@nnx.jit
def train_step(model: Classifier, optimizer: nnx.Optimizer, batch: Any) -> None:
    factors = nnx.DiffState(0, nnx.LoRAParam)
    optimizer.update(model, nnx.grad(loss_fn, argnums=factors)(model, *batch))


def main(steps: int = 48, tests: int = 256, use_qwix: bool = False) -> dict[str, Any]:
    encoder, splits = load()
    model = Classifier(encoder)
    padded, texts = (lambda chosen: data.pad(chosen, data.MAX_TOKENS)), splits.training(512, seed=0)
    embeddings = nnx.jit(lambda m, x: m.encoder(*x))(model, padded(texts)[:2])
    probe = LogisticRegression(C=0.1).fit(embeddings, texts.labels)
    nnx.update(model.head, {"kernel": probe.coef_.T, "bias": probe.intercept_})

    rows = np.random.default_rng(0).permutation(len(texts) * 2) % len(texts)
    batches = [padded(texts.take(chosen)) for chosen in rows.reshape(-1, 16)[:steps]]
    domains = {"movie": splits.test, "amazon": splits.shifted["amazon"]}
    held_out = {name: padded(texts.first(tests)) for name, texts in domains.items()}
    predict = nnx.jit(lambda model, tokens, mask: model(tokens, mask) > 0)

    result: dict[str, Any] = {}
    spd = optax_spd.adam_spd(LEARNING_RATE, anchor="zero")
    for kind, tx in {"before": None, "adam": optax.adam(LEARNING_RATE), "spd": spd}.items():
        tuned = add_lora(nnx.clone(model), *batches[0][:2], use_qwix=use_qwix)
        optimizer = nnx.Optimizer(tuned, tx or optax.identity(), wrt=nnx.LoRAParam)
        for batch in batches if tx else ():
            train_step(tuned, optimizer, batch)
        factors = jax.tree.leaves(nnx.state(tuned, nnx.LoRAParam))  # A, B, A, B, ...
        changes = [np.linalg.norm(a @ b) for a, b in zip(factors[::2], factors[1::2], strict=True)]
        right = {name: predict(tuned, *x[:2]) == x[2] for name, x in held_out.items()}
        result[kind] = {name: float(np.mean(found)) for name, found in right.items()}
        result[kind]["distance"] = float(np.linalg.norm(changes))  # of W + AB from W
        result[kind]["state_bytes"] = sum(x.nbytes for x in jax.tree.leaves(optimizer.opt_state))
        print(f"{kind:6}" + "".join(f"  {k} {v:.6g}" for k, v in result[kind].items()))
    return result


if __name__ == "__main__":
    main(use_qwix="--qwix" in sys.argv)
