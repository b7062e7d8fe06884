"""The robustness benchmark: runs resume, tuning chooses, and the tables' arithmetic is right."""

import math
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console
from rich.progress import Progress

import optax_spd
from benchmarks.robustness import (
    __main__ as program,
    figures,
    methods,
    pages,
    plan,
    report,
    runs,
    sign_test,
)
from benchmarks.robustness.methods import METHODS
from benchmarks.robustness.plan import Choice, Plan
from benchmarks.robustness.runs import Key, Result, Store
from benchmarks.robustness.setting import Draw, Examples, Setting

TRAINED = [name for name, method in METHODS.items() if method.make is not None]
DERIVED = [name for name, method in METHODS.items() if method.after is not None]


def features(params, inputs):
    return jnp.tanh(inputs @ params["encoder"]["block_0"]["kernel"])


def scores(params, inputs):
    return features(params, inputs) @ params["head"]["kernel"][:, 0]


def loss(params, batch):
    return optax.sigmoid_binary_cross_entropy(scores(params, batch[0]), batch[1]).mean()


def draw(seed):
    rng = np.random.default_rng(seed)

    def examples(n, shift=0.0):
        inputs = rng.normal(size=(n, 4)).astype(np.float32) + shift
        return Examples(inputs, (inputs[:, 0] > shift).astype(int))

    def batches(n):
        some = [examples(8) for _ in range(n)]
        return np.stack([s.inputs for s in some]), np.stack([s.labels for s in some])

    params = {
        "encoder": {"block_0": {"kernel": np.eye(4, dtype=np.float32)}},
        "head": {"kernel": np.ones((4, 1), np.float32)},
    }
    inputs, labels = batches(6)
    return Draw(
        start=params,
        batches=list(zip(inputs, labels, strict=True)),
        validation=examples(40),
        tests={"own": examples(40), "other": examples(40, 1.0)},
        held_out=batches,
    )


@pytest.fixture(scope="module")
def setting():
    return Setting(
        name="tiny",
        tests=("own", "other"),
        steps=6,
        draw=draw,
        loss=loss,
        scores=lambda params, examples: np.asarray(scores(params, examples.inputs)),
        layers=None,
        depth=lambda path: 1 if path.startswith("head") else 0,
        balanced=optax_spd.path_mask("encoder"),
        embedding="block_0",
        retained=lambda encoder: float(jnp.linalg.norm(encoder["block_0"]["kernel"])),
    )


@pytest.mark.parametrize("method", TRAINED)
def test_every_method_trains_and_repeats(setting, method):
    made = METHODS[method]
    key = Key("tiny", method, 0, 1e-2 * made.rate, made.strengths[0])
    (one,), (two,) = (list(runs.execute(setting, draw(0), key)) for _ in range(2))
    assert replace(one, seconds=0, step_seconds=0) == replace(two, seconds=0, step_seconds=0)
    assert set(one.accuracy) == {"own", "other"}
    assert not one.diverged
    assert (one.distance > 0) == (method != "sgd-freeze")
    assert Result.parse(one.line()) == one


def test_a_run_for_tuning_sees_validation_only(setting):
    (one,) = runs.execute(setting, replace(draw(0), tests={}), Key("tiny", "adam", 100, 1e-2))
    assert one.validation > 0.5
    assert (one.accuracy, one.auc, one.retained) == ({}, {}, None)


def test_what_is_done_after_training_starts_from_adams_result(setting):
    key = Key("tiny", "adam", 0, 3e-2)
    adam, *after = runs.execute(setting, draw(0), key, DERIVED)
    assert [run.key for run in after] == [replace(key, method=name) for name in DERIVED]
    assert all(run.distance <= adam.distance * 1.001 for run in after)


