"""The settings with texts: draws are repeatable, scores follow the texts, and retention counts."""

import numpy as np
import pytest

from benchmarks.robustness import sentiment, texts
from examples.demo import data, training
from examples.demo.errors import DemoError
from examples.demo.experiment import Workbench

WIDTH = 8


def made_up(count, seed):
    """Texts whose first token tells the label: below 10 or not."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % 2).astype(np.int32)
    tokens = [[label * 10 + rng.integers(10), *rng.integers(99, size=7)] for label in labels]
    return data.Texts(tokens, labels)


@pytest.fixture
def bench(monkeypatch):
    """An encoder that is a table of the first token's embeddings."""

    def embed(encoder, given, tick=None):
        return encoder["table"][[ids[0] for ids in given.tokens]]

    monkeypatch.setattr(training, "embed", embed)
    table = np.random.default_rng(0).normal(size=(20, WIDTH)).astype(np.float32)
    table[:10, 0] -= 3
    table[10:, 0] += 3
    shifted = {"amazon": made_up(30, 3), "nyt": made_up(700, 4)}
    splits = data.Splits(made_up(200, 0), made_up(600, 1), made_up(40, 2), shifted)
    return Workbench({"table": table}, splits)


def test_a_seed_gives_the_same_draw_and_another_one_does_not(bench):
    tests = {"movie": bench.splits.test, **bench.splits.shifted}
    setting = texts.setting("name", bench, tests, examples=64, retained=None)
    one, same, other = (setting.draw(seed) for seed in (0, 0, 1))
    assert len(one.batches) == setting.steps
    for a, b in zip(one.batches, same.batches, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not np.array_equal(one.batches[0][0], other.batches[0][0])
    assert one.held_out(3)[0].shape == (3, data.BATCH, data.MAX_TOKENS)
    assert one.validation.inputs == bench.splits.validation.tokens[500:]  # those radii do not see
    assert tuple(one.tests) == tuple(setting.tests) == ("movie", "amazon", "nyt")
    assert [len(test) for test in one.tests.values()] == [40, 30, texts.TESTED]
    scores = setting.scores(one.start, one.tests["movie"])
    assert ((scores > 0) == one.tests["movie"].labels).all()  # the probe's head


def test_retention_is_a_probe_on_the_encoder_that_it_gets(bench):
    retained = texts.retention(made_up(100, 5), made_up(1000, 6))
    assert retained(bench.encoder) == 1.0
    table = bench.encoder["table"]
    half = np.where(np.arange(20)[:, None] % 2, 0.0, table)  # odd tokens are all alike
    assert retained({"table": half}) == pytest.approx(0.75, abs=0.05)
    assert retained({"table": np.zeros_like(table)}) == pytest.approx(0.5, abs=0.05)


def test_without_npm_sentiment_is_measured_but_not_what_is_retained(bench, monkeypatch, tmp_path):
    def missing(cache, announce):
        raise DemoError("it needs npm")

    monkeypatch.setattr(sentiment.spam, "splits", missing)
    monkeypatch.setattr(Workbench, "load", lambda cache, announce: bench)
    lines = []
    setting = sentiment.load(tmp_path, lines.append, examples=64)
    assert lines == ["sentiment: the retained accuracy is left out: it needs npm"]
    assert (setting.name, setting.retained) == ("sentiment-64", None)
    assert setting.shifts == ("amazon", "nyt")
