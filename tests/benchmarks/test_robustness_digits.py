"""The digits' setting has the published network and the data that it says, and trains.

Weights and digits come from the package registries and stay in the user's cache, as in the demo's
tests.
"""

import jax
import matplotlib.image
import numpy as np
import pytest
from scipy.signal import correlate

from benchmarks.robustness import digits, pictures
from benchmarks.robustness.setting import Examples
from examples.demo.assets import Asset, cache_directory, fetch
from examples.demo.errors import DemoError

# Of SVHN, in the network's package.
SAMPLES = {
    0: "302902286b14275ea6a7a3c908952ef2c9270b7d9e9d9e8d0f4859c60fbc34f1",
    1: "6380bb271ca24b00f49432b0fc1fa832f2f55304aff4c3a99411cc3ac52644c2",
    2: "122b06b697355404f0804dc26f67c10e5e654204accecc14ac5ea34398e75a9f",
    5: "ecd2faeeaaf9f076532efe6aa3e0bf9618a684f7b5f5c10995377657cabb87ca",
}


@pytest.fixture(scope="module")
def network():
    (path,) = fetch(digits.NETWORK, cache_directory(), print)
    return digits.load_network(path)


@pytest.fixture(scope="module")
def samples():
    members = {f"ccexam/samples/svhn_digit_{n}.png": digest for n, digest in SAMPLES.items()}
    paths = fetch(Asset("ccexam", "1.0.0", "wheel", members), cache_directory(), print)
    return np.stack([matplotlib.image.imread(path)[..., :3] for path in paths])


@pytest.fixture
def small(monkeypatch):
    for name, value in {
        "STEPS": 2,
        "TRAINING": 100,
        "VALIDATION": 60,
        "HELD_OUT": 96,
        "TEST": 40,
    }.items():
        monkeypatch.setattr(digits, name, value)
    monkeypatch.setattr(pictures, "EVALUATION_BATCH", 50)
    # Every picture is another one, and tells its label.
    labels = np.arange(300, dtype=np.int32) % 10
    inputs = np.random.default_rng(0).uniform(0, 0.1, (300, 32, 32, 1)).astype(np.float32)
    inputs[np.arange(300), 3 * labels] += 0.9
    return Examples(inputs, labels)


def by_numpy(params, statistics, picture):
    """The network's output for one picture, from the layers' definitions."""
    x = (picture - digits.MEAN) / digits.DEVIATION
    for block in range(3):
        arrays, running = params["encoder"][f"block_{block}"], statistics[f"block_{block}"]
        for index in range(2):
            conv, norm = arrays[f"conv_{index}"], arrays[f"norm_{index}"]
            padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
            kernels = np.moveaxis(conv["kernel"], -1, 0)
            out = [correlate(padded, kernel, "valid")[..., 0] for kernel in kernels]
            y = np.stack(out, -1) + conv["bias"]
            mean, var = running[f"norm_{index}"]["mean"], running[f"norm_{index}"]["var"]
            x = np.maximum((y - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"], 0)
        height, width, channels = x.shape
        x = x.reshape(height // 2, 2, width // 2, 2, channels).max((1, 3))
    for layer in (params["encoder"]["hidden"], params["head"]):
        x = np.maximum(x, 0).ravel() @ layer["kernel"] + layer["bias"]
    return x


def test_the_published_network_reads_house_numbers(network, samples):
    params, statistics = network
    features = np.asarray(jax.jit(digits.encode)(statistics, params["encoder"], samples))
    found = features @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_array_equal(found.argmax(1), list(SAMPLES))
    np.testing.assert_allclose(found[0], by_numpy(*network, samples[0]), atol=1e-4)


def test_the_real_digits_and_their_framings():
    mnist = digits.read_mnist(fetch(digits.MNIST, cache_directory(), print))
    assert mnist.inputs.shape == (10000, 32, 32, 1)
    assert (mnist.inputs.min(), mnist.inputs.max()) == (0, 1)
    counts = [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978]
    np.testing.assert_array_equal(np.bincount(mnist.labels), counts)
    filled, small = digits.optdigits(32), digits.optdigits(20)
    assert small.inputs[:, 6:26, 6:26].sum() == pytest.approx(small.inputs.sum())
    assert filled.inputs.sum() / small.inputs.sum() == pytest.approx((32 / 20) ** 2, rel=0.02)


def test_a_seed_draws_disjoint_sets_and_a_method_learns(network, small):
    setting = digits.make(network[0]["encoder"], network[1], small)
    one, same, other = setting.draw(1), setting.draw(1), setting.draw(2)
    assert one.tests is other.tests
    assert tuple(one.tests) == setting.tests
    np.testing.assert_array_equal(one.batches[0][0], same.batches[0][0])
    assert not np.array_equal(one.batches[0][0], other.batches[0][0])
    np.testing.assert_allclose(one.tests["inverted"].inputs, 1 - one.tests["mnist"].inputs)

    # 100 pictures make two batches of 48, so two steps are an epoch.
    drawn = np.concatenate([batch[0] for batch in one.batches])
    assert [array.shape for array in one.held_out(2)] == [(2, 48, 32, 32, 1), (2, 48)]
    parts = [drawn, one.validation.inputs, one.tests["mnist"].inputs, *one.held_out(2)[0]]
    assert len(np.unique(np.concatenate(parts), axis=0)) == 96 + 60 + 40 + 96

    gradient = jax.jit(jax.value_and_grad(setting.loss))
    before, grads = gradient(one.start, one.batches[0])
    assert all(np.any(g != 0) for g in jax.tree.leaves(grads["head"]))
    moved = jax.tree.map(lambda p, g: p - 1e-4 * g, one.start, grads)
    after, _ = gradient(moved, one.batches[0])
    assert after < before
    assert setting.scores(one.start, one.validation).shape == (60, 10)


def test_depths_and_missing_arrays(tmp_path):
    paths = ["encoder/block_0/conv_1/bias", "encoder/block_2/norm_0/scale"]
    paths += ["encoder/hidden/kernel", "head/bias"]
    assert [digits.depth(path) for path in paths] == [0, 2, 3, 4]
    (tmp_path / "0.json").write_text('{"data": [1, 2]}')
    with pytest.raises(DemoError, match=r"0.json does not hold digits"):
        digits.read_mnist([tmp_path / "0.json"])