def test_radii_after_training_are_those_of_fit_radii(setting):
    fitted = jax.tree.map(lambda a: a + 0.3 * np.arange(a.size).reshape(a.shape), draw(0).start)
    made = methods.tpgm_after(setting, draw(0), fitted, None)
    expected = optax_spd.fit_radii(
        fitted,
        draw(0).start,
        loss,
        draw(0).held_out(methods.TPGM_AFTER_BATCHES),
        radius_optimizer=optax.adam(methods.TPGM_AFTER_RATE),
    )
    chex.assert_trees_all_close(made, expected.params, rtol=1e-6)
    assert np.ptp(expected.losses) > 0.01


def test_a_run_that_diverges_says_so_for_all_that_needs_it(setting):
    found = list(runs.execute(setting, draw(0), Key("tiny", "adam", 0, math.inf), ["wise-ft"]))
    assert [run.diverged for run in found] == [True, True]


def test_a_store_grows_by_lines_and_drops_a_torn_one(tmp_path):
    store = Store(tmp_path / "runs.jsonl")
    results = [Result(Key("tiny", "adam", seed), accuracy={"own": 0.5}) for seed in range(3)]
    for result in results[:2]:
        store.add(result)
    with store.path.open("a") as file:
        file.write(results[2].line()[:20])
    again = Store(store.path)
    assert list(again.results.values()) == results[:2]
    again.add(results[2])
    assert [key.seed for key in Store(store.path).results] == [0, 1, 2]


@pytest.fixture
def tiny_plan(monkeypatch):
    methods = ("probe", "adam", "l2-sp", "spd", "sgd", "wise-ft")
    made = Plan(
        3,
        (1e-3, 1e-2),
        methods=methods,
        aggressive=methods,
        grid_seeds=1,
        sign_seeds=2,
        rate_seeds=2,
    )
    monkeypatch.setitem(plan.PLANS, "tiny", made)
    return made


def record(results, keys, quality):
    for key in keys:
        good = quality(key)
        shares = {"own": good, "other": good / 2}
        results[key] = Result(
            key,
            validation=good,
            validation_loss=1 - good,
            accuracy=shares,
            auc=shares,
            distance=1.0,
        )


def test_tuning_chooses_the_rate_first_and_then_the_strength(tiny_plan):
    results = {}

    def quality(key):
        return 0.9 - abs(math.log10(key.rate / 1e-2)) / 10 - abs(key.strength - 0.5) / 100

    for key in plan.keys("tune", "tiny", METHODS, 9, results):  # decided while results grow
        record(results, [key], quality)
    assert plan.trials("tiny", METHODS) == len(results)
    assert plan.trials("tiny", ["sgd"]) == 10
    trials = {name: {k for k in results if k.method == name} for name in tiny_plan.methods}
    assert [len(trials[name]) for name in ("adam", "sgd", "l2-sp", "spd")] == [10, 10, 10, 10]
    assert {k.rate for k in trials["spd"] if k.strength != 0.5} == {1e-2}  # at Adam's best rate
    assert plan.choice("tiny", "spd", results) == Choice(1e-2, 0.5)
    assert plan.choice("tiny", "adam", results).rate == 1e-2
    assert plan.aggressive("tiny", "spd", results) == Choice(3e-2, 0.5)
    own = plan.choice("tiny", "sgd", results).rate
    assert plan.aggressive("tiny", "sgd", results).rate == pytest.approx(3 * own)
    assert {k.rate for k in trials["adam"]} == {1e-3, 5e-3, 7e-3, 1e-2, 1.5e-2}  # no 0.0069999...
    final = list(plan.keys("final", "tiny", METHODS, 2, results))
    assert len(final) == len(set(final)) == 2 * (6 + 5)
    assert not set(final) & set(results)  # tuning seeds are not reported


