"""What examples/clients/kauldron_config.py names: model, pretrained weights and data."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from kauldron import kd, kontext

from examples.clients import digits


class Net(nn.Module):
    """The digits' network. The key says what Kauldron feeds it."""

    image: kontext.Key = "batch.image"

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        hidden = nn.relu(nn.Dense(64, name="hidden")(image))
        return nn.Dense(10, name="output")(hidden)


class Pretrained(kd.ckpts.InitTransform):
    """Stands for ``kd.ckpts.PartialKauldronLoader``, which reads a checkpoint."""

    def transform(self, state: Any) -> Any:
        return state.replace(params=jax.tree.map(jnp.asarray, digits.load().pretrained))


class Scans:
    """The noisy scans, one by one."""

    def __init__(self) -> None:
        self.data = digits.load().train

    def __len__(self) -> int:
        return len(self.data["label"])

    def __getitem__(self, row: int) -> digits.Batch:
        return {"image": self.data["image"][row], "label": self.data["label"][row, None]}
