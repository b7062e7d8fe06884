"""The images' setting has the published network, corrupts as it says, and gives a draw.

Weights and pictures come from the package registries and stay in the user's cache, as in the
demo's tests. That the network is the published one was checked against PyTorch once (the features
of two photographs differ by at most 3.1e-6); here its published head must know the photographs.
"""

import gzip

import jax
import numpy as np
import pytest
from scipy.signal import correlate
from sklearn.datasets import load_sample_images

from benchmarks.robustness import corruptions, images, pictures
from benchmarks.robustness.setting import Examples
from examples.demo.assets import cache_directory, fetch
from examples.demo.errors import DemoError

PALACE, DAISY = 698, 985  # ImageNet's classes of scikit-learn's two photographs


@pytest.fixture(scope="module")
def network():
    (path,) = fetch(images.NETWORK, cache_directory(), print)
    return images.load_network(path)


def photographs():
    """The middle of each, at ImageNet's size."""
    middles = np.stack([image[:420, 110:530] for image in load_sample_images().images])
    return jax.image.resize(middles.astype(np.float32), (2, 224, 224, 3), "linear")


def test_the_published_network_knows_photographs(network):
    params, statistics = network
    features = jax.jit(images.encode)(statistics, params["encoder"], photographs())
    found = features @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_array_equal(found.argmax(1), [PALACE, DAISY])


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_a_depthwise_convolution_is_one_of_each_channel(size, stride):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 8, 8, 3)).astype(np.float32)
    layer = images.Depthwise(size, stride)
    variables = layer.init(jax.random.key(0), x)
    found = layer.apply(variables, x) * np.sqrt(1 + 1e-3)  # the normalisation's variance is 1
    missing = size - stride
    margin = (missing // 2, missing - missing // 2)
    padded = np.pad(x, ((0, 0), margin, margin, (0, 0)))
    kernel = np.asarray(variables["params"]["kernel"])
    for example in range(2):
        for channel in range(3):
            full = correlate(padded[example, :, :, channel], kernel[:, :, 0, channel], "valid")
            np.testing.assert_allclose(
                found[example, :, :, channel], full[::stride, ::stride], atol=1e-5
            )


def test_corruptions_have_their_definitions():
    rng = np.random.default_rng(0)
    grey = np.full((3, 64, 64, 1), 0.5, np.float32)
    assert corruptions.noise(grey, 0.1, rng).std() == pytest.approx(0.1, rel=0.03)
    np.testing.assert_allclose(corruptions.brightness(grey, 0.2), 0.7)
    np.testing.assert_allclose(corruptions.defocus(grey, 2.5), 0.5, atol=1e-6)
    point = np.zeros((1, 64, 64, 1), np.float32)
    point[0, 32, 32] = 1
    disk = corruptions.defocus(point, 2.5)[0, :, :, 0]
    assert disk.max() == pytest.approx(1 / (np.pi * 2.5**2), rel=0.02)
    assert disk[32, 35:].sum() == 0
    rows, columns = np.nonzero(disk)
    assert np.hypot(rows - 32, columns - 32).max() < 2.5 + np.sqrt(0.5)

    clouds = corruptions.plasma(3, 2.0, np.random.default_rng(1))
    assert (clouds.min(), clouds.max()) == (0, 1)
    assert not np.array_equal(clouds[0], clouds[1])
    # Neighbours differ little, also over the edge, and more with less decay.
    smooth, rough = (corruptions.plasma(3, d, np.random.default_rng(1)) for d in (2.0, 1.4))
    step, rougher = (np.abs(c - np.roll(c, 1, 1)).mean((0, 2)) for c in (smooth, rough))
    assert step.max() < 0.05
    assert rougher.mean() > 2 * step.mean()
    foggy = corruptions.fog(grey, 2.0, 2.0, np.random.default_rng(1))
    np.testing.assert_allclose(foggy[..., 0], (0.5 + 2 * clouds) * 0.5 / 2.5, rtol=1e-5)


def test_a_seed_draws_real_pictures_and_all_strengths(network, monkeypatch):
    for name, value in {"TRAINING": 50, "VALIDATION": 20, "CORRUPTED": 10, "STEPS": 1}.items():
        monkeypatch.setattr(images, name, value)
    trained, labels, *_ = fetch(images.FASHION, cache_directory(), print)
    clothes = images.read_fashion(trained, labels, 120)
    pool = Examples(clothes.inputs[:100], clothes.labels[:100])
    test = pictures.take(clothes, np.arange(100, 120))
    setting = images.make(network[0]["encoder"], network[1], pool, test)
    draw = setting.draw(0)
    assert {name: len(part) for name, part in draw.tests.items()} == {
        "fashion": 20,
        "noise": 50,
        "brightness": 50,
        "defocus": 50,
        "fog": 50,
    }
    np.testing.assert_array_equal(draw.tests["fog"].labels[10:20], test.labels[:10])
    scores = setting.scores(draw.start, draw.validation)
    assert np.mean(scores.argmax(1) == draw.validation.labels) > 0.4  # 0.1 by chance


def test_depths_and_damaged_files(tmp_path):
    paths = ["encoder/stem/conv/kernel", "encoder/block_0/depthwise/kernel"]
    paths += ["encoder/block_15/project/norm/bias", "encoder/top/norm/scale", "head/bias"]
    assert [images.depth(path) for path in paths] == [-1, 0, 15, 16, 17]
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x02ab"))
    np.testing.assert_array_equal(images.read_idx(path, 2), [97, 98])
    with pytest.raises(DemoError, match=r"x.gz does not hold 3 entries"):
        images.read_idx(path, 3)