def test_a_setting_may_take_over_anothers_choices(tiny_plan, monkeypatch):
    monkeypatch.setitem(plan.PLANS, "base", replace(tiny_plan, strengths={"spd": 7.0}))
    monkeypatch.setitem(plan.PLANS, "tiny", replace(tiny_plan, like="base", rates=()))
    results = {}
    for key in plan.keys("tune", "base", METHODS, 9, results):
        record(results, [key], lambda key: key.rate)
    assert plan.trials("base", METHODS) == len(results)
    assert plan.trials("tiny", METHODS) == 0
    assert {key.strength for key in results if key.method == "spd"} == {7.0}  # not tuned again
    assert list(plan.keys("tune", "tiny", METHODS, 9, results)) == []
    assert plan.choice("tiny", "spd", results) == Choice(1e-2, 7.0)


def test_final_runs_wait_for_the_tuning(tiny_plan):
    with pytest.raises(plan.UndecidedError, match="adam is not tuned"):
        list(plan.keys("final", "tiny", METHODS, 1, {}))


def test_jobs_join_what_needs_one_training():
    adam, wise, spd = (Key("tiny", name, 0, 0.1) for name in ("adam", "wise-ft", "spd"))
    assert program.jobs([adam, spd, wise], {spd}) == {adam: ["wise-ft"]}
    assert program.jobs([adam, spd, wise], {adam, spd}) == {adam: ["wise-ft"]}


def test_quick_has_other_defaults_and_keeps_what_is_given():
    quick = program.parse(["--quick"])
    assert {name: getattr(quick, name) for name in program.QUICK} == program.QUICK
    some = program.parse(["--quick", "--setting", "spam", "--seeds", "2"])
    assert (some.setting, some.seeds, some.out) == (["spam"], 2, program.QUICK["out"])
    assert program.parse([]).out == program.RESULTS


def test_the_program_makes_what_is_missing(setting, monkeypatch, tmp_path):
    some = ("adam", "spd", "wise-ft")
    made = Plan(1, (1e-2,), {"spd": 1.0}, methods=some, aggressive=some, grid_seeds=1)
    monkeypatch.setitem(plan.PLANS, "tiny", made)
    monkeypatch.setattr(plan, "GRID_RATES", (1.0,))
    monkeypatch.setattr(plan, "GRID_STRENGTHS", (0.1, 10.0))

    def run(hours):
        options = ["--methods", "adam,spd,wise-ft", "--budget-hours", hours, "--out", str(tmp_path)]
        with Progress(console=Console(quiet=True)) as progress:
            program.Runner(program.parser().parse_args(options), progress).setting(setting)
        return Store(tmp_path / "tiny.jsonl").results

    results = run("1")
    tuning, final, grid = (
        set(plan.keys(part, "tiny", some, 1, results)) for part in ("tune", "final", "strengths")
    )
    assert [len(keys) for keys in (tuning, final, grid)] == [4, 6, 2]
    assert results.keys() == tuning | final | grid
    # Only final runs are asked what they keep of another task.
    assert {key for key, run in results.items() if run.retained is not None} == final
    assert run("0") == results  # all are recorded
    recorded = (tmp_path / "tiny.jsonl").read_text()
    (tmp_path / "tiny.jsonl").write_text(recorded[:-20])  # killed while it wrote the last one
    with pytest.raises(program.OutOfTimeError):
        run("0")
    assert run("1").keys() == results.keys()


def test_intervals_are_those_of_students_t():
    estimate = report.Estimate.of([1.0, 2.0, 3.0])
    assert (estimate.mean, round(estimate.half, 4)) == (2.0, 2.4841)  # 4.3027 / sqrt(3)
    assert estimate.text(1, sign=True) == "+2.0 ± 2.5"  # holds 0, so not in bold
    assert report.Estimate.of([1.0, 1.1, 1.2]).text(1, sign=True) == "**+1.1 ± 0.2**"
    assert report.Estimate.of([2.0]).text() == "2.0"


