"""Tunix: its PeftTrainer, unchanged, with SPD, a chain, FTP or LoRA, and a restart in the middle.

It makes the optimizer's state from the model that it gets: load the pretrained weights before.
"""

import sys
import tempfile
from typing import Any

import jax
import numpy as np
import optax
import qwix
from flax import nnx
from orbax.checkpoint import CheckpointManagerOptions
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

import optax_spd
from examples.clients import digits

CLIP = optax.clip_by_global_norm(1.0)
OPTIMIZERS = {
    "spd": optax_spd.adam_spd(3e-3, weight_decay=2.0),
    "chain": optax_spd.chain(CLIP, optax.adam(3e-3), optax_spd.spd(2.0)),
    "ftp": optax_spd.adam_ftp(3e-3),
    "lora": optax_spd.adam_spd(3e-3, weight_decay=2.0, anchor="zero"),
}


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.output = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, image: Any) -> jax.Array:
        return self.output(nnx.relu(self.hidden(image)))


def loss_fn(model: Net, image: Any, label: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(image), label).mean()


def train(kind: str, data: digits.Digits, steps: int, directory: str, total: int) -> PeftTrainer:
    """Trains up to ``steps`` steps; goes on from the newest checkpoint if there is one."""
    model = Net(nnx.Rngs(0))
    nnx.update(model, jax.device_put(data.pretrained))
    if kind == "lora":
        provider = qwix.LoraProvider(module_path=".*", rank=4, alpha=4.0)
        model = qwix.apply_lora_to_model(model, provider, data.train["image"], rngs=nnx.Rngs(1))
    options = CheckpointManagerOptions(save_interval_steps=total // 2)
    config = TrainingConfig(eval_every_n_steps=total, max_steps=steps, pbar_description=None)
    config.checkpoint_root_directory, config.checkpointing_options = directory, options
    trainer = PeftTrainer(model, OPTIMIZERS[kind], config).with_loss_fn(loss_fn)
    trainer.train(digits.batches(data.train, total))
    return trainer


def main(steps: int = 200, kinds: tuple[str, ...] = tuple(OPTIMIZERS)) -> dict[str, Any]:
    data, result = digits.load(), {}
    for kind in kinds:
        with tempfile.TemporaryDirectory() as straight, tempfile.TemporaryDirectory() as split:
            trainer = train(kind, data, steps, straight, steps)
            train(kind, data, steps // 2, split, steps)
            resumed = train(kind, data, steps, split, steps)  # restored, then the second half
        wrt, anchor = (nnx.LoRAParam, "zero") if kind == "lora" else (nnx.Param, data.pretrained)
        params = nnx.state(resumed.model, wrt)
        optax_spd.check_state(resumed.optimizer.opt_state, params)
        ends = [jax.tree.leaves(nnx.state((t.model, t.optimizer))) for t in (trainer, resumed)]
        result[kind] = {
            "noisy": digits.accuracy(trainer.model(data.noisy["image"]), data.noisy),
            "clean": digits.accuracy(trainer.model(data.clean["image"]), data.clean),
            "distance": optax_spd.layer_report(params, anchor).total,
            "restart_equal": all(map(np.array_equal, *ends)),
        }
        print(kind, *(f"  {k} {v:.3f}" for k, v in result[kind].items()))
    return result


if __name__ == "__main__":
    main(kinds=tuple(sys.argv[1:]) or tuple(OPTIMIZERS))
