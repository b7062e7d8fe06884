"""Four corruptions of pictures at five strengths: noise, brightness, defocus, fog.

From their definitions in Hendrycks and Dietterich (Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations, ICLR 2019), for grey pictures, (count, 64, 64, 1), from 0 to 1. The
result is cut off at 0 and 1.

- noise: x + σε, ε standard normal, σ = 0.08, 0.12, 0.18, 0.26, 0.38
- brightness: x + c, c = 0.1, 0.2, 0.3, 0.4, 0.5 (the value channel of a grey picture)
- defocus: x convolved with a disk of radius 3, 4, 6, 8, 10 times 64/224, the ratio of the sizes
- fog: (x + cF) m / (m + c), m = max x, F a plasma fractal from 0 to 1 with decay d,
  (c, d) = (1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)

Noise, brightness and fog have ImageNet-C's constants. The disk has no further smoothing, and the
fractal is as large as the picture, so figures are not to be compared with ImageNet-C's.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import convolve  # type: ignore[import-untyped]

SIZE = 64
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)
RADII = tuple(radius * SIZE / 224 for radius in (3, 4, 6, 8, 10))
FOG = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))


def corrupted(x: np.ndarray) -> dict[str, np.ndarray]:
    """All strengths of each corruption, one after the other."""
    rng = np.random.default_rng(0)
    strengths = {
        "noise": [noise(x, sigma, rng) for sigma in NOISE],
        "brightness": [brightness(x, shift) for shift in BRIGHTNESS],
        "defocus": [defocus(x, radius) for radius in RADII],
        "fog": [fog(x, amount, decay, rng) for amount, decay in FOG],
    }
    return {name: np.clip(np.concatenate(made), 0, 1) for name, made in strengths.items()}


def noise(x: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Adds normal noise."""
    noisy: np.ndarray = x + sigma * rng.standard_normal(x.shape, np.float32)
    return noisy


def brightness(x: np.ndarray, shift: float) -> np.ndarray:
    """Adds a constant."""
    return x + shift


def defocus(x: np.ndarray, radius: float) -> np.ndarray:
    """Averages over a disk; a pixel on its edge counts by the share that is inside."""
    reach, parts = int(np.ceil(radius)), 16
    centres = (np.arange((2 * reach + 1) * parts) + 0.5) / parts - reach - 0.5
    inside = centres[:, None] ** 2 + centres**2 <= radius**2
    disk = inside.reshape(2 * reach + 1, parts, 2 * reach + 1, parts).mean((1, 3))
    blurred: np.ndarray = convolve(x, (disk / disk.sum())[None, :, :, None], mode="reflect")
    return blurred


def fog(x: np.ndarray, amount: float, decay: float, rng: np.random.Generator) -> np.ndarray:
    """Mixes each picture with its own plasma fractal, and keeps the brightest value."""
    brightest = x.max((1, 2, 3), keepdims=True)
    clouds = plasma(len(x), decay, rng)[..., None]
    foggy: np.ndarray = (x + amount * clouds) * brightest / (brightest + amount)
    return foggy


def plasma(count: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """Plasma fractals from 0 to 1, (count, 64, 64), which continue at the opposite edge.

    The diamond-square algorithm (Fournier, Fussell and Carpenter, Computer Rendering of Stochastic
    Models, 1982): a point between four known ones is their mean and a random number, first in the
    middle of squares, then of diamonds. Each halving divides the random numbers by decay², as the
    corruptions' authors do, who divide both a factor and the range by `decay`.
    """
    height = np.zeros((count, SIZE, SIZE), np.float32)
    step, spread = SIZE, 1.0
    while step > 1:
        half = step // 2

        def random(shape: tuple[int, ...], spread: float = spread) -> np.ndarray:
            return spread * rng.uniform(-1, 1, shape).astype(np.float32)

        corners = height[:, ::step, ::step]
        below = np.roll(corners, -1, 1)
        right, across = np.roll(corners, -1, 2), np.roll(below, -1, 2)
        middles = (corners + below + right + across) / 4 + random(corners.shape)
        height[:, half::step, half::step] = middles
        beside = (corners + right + middles + np.roll(middles, 1, 1)) / 4
        height[:, ::step, half::step] = beside + random(corners.shape)
        under = (corners + below + middles + np.roll(middles, 1, 2)) / 4
        height[:, half::step, ::step] = under + random(corners.shape)
        step, spread = half, spread / decay**2
    height -= height.min((1, 2), keepdims=True)
    clouds: np.ndarray = height / height.max((1, 2), keepdims=True)
    return clouds
