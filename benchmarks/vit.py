"""A ViT's parameter tree, with gradients for which SPD fires in a given share of its layers."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any

# The parameters' distance from the anchor, too large for any run's steps to cover.
OFFSET = 1e-2


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of a ViT; the defaults are ViT-B/16 at 224 pixels with 1000 classes."""

    width: int = 768
    mlp: int = 3072
    depth: int = 12
    patch: int = 16
    tokens: int = 197
    classes: int = 1000


SCALES = {
    "vit-b16": Scale(),
    "small": Scale(32, 128, 1, 4, 65, 10),
    # 0.99 billion parameters. AdamW's float32 step then fills 15.8 of a TPU v5e's 16.9 GB.
    "vit-1b": Scale(1280, 5120, 50),
}


def vit_shapes(scale: Scale) -> Tree:
    """The parameter shapes of a ViT with fused query, key and value: 12 arrays a block, and 8."""
    width, mlp = scale.width, scale.mlp

    def norm() -> Tree:
        return {"scale": (width,), "bias": (width,)}

    def dense(*sizes: int) -> Tree:
        return {"kernel": sizes, "bias": sizes[-1:]}

    def block() -> Tree:
        attention = {"qkv": dense(width, 3 * width), "out": dense(width, width)}
        feed_forward = {"in": dense(width, mlp), "out": dense(mlp, width)}
        return {"norm_1": norm(), "attention": attention, "norm_2": norm(), "mlp": feed_forward}

    return {
        "patch_embedding": dense(scale.patch, scale.patch, 3, width),
        "class_token": (1, 1, width),
        "position_embedding": (1, scale.tokens, width),
        **{f"block_{i:02}": block() for i in range(scale.depth)},
        "norm": norm(),
        "head": dense(width, scale.classes),
    }


def image_shape(scale: Scale) -> tuple[int, int, int]:
    """Height, width and channels of the images, for one token per patch and a class token."""
    side = math.isqrt(scale.tokens - 1) * scale.patch
    return side, side, 3


def loss(params: Tree, images: jax.Array, scale: Scale) -> jax.Array:
    """The forward pass of the ViT, and a loss that needs no labels."""
    heads = max(1, scale.width // 64)

    def norm(p: Tree, x: jax.Array) -> jax.Array:
        normed: jax.Array = jax.nn.standardize(x) * p["scale"] + p["bias"]
        return normed

    def dense(p: Tree, x: jax.Array) -> jax.Array:
        result: jax.Array = x @ p["kernel"] + p["bias"]
        return result

    def attention(p: Tree, x: jax.Array) -> jax.Array:
        qkv = dense(p["qkv"], x).reshape(*x.shape[:2], 3, heads, -1)
        mixed = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return dense(p["out"], mixed.reshape(x.shape))

    def block(p: Tree, x: jax.Array) -> jax.Array:
        x = x + attention(p["attention"], norm(p["norm_1"], x))
        return x + dense(p["mlp"]["out"], jax.nn.gelu(dense(p["mlp"]["in"], norm(p["norm_2"], x))))

    kernel = params["patch_embedding"]["kernel"]
    patches = jax.lax.conv_general_dilated(
        images, kernel, kernel.shape[:2], "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = patches.reshape(len(images), -1, scale.width) + params["patch_embedding"]["bias"]
    token = jnp.broadcast_to(params["class_token"], (len(images), 1, scale.width))
    x = jnp.concatenate([token, x], axis=1) + params["position_embedding"]
    for index in range(scale.depth):
        x = block(params[f"block_{index:02}"], x)
    logits = dense(params["head"], norm(params["norm"], x[:, 0]))
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[:, 0])


def is_shape(node: Any) -> bool:
    """Whether a node of :func:`vit_shapes` is one array's shape."""
    return isinstance(node, tuple)


def make_trees(scale: Scale, fire: float) -> tuple[Tree, Tree, Tree]:
    """Anchor, parameters and gradients of a ViT, as :func:`trees_of` makes them."""
    return trees_of(vit_shapes(scale), fire)


def trees_of(shapes_tree: Tree, fire: float) -> tuple[Tree, Tree, Tree]:
    """Anchor, parameters and gradients (NumPy) for which SPD fires in a share of the arrays.

    SPD fires where the gradient points along the deviation Δ although the step makes Δ longer. With
    Adam and a constant gradient this holds in every step if a few large gradient entries point
    along Δ and many small ones against it: the few dominate ⟨g, Δ⟩, but Adam's step, about
    -η sign(g), follows the many. Where SPD must not fire, the gradient is negated.
    """
    shapes, treedef = jax.tree.flatten(shapes_tree, is_leaf=is_shape)
    rng = np.random.default_rng(0)
    anchor = [0.02 * rng.standard_normal(shape, np.float32) for shape in shapes]
    # Drawn at random, so that kernels and biases fire alike.
    firing = set(rng.permutation(len(shapes))[: round(fire * len(shapes))].tolist())

    def gradient(index: int, shape: tuple[int, ...]) -> np.ndarray:
        along = np.arange(np.prod(shape)).reshape(shape) % 4 == 0
        sign = 1e-3 if index in firing else -1e-3
        return np.where(along, np.float32(8 * sign), np.float32(-sign))

    grads = [gradient(i, shape) for i, shape in enumerate(shapes)]
    params = [array + np.float32(OFFSET) for array in anchor]
    return (
        jax.tree.unflatten(treedef, anchor),
        jax.tree.unflatten(treedef, params),
        jax.tree.unflatten(treedef, grads),
    )
