"""The task of these examples: scans of handwritten digits, and a small pretrained network.

The network is pretrained on 1000 clean scans of scikit-learn's digits. It is then fine-tuned on 200
others with noise, and tested on 597 more: with noise (the task) and clean (what it knew before).
"""

from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

Batch = dict[str, np.ndarray]  # "image": (batch, 64), "label": (batch,)


class Digits(NamedTuple):
    """What an example needs.

    Attributes:
      pretrained: the network's weights, {"hidden": {"kernel", "bias"}, "output": {...}}.
      train: 200 noisy scans.
      noisy: the test scans with noise.
      clean: the same scans without.
    """

    pretrained: dict[str, Any]
    train: Batch
    noisy: Batch
    clean: Batch


def load() -> Digits:
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(images))
    images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    noisy = ((images + rng.uniform(size=images.shape)) / 2).astype(np.float32)

    net = MLPClassifier((64,), max_iter=500, tol=1e-2, random_state=0)
    net.fit(images[:1000], labels[:1000])
    names = ("hidden", "output")
    pretrained = {
        name: {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
        for name, kernel, bias in zip(names, net.coefs_, net.intercepts_, strict=True)
    }

    def part(source: np.ndarray, rows: slice) -> Batch:
        return {"image": source[rows], "label": labels[rows]}

    tuning, test = slice(1000, 1200), slice(1200, None)
    return Digits(pretrained, part(noisy, tuning), part(noisy, test), part(images, test))


def batches(data: Batch, steps: int, size: int = 8) -> list[Batch]:
    """``steps`` random batches, the same in every example."""
    rng = np.random.default_rng(0)
    rows = [rng.choice(len(data["label"]), size, replace=False) for _ in range(steps)]
    return [{key: values[chosen] for key, values in data.items()} for chosen in rows]


def accuracy(logits: Any, batch: Batch) -> float:
    return float(np.mean(np.argmax(logits, axis=-1) == batch["label"]))