def test_the_tables_hold_the_paired_differences(tiny_plan, monkeypatch):
    monkeypatch.setattr(plan, "choice", lambda *_: Choice(1e-2, 1.0))
    results = {}
    gain = {"adam": 0.0, "spd": 0.1, "l2-sp": 0.05}

    def quality(key):
        return 0.5 + (key.seed - plan.FIRST_SEED) / 10 + gain.get(key.method, 0.0)

    for fast in (False, True):
        for method in (*tiny_plan.methods, "spd-coin"):
            keys = [plan.key_of("tiny", method, seed, fast, {}) for seed in plan.seeds(3)]
            record(results, keys, quality)
    found = report.rows("tiny", False, results)

    def spd(table):
        head, *rows = table
        return next(dict(zip(head, row, strict=True)) for row in rows if row[0] == "SPD")

    assert spd(report.accuracy_table(found))["own"] == "70.0 ± 24.8"
    assert spd(report.other_table(found))["AUC other"] == "0.350 ± 0.124"
    against_adam = spd(report.differences_table(found, "adam"))
    assert against_adam["own"] == "**+10.0 ± 0.0**"
    assert against_adam["shifted"] == "**+5.0 ± 0.0**"
    assert against_adam["AUC own"] == "**+0.100 ± 0.000**"
    assert spd(report.differences_table(found, "l2-sp"))["other"] == "**+2.5 ± 0.0**"
    text = report.tables("tiny", results)
    assert text.count("| SPD |") == 10  # four tables at two rates, and the sign test


def test_adam_at_other_rates_is_compared_with_the_tuned_methods(tiny_plan):
    results = {}
    for part in ("tune", "final", "rates"):
        for key in plan.keys(part, "tiny", METHODS, 9, results):
            record(results, [key], lambda key: 0.6 - 2 * key.rate + key.strength / 100)
    head, *table = report.rates_table("tiny", results)
    by_rate = {row[0]: dict(zip(head, row, strict=True)) for row in table}
    assert list(by_rate) == ["0.0005 (tuned)", "0.001", "0.0015", "0.01"]
    # L2-SP's choice is 30 at 0.001: 0.898 in distribution, half of that shifted.
    assert by_rate["0.01"]["shifted"] == "29.0 ± 0.0"
    assert by_rate["0.01"]["tuned L2-SP against it"] == "**+15.9 ± 0.0**"
    assert by_rate["0.01"]["seeds"] == "2"
    assert by_rate["0.0005 (tuned)"]["seeds"] == "2"  # of three
    assert by_rate["0.01"]["tuned FTP against it"] == ""  # not run


def test_a_grid_is_drawn_when_it_is_complete(tiny_plan, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "choice", lambda *_: Choice(1e-2, 1.0))
    results = {}
    for key in plan.keys("strengths", "tiny", METHODS, 9, results):
        record(results, [key], lambda key: 0.5)
    last = results.popitem()
    figures.write(tmp_path, results)
    assert list(tmp_path.iterdir()) == []
    results.update([last])
    figures.write(tmp_path, results)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny_grid.png"]
    assert [row[0] for row in report.forgiving_table("tiny", results)[1:]] == [
        "AdamW",
        "L2-SP",
        "SPD",
        "FTP",
    ]


def test_little_data_compares_the_same_training_sets(tiny_plan, monkeypatch):
    few = replace(tiny_plan, seeds=2, like="tiny")
    monkeypatch.setitem(plan.PLANS, "few", few)
    monkeypatch.setattr(pages, "LITTLE", {64: "few", 512: "tiny"})
    results = {}
    for setting in ("tiny", "few"):
        for part in ("tune", "final"):
            for key in plan.keys(part, setting, METHODS, 9, results):
                record(results, [key], lambda key: 0.5 + (key.seed - plan.FIRST_SEED) / 10)
    table = pages.little_data(results)
    assert "| 64 | 2 | 27.5 |" in table
    assert "| 512 | 2 | 27.5 |" in table  # the third seed is left out


