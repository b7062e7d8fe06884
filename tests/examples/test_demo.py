"""The demo in examples/demo runs end to end, its encoder is MiniLM, and its arithmetic is right.

Weights and data come from the package index, as they do for a user. They are kept in the user's
cache directory (or OPTAX_SPD_CACHE), so only the first run downloads.
"""

import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from hashlib import sha256
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_demo
from rich.console import Console

from examples.demo import (
    assets,
    data,
    experiment,
    low_data,
    methods,
    pictures,
    report,
    scores,
    trace,
    training,
)
from examples.demo.__main__ import main
from examples.demo.errors import DemoError, DivergedError
from examples.demo.minilm import load_encoder

REPOSITORY = Path(__file__).parents[2]
REFERENCE = json.loads((REPOSITORY / "tests" / "data" / "minilm_reference.json").read_text())


@pytest.fixture(scope="module")
def minilm():
    return assets.fetch(assets.MINILM, assets.cache_directory(), print)


@pytest.fixture(scope="module")
def bench():
    """The real data, and of the real encoder the first block."""
    with pytest.MonkeyPatch.context() as patch:
        small_demo.shrink(patch)
        made = experiment.Workbench.load(assets.cache_directory(), print)
    jax.config.update("jax_compilation_cache_dir", None)
    return made


@pytest.fixture
def small(bench, monkeypatch):
    """Lets real runs be short; in one process they share their compiled programs."""
    small_demo.shrink(monkeypatch)
    monkeypatch.setattr(experiment.Workbench, "load", lambda *_: bench)


def test_labels_are_signs_and_texts_are_cleaned():
    lines = ["1\t0.51\tfish &amp; chips  &lt;3", "2\t-0.51\tbad\u2028one", "3\t0.5\tnear neutral"]
    lines += ["4\t-4\tfish & chips <3", ""]  # of equal texts the first counts
    found = data.parse("\r\n".join(lines).encode(), "f")
    assert found == {"fish & chips <3": 1, "bad one": 0}


@pytest.mark.parametrize("line", ["2\t1.0", "2\tmuch\ttext", "2\t4.5\ttext", "2\tnan\ttext"])
def test_a_malformed_line_is_named(line):
    with pytest.raises(DemoError, match=r"reviews.txt, line 2: expected id, rating"):
        data.parse(f"1\t1.0\tfine\r\n{line}\r\n".encode(), "reviews.txt")


def test_the_real_sets_have_their_published_sizes_and_disjoint_splits(minilm):
    (archive,) = assets.fetch(assets.SENTIMENT, assets.cache_directory(), print)
    domains = data.read_domains(archive)
    sizes = {name: len(labels) for name, labels in domains.items()}
    assert sizes == {"movie": 10041, "amazon": 2935, "nyt": 2751, "tweets": 3362}
    positive = {name: sum(labels.values()) for name, labels in domains.items()}
    assert positive == {"movie": 4981, "amazon": 1719, "nyt": 1088, "tweets": 2300}

    splits = data.make_splits(domains, data.load_tokenizer(minilm[1]))
    assert len(splits.validation) == len(splits.test) == 2000
    one, same, other = (splits.training(512, seed) for seed in (1, 1, 2))
    assert (len(one), one.labels.sum()) == (512, 256)
    assert one.tokens == same.tokens != other.tokens
    # Two different snippets may share their first 32 tokens, but hardly more than a few do.
    held_out = {tuple(ids) for part in (splits.validation, splits.test) for ids in part.tokens}
    assert sum(tuple(ids) in held_out for ids in one.tokens) <= 2


def made_up_texts(count):
    """Texts of different lengths; the first token is the text's number."""
    rng = np.random.default_rng(0)
    tokens = [[i, *rng.integers(1, 1000, rng.integers(3, 32)).tolist()] for i in range(count)]
    return data.Texts(tokens, rng.integers(0, 2, count))


@pytest.mark.parametrize("kind", ["evaluation", "training", "validation"])
def test_batches_go_through_all_texts_evenly_with_their_labels(kind):
    texts = made_up_texts(80)
    if kind == "evaluation":
        # The last batch of a length is filled up with repetitions.
        found = [(n, b) for n, b in data.evaluation_batches(texts)]
        batches, visits = [[array[: len(n)] for array in b] for n, b in found], 1
    elif kind == "training":
        batches, visits = list(data.training_batches(texts, 10, seed=3)), 2  # two epochs
    else:
        batches, visits = list(zip(*data.validation_batches(texts, 10, seed=3), strict=True)), 2
    seen = []
    for tokens, mask, labels in batches:
        assert tokens.shape[1] in data.BUCKETS
        for row, kept, label in zip(tokens, mask, labels, strict=True):
            number = row[0]
            assert row[kept].tolist() == texts.tokens[number]
            assert label == texts.labels[number]
            seen.append(number)
    assert np.bincount(seen, minlength=80).tolist() == [visits] * 80


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


def fake_client(monkeypatch, pack):
    """Replaces the client: `pack(directory)` writes the archive in place of a download."""
    real = subprocess.run

    def run(command, **options):
        if command[0] == "dpkg-deb":
            return real(command, **options)
        commands.append(command)
        pack(Path(options["cwd"]))
        return subprocess.CompletedProcess(command, 0, "", "")

    commands = []
    monkeypatch.setattr(assets.subprocess, "run", run)
    return commands


def pack_tar(directory, name="a.tgz"):
    with tarfile.open(directory / name, "w:gz") as archive:
        for member, content in FILES.items():
            entry = tarfile.TarInfo(f"./{member}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def pack_deb(directory):
    """A Debian package is an `ar` archive with two tar archives."""
    pack_tar(directory, "data.tar.gz")
    data = (directory / "data.tar.gz").read_bytes()
    (directory / "data.tar.gz").unlink()
    parts = {"debian-binary": b"2.0\n", "control.tar.gz": data, "data.tar.gz": data}
    package = b"!<arch>\n"
    for name, content in parts.items():
        package += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        package += content + b"\n" * (len(content) % 2)
    (directory / "a.deb").write_bytes(package)


def pack_wheel(directory):
    with zipfile.ZipFile(directory / "a.whl", "w") as archive:
        for member, content in FILES.items():
            archive.writestr(f"./{member}", content)


FILES = {"one/file.bin": b"first", "two/file.bin": b"second"}  # equal base names
CLIENTS = {
    "npm": (pack_tar, "npm pack --loglevel=error @scope/package@1.0"),
    "deb": (pack_deb, "apt-get download @scope/package=1.0"),
    "wheel": (pack_wheel, f"{sys.executable} -m pip download"),
    "sdist": (pack_tar, f"{sys.executable} -m pip download"),
}


@pytest.mark.parametrize("kind", CLIENTS)
def test_every_client_and_archive(kind, tmp_path, monkeypatch):
    if kind == "deb" and shutil.which("dpkg-deb") is None:
        pytest.skip("no dpkg-deb")
    pack, expected = CLIENTS[kind]
    commands = fake_client(monkeypatch, pack)
    digests = {f"./{name}": sha256(content).hexdigest() for name, content in FILES.items()}
    asset = assets.Asset("@scope/package", "1.0", kind, digests)
    for _ in range(2):  # the second time from the cache
        paths = assets.fetch(asset, tmp_path, print)
        assert [path.read_bytes() for path in paths] == list(FILES.values())
    (command,) = commands
    assert " ".join(command).startswith(expected)
    assert [path.name for path in tmp_path.iterdir()] == ["@scope"]


def test_an_archive_can_be_kept_whole(tmp_path, monkeypatch):
    fake_client(monkeypatch, lambda directory: (directory / "a.tgz").write_bytes(b"all"))
    asset = assets.Asset("package", "1.0", "npm", {"": sha256(b"all").hexdigest()})
    (path,) = assets.fetch(asset, tmp_path, print)
    assert path.read_bytes() == b"all"


def test_a_file_with_a_wrong_hash_is_refused_and_not_kept(tmp_path, monkeypatch):
    fake_client(monkeypatch, pack_wheel)
    asset = assets.Asset("package", "1.0", "wheel", {"./one/file.bin": "0" * 64})
    with pytest.raises(DemoError, match=r"refused ./one/file.bin .* expected 0000"):
        assets.fetch(asset, tmp_path, print)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "client"), [("npm", "npm"), ("deb", "apt-get")])