def test_a_setting_that_takes_over_its_choices_is_not_called_tuned(tiny_plan, monkeypatch):
    monkeypatch.setitem(plan.PLANS, "other", replace(tiny_plan, like="tiny"))
    monkeypatch.setattr(pages, "MAIN", ("tiny", "other"))
    results = {}
    for setting in ("tiny", "other"):
        for part in ("tune", "final", "rates"):
            for key in plan.keys(part, setting, METHODS, 9, results):
                record(results, [key], lambda key: 0.5 + key.rate)
    labels = [line.split(" | ")[0] for line in pages.leaders(results).splitlines()[4:]]
    assert labels == [
        *("| tiny, lower", "| tiny, tuned", "| tiny, tripled"),
        *("| other, lower", "| other, tiny's", "| other, tripled"),
    ]


def test_a_page_has_its_tables_drawn_anew(tiny_plan, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "choice", lambda *_: Choice(1e-2, 1.0))
    results = {}
    for seed in plan.seeds(3):
        for fast in (False, True):
            keys = [plan.key_of("tiny", method, seed, fast, {}) for method in tiny_plan.methods]
            gain = 0.1 if fast else 0.0
            record(results, keys, lambda key, gain=gain: 0.5 + (key.method == "spd") * gain)
    monkeypatch.setattr(pages, "MAIN", ("tiny",))
    text = pages.drawn("a\n<!-- evidence: leaders -->\nstale\n<!-- end -->\nb\n", results)
    assert text.startswith("a\n<!-- evidence: leaders -->\n")
    assert text.endswith("\n<!-- end -->\nb\n")
    assert "stale" not in text
    assert "| tiny, tuned | 25.0 | +0.0 ± 0.0 | +0.0 ± 0.0 |  |" in text
    assert "| tiny, tripled | 25.0 | +0.0 ± 0.0 | **+5.0 ± 0.0** |  |" in text
    assert pages.drawn(text, results) == text
    assert "| SPD | 50.0 | 25.0 | +0.0 ± 0.0 | +0.0 ± 0.0 |" in pages.setting_table("tiny", results)
    figures.write(tmp_path, results)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.png"]
    with pytest.raises(ValueError, match="nothing is named 'leader'"):
        pages.drawn("<!-- evidence: leader -->\n<!-- end -->", results)


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_pages_show_what_is_recorded(page):
    results = program.recorded(program.RESULTS)
    assert page.read_text() == pages.drawn(page.read_text(), results), "run --report"


def test_without_runs_every_piece_says_so():
    recorded = program.recorded(program.RESULTS)
    for piece in pages.PIECES.values():
        assert piece({}) == pages.NONE
    for lacking in ("digits", "sentiment", "spam"):
        some = {key: run for key, run in recorded.items() if key.setting != lacking}
        assert pages.summary(some) == pages.NONE


def test_every_piece_has_its_place():
    readme, evidence = (pages.PLACE.findall(page.read_text()) for page in pages.PAGES)
    assert [name for _, name, _ in readme] == ["leaders", "summary"]
    assert {name for _, name, _ in evidence} == set(pages.PIECES) - {"summary"}


@pytest.mark.parametrize("name", report.settings(program.recorded(program.RESULTS)))
def test_the_tables_beside_the_runs_are_theirs(name):
    text = (program.RESULTS / f"{name}.md").read_text()
    assert text == report.tables(name, program.recorded(program.RESULTS)), "run --report"


def test_a_grid_counts_what_is_within_a_point_of_its_best():
    assert report.near_best([90.0, 89.0, 88.9, 50.0]) == 0.5


def test_the_coin_is_fair_and_depends_on_every_bit():
    tosses = sign_test.uniform(1 + jnp.arange(4096) * jnp.finfo(jnp.float32).eps)
    assert abs(float(tosses.mean()) - 0.5) < 0.02
    assert abs(float(jnp.corrcoef(tosses[1:], tosses[:-1])[0, 1])) < 0.05
    assert float(tosses.max()) < 1