def test_a_missing_client_is_named(kind, client, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    asset = assets.Asset("package", "1.0", kind, {"file": "0" * 64})
    with pytest.raises(DemoError, match=f"cannot download package 1.0: it needs {client}, which"):
        assets.fetch(asset, tmp_path, print)


def made_up_params():
    """A small tree with the paths that the methods know; every array costs compilation."""
    square = np.random.default_rng(0).normal(size=(2, 2)).astype(np.float32)
    norm = {"scale": np.ones(2, np.float32), "bias": np.zeros(2, np.float32)}
    block = {"query": {"kernel": square, "bias": norm["bias"]}, "feed_forward_norm": norm}
    encoder = {table: {"embedding": square} for table in ("word", "position", "token_type")}
    head = {"kernel": np.ones((2, 1), np.float32), "bias": np.ones(1, np.float32)}
    encoder |= {"norm": norm, "block_0": block, "block_1": block}
    return {"encoder": encoder, "head": head}


def half_square(params, batch):
    return optax.tree.norm(params, squared=True) / 2


REAL_RUN = ("adam", "spd", "ftp")  # methods of the short real run


@pytest.mark.parametrize(
    "name", [n for n, m in methods.METHODS.items() if m.optimizer and n not in REAL_RUN]
)
def test_every_other_method_starts_trains_and_stays_finite(name):
    method = methods.METHODS[name]
    held_out = None
    if method.validates_every:  # without, the radii stay at half of the first step
        held_out = (np.zeros((1, 1, 1), np.int32), np.ones((1, 1, 1), bool), np.zeros((1, 1)))
    start = made_up_params()
    tx = method.optimizer(training.schedule(method.rate * 3e-4, 20))
    params, state = jax.tree.map(jnp.array, start), tx.init(start)
    for _ in range(20):
        grads = jax.tree.map(jnp.copy, params)  # of half_square
        params, state = training.apply_gradient(tx, params, state, grads, held_out, half_square)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert float(params["head"]["bias"][0]) < 0.9998
    assert (training._radii(params, state) is not None) == (name == "tpgm")
    assert (training._balance(params, state)[0] is not None) == (name == "temp-balance")


def test_tpgm_after_training_projects_onto_balls_that_it_learned(monkeypatch):
    monkeypatch.setattr(training, "validation_loss", half_square)
    start = made_up_params()
    params = jax.tree.map(lambda x: x + 0.1, start)
    made = experiment.project_back(params, start, made_up_texts(16), seed=0, rate=0.1, count=2)
    assert list(made.radii) == list(scores.row_norms(start))
    drifts = [training.drift(tree, start)[0] for tree in (made.params, params)]
    assert 0 < drifts[0] < drifts[1]


def test_the_schedule_warms_up_over_a_tenth_and_ends_at_zero():
    rates = [float(training.schedule(1.0, 100)(step)) for step in (0, 9, 55, 100)]
    assert rates == pytest.approx([0.1, 1.0, 45 / 91, 0.0], abs=1e-6)


def test_parameters_that_diverge_in_the_last_step_are_noticed(monkeypatch):
    """The loss has not seen them yet."""
    grads = {"w": np.full(2, np.nan, np.float32)}
    monkeypatch.setattr(training, "loss_and_gradient", lambda *_: (1.0, grads))
    tx = methods.METHODS["adam"].optimizer(training.schedule(1.0, 2))
    with pytest.raises(DivergedError, match="the parameters after the last step are not finite"):
        training.fit({"w": np.ones(2)}, tx, [(None, None, None)], lambda: None)


def settings(**changes):
    defaults = {"methods": ["adam", "spd"], "seeds": 1, "examples": [16], "steps": 1}
    defaults |= {"learning_rate": 3e-4, "evaluation": 100}
    return experiment.Settings(**(defaults | changes))


def test_a_row_is_an_output_unit_or_a_token():
    params = {
        "word": {"embedding": np.array([[1.0, -2.0], [0.5, 0.5], [2.0, 0.0]])},
        "dense": {"kernel": np.array([[1.0, -2.0], [-3.0, 0.5]]), "bias": np.array([1.0, -1.0])},
    }
    expected = {"word/embedding": 3.0, "dense/kernel": 4.0, "dense/bias": 2.0}
    assert scores.row_norms(params) == expected


MOST, HALF = [1, 1, 1, 0] * 100, [1, 0] * 200


def score(correct, distance=1.0, **others):
    """A score whose domains all have these right and wrong answers."""
    right = np.array(correct, bool)
    return scores.Score(
        accuracy=dict.fromkeys(scores.DOMAINS, float(right.mean())),
        auc=dict.fromkeys(scores.DOMAINS, 0.75),
        correct=dict.fromkeys(scores.DOMAINS, right),
        distance=distance,
        relative_distance=0.01,
        deviation={},
        seconds=1.0,
        **others,
    )


def test_standard_error_is_that_of_paired_differences():
    most, half = [score(MOST)], [score(HALF)]
    found = scores.gain(most, half, data.OUT_OF_DISTRIBUTION)
    assert found.mean == pytest.approx(25)
    # Differences are 1 for a quarter of 400 snippets, else 0; the mean is over three domains.
    assert found.error == pytest.approx(100 * np.sqrt(0.25 * 0.75 / 400 / 3))
    assert not found.is_noise
    # The same gain on the same snippets leaves nothing, without any error.
    none = found - found
    assert (none.mean, none.error, none.is_noise) == (0, 0, True)


def test_the_closing_statement_claims_what_the_numbers_show():
    def said(adam, spd, **changes):
        results = {"adam": [score(x, 3.0) for x in adam], "spd": [score(x) for x in spd]}
        return report.statement(settings(**changes), results)

    better = said([HALF], [MOST])
    assert "+25.0 points" in better
    assert "SPD generalised better here" in better
    assert "Adam ends 3.0 times as far" in better
    assert "Adam generalised better here" in said([MOST], [HALF])
    assert "within noise" in said([HALF], [[1, 1, *HALF[2:]]])
    # Seeds that disagree are noise too, however large the mean.
    assert "within noise" in said([HALF, HALF], [MOST, [0, 0, 1, 0] * 100], seeds=2)


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
    radii = {
        f"encoder/block_{block}/{kernel}/kernel": (kind + 1) * 0.1 * order(block, kind)
        for block in range(6)
        for kind, kernel in enumerate(pictures.KERNELS)
    }
    assert report.depth_order(radii) == pytest.approx(expected)


def test_low_data_gains_and_table():
    outcomes = [
        experiment.Outcome({"adam": [score(HALF)], "spd": [score(MOST)]}, {}),
        experiment.Outcome({"adam": [score(HALF)]}, {"spd": "SPD: the loss is nan"}),
    ]
    made = low_data.report(settings(examples=[64, 512]), outcomes)
    found = made.record["gains"][64]["spd"]["ID"]
    assert (found["seeds"], found["noise"]) == ([25.0], False)
    assert found["error"] == pytest.approx(100 * np.sqrt(3 / 16 / 400))
    console = Console(width=80, file=io.StringIO())
    console.print(made.table)
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    assert rows[-2] == ["LP-FT", "(Adam)", *["50.0", "/", "50.0"] * 2]
    assert rows[-1] == ["SPD", "75.0", "/", "75.0", "-"]


def ran(capsys, tmp_path, *arguments):
    """Runs the demo on few texts; its exit code, what it printed, its files and their numbers."""
    code = main([*arguments, "--evaluation", "50", "--out", str(tmp_path / "new" / "results")])
    files = {path.name: path.read_bytes() for path in (tmp_path / "new" / "results").iterdir()}
    results = json.loads(files.pop("results.json"))["results"]
    assert all(content.startswith(b"\x89PNG\r\n\x1a\n") for content in files.values())
    return code, capsys.readouterr(), sorted(files), results


def test_a_short_real_run_ends_in_table_pictures_and_numbers(tmp_path, small, capsys):
    arguments = ["--methods", ",".join(REAL_RUN), "--examples", "32", "--steps", "3"]
    code, printed, files, results = ran(capsys, tmp_path, *arguments)
    assert (code, printed.err) == (0, "")
    for expected in ("Adam", "SPD", "FTP", "SPD against Adam", "Rank correlation"):
        assert expected in printed.out
    assert files == ["accuracy.png", "deviation.png", "radii.png"]
    assert tuple(results) == REAL_RUN
    for (entry,) in results.values():
        assert 0 < entry["distance"] < 10
        assert 0.2 < entry["mean_ood_accuracy"] <= 1
    radii = results["ftp"][0]["radii"]
    kernels = [radius for path, radius in radii.items() if path.endswith("/kernel")]
    assert len(kernels) == 7  # six in the block, and the head's
    assert min(kernels) > 0


def test_low_data_mode_on_real_data_and_a_method_that_diverges_in_it(tmp_path, small, capsys):
    arguments = ["--methods", "probe,wise-ft", "--lr", "1e30", "--examples", "16/32"]
    code, printed, files, results = ran(capsys, tmp_path, *arguments, "--steps", "2")
    assert code == 1
    first, _, _, last = printed.err.splitlines()
    assert first.startswith("python -m examples.demo: left out Adam, 16 examples: the loss is ")
    assert last.endswith("left out WiSE-FT, 32 examples: it needs the result of Adam")
    assert files == ["low_data.png"]
    assert [list(results[size]) for size in ("16", "32")] == [["probe"], ["probe"]]


def test_a_short_trace_of_a_real_run_writes_pictures_and_numbers(tmp_path, small):
    sizes = ["--steps", "2", "--every", "1", "--evaluation", "50"]
    trace.main([*sizes, "--out", str(tmp_path)])
    written = ["layers.png", "report.png", "trace.json", "trace.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == written
    runs = json.loads((tmp_path / "trace.json").read_text())
    (adam,), (spd,) = runs["adam"], runs["spd"]
    assert adam["steps"] == spd["steps"] == [1, 2]
    # The first step of both is Adam's from the same place.
    assert adam["loss"][0] == spd["loss"][0]
    assert spd["distance"][0] == pytest.approx(adam["distance"][0])
    assert 0 < spd["distance"][1] < adam["distance"][1]  # SPD pulled it back
    assert all(0.3 < accuracy < 1 for accuracy in adam["ood"])
