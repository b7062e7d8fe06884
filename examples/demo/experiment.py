"""One run of the demo: every method on every seed, and what is measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import optax
from rich.progress import Progress

import optax_spd
from examples.demo import assets, data, methods, training
from examples.demo.errors import DivergedError
from examples.demo.methods import METHODS, WISE_FT_ALPHAS, Method
from examples.demo.minilm import Params, load_encoder
from examples.demo.training import Tick

DOMAINS = (data.IN_DISTRIBUTION, *data.OUT_OF_DISTRIBUTION)
# Snippets that choose the probe's regularisation and WiSE-FT's share, and teach TPGM its radii.
VALIDATION = 500


@dataclass(frozen=True)
class Settings:
    """What the options of the command line decide."""

    methods: Sequence[str]
    seeds: int
    examples: int
    steps: int
    learning_rate: float
    evaluation: int  # snippets scored in each test set


@dataclass(frozen=True)
class Score:
    """One method on one seed. `correct` says of every test snippet whether it was right.

    Radii are in units of the norm (MARS) and by path; the relative ones are divided by the norm of
    the anchor's array.
    """

    accuracy: dict[str, float]
    auc: dict[str, float]
    correct: dict[str, np.ndarray]
    distance: float
    relative_distance: float
    deviation: dict[str, float]
    seconds: float
    step_seconds: float | None = None
    alpha: float | None = None
    radii: dict[str, float] | None = None
    relative_radii: dict[str, float] | None = None

    @property
    def shifted_accuracy(self) -> float:
        """Mean accuracy of the other domains, each counting the same."""
        return float(np.mean([self.accuracy[name] for name in data.OUT_OF_DISTRIBUTION]))

    @property
    def shifted_auc(self) -> float:
        """Mean area under the ROC curve of the other domains."""
        return float(np.mean([self.auc[name] for name in data.OUT_OF_DISTRIBUTION]))


Results = dict[str, list[Score]]  # method -> one score a seed


@dataclass(frozen=True)
class Outcome:
    """The methods that finished on every seed, and why others did not."""

    results: Results
    diverged: dict[str, str]


@dataclass(frozen=True)
class Workbench:
    """The pretrained encoder and the tokenised data."""

    encoder: Params
    splits: data.Splits

    @classmethod
    def load(cls, cache: Path, announce: Callable[[str], None]) -> Workbench:
        """Gets everything from the cache, filling it where it must."""
        weights, tokenizer = assets.fetch(assets.MINILM, cache, announce)
        (archive,) = assets.fetch(assets.SENTIMENT, cache, announce)
        # Compiled programs outlive the process: a second run need not compile again.
        jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
        splits = data.make_splits(data.read_domains(archive), data.load_tokenizer(tokenizer))
        return cls(load_encoder(weights), splits)


@dataclass(frozen=True)
class Material:
    """What all methods of a seed share; `frozen` are the test sets' embeddings at the start."""

    seed: int
    start: Params
    texts: data.Texts
    validation: data.Texts
    tests: dict[str, data.Texts]
    frozen: dict[str, np.ndarray]


def run(settings: Settings, bench: Workbench, progress: Progress) -> Outcome:
    """Runs every method on every seed.

    The test sets and the split are the same for all seeds; a seed draws the training snippets and
    their order, the same for all methods. A method that diverges is left out from then on, and so
    are those that need its result.
    """
    total = progress.add_task("whole run", total=settings.seeds * len(settings.methods) + 1)
    results: Results = {name: [] for name in settings.methods}
    diverged: dict[str, str] = {}
    for material in prepare(settings, bench, progress):
        progress.update(total, completed=material.seed * len(settings.methods) + 1)
        fitted: dict[str, Params] = {}
        for name in settings.methods:
            if name not in diverged:
                label = METHODS[name].label
                if settings.seeds > 1:
                    label += f", seed {material.seed}"
                try:
                    score = _try(name, label, settings, material, fitted, progress)
                    results[name].append(score)
                except DivergedError as error:
                    diverged[name] = f"{label}: {error}"
                    del results[name]
                    progress.console.print(f"{label}: diverged")
            progress.advance(total)
    return Outcome(results, diverged)


def prepare(settings: Settings, bench: Workbench, progress: Progress) -> Iterator[Material]:
    """The data and the start of each seed, one after the other."""
    splits = bench.splits
    tests = {
        data.IN_DISTRIBUTION: splits.test.first(settings.evaluation),
        **{name: texts.first(settings.evaluation) for name, texts in splits.shifted.items()},
    }
    validation = splits.validation.first(min(VALIDATION, settings.evaluation))
    # The probe's features: the same for every seed, so they are computed once.
    with _bar(progress, "pretrained embeddings", _batches(validation, *tests.values())) as tick:
        frozen = {name: training.embed(bench.encoder, texts, tick) for name, texts in tests.items()}
        frozen_validation = training.embed(bench.encoder, validation, tick)
    for seed in range(settings.seeds):
        texts = splits.training(settings.examples, seed)
        head = training.linear_probe(
            training.embed(bench.encoder, texts),
            texts.labels,
            frozen_validation,
            validation.labels,
        )
        start = {"encoder": bench.encoder, "head": head}
        yield Material(seed, start, texts, validation, tests, frozen)


def _try(
    name: str,
    label: str,
    settings: Settings,
    material: Material,
    fitted: dict[str, Params],
    progress: Progress,
) -> Score:
    """Trains and scores one method; its parameters join `fitted`."""
    base = METHODS[name].base
    if base is not None and base not in fitted:
        raise DivergedError(f"it needs the result of {METHODS[base].label}")
    began = time.perf_counter()
    made = produce(METHODS[name], label, settings, material, fitted, progress)
    seconds = time.perf_counter() - began
    fitted[name] = made.params

    embedded = material.frozen
    if made.params is not material.start:
        work = _batches(*material.tests.values())
        with _bar(progress, f"{label}: evaluation", work) as tick:
            embedded = {
                domain: training.embed(made.params["encoder"], snippets, tick)
                for domain, snippets in material.tests.items()
            }
    score = measure(made, material.start, material.tests, embedded, seconds)
    progress.console.print(
        f"{label}: ID {100 * score.accuracy[data.IN_DISTRIBUTION]:.1f}, "
        f"mean OOD {100 * score.shifted_accuracy:.1f} ({seconds:.0f} s)"
    )
    return score


def produce(
    method: Method,
    label: str,
    settings: Settings,
    material: Material,
    fitted: Mapping[str, Params],
    progress: Progress,
) -> training.Fitted:
    """Trains a method, or makes it out of the result of another.

    Raises:
      DivergedError: something is not finite.
    """
    seed, start, validation = material.seed, material.start, material.validation
    if method.optimizer is not None:
        batches = list(data.training_batches(material.texts, settings.steps, seed))
        tx = method.optimizer(training.schedule(settings.learning_rate, settings.steps))
        held_out = None
        if method.validates_every is not None:
            held_out = validation_for(validation, settings.steps, method.validates_every, seed)
        with _bar(progress, f"{label}: training", settings.steps) as tick:
            return training.fit(start, tx, batches, tick, held_out)
    if method.average_of is not None:
        work = len(WISE_FT_ALPHAS) * _batches(validation)
        with _bar(progress, f"{label}: validation", work) as tick:
            return average(fitted[method.average_of], start, validation, tick)
    if method.radii_of is not None:
        with _bar(progress, f"{label}: radii", 1):
            return project_back(fitted[method.radii_of], start, validation, seed)
    return training.Fitted(start)


def validation_for(texts: data.Texts, steps: int, every: int, seed: int) -> training.Validation:
    """The validation batches of one training run."""
    count = math.ceil(steps / every)
    return training.Validation(data.validation_batches(texts, count, seed), every)


def project_back(
    params: Params,
    start: Params,
    validation: data.Texts,
    seed: int,
    rate: float = methods.TPGM_AFTER_RATE,
    count: int = methods.TPGM_AFTER_BATCHES,
) -> training.Fitted:
    """TPGM after training: learns the radii of finished weights and projects onto them."""
    fitted = optax_spd.fit_radii(
        params,
        start,
        training.validation_loss,
        data.validation_batches(validation, count, seed),
        radius_optimizer=optax.adam(rate),
        layers=methods.LAYERS,
    )
    return training.Fitted(fitted.params, radii=training.named_radii(params, fitted.radii))


def average(fitted: Params, start: Params, validation: data.Texts, tick: Tick) -> training.Fitted:
    """WiSE-FT with the share of `WISE_FT_ALPHAS` that validates best in distribution."""

    def accuracy(alpha: float) -> float:
        params = optax_spd.wise_ft(fitted, start, alpha)
        scores = training.logits(params, training.embed(params["encoder"], validation, tick))
        return training.accuracy(scores, validation.labels)

    best = max(WISE_FT_ALPHAS, key=accuracy)  # of equals, the first: nearest to the start
    return training.Fitted(optax_spd.wise_ft(fitted, start, best), alpha=best)


def measure(
    made: training.Fitted,
    start: Params,
    tests: dict[str, data.Texts],
    embedded: dict[str, np.ndarray],
    seconds: float,
) -> Score:
    """Scores one result; the distances are the encoder's, whose start is the pretrained weights."""
    params = made.params
    scores = {domain: training.logits(params, embedded[domain]) for domain in tests}
    labels = {domain: texts.labels for domain, texts in tests.items()}
    correct = {domain: (scores[domain] > 0) == (labels[domain] == 1) for domain in tests}
    distance, relative = training.drift(params["encoder"], start["encoder"])
    relative_radii = None
    if made.radii is not None:
        sizes = row_norms(start)
        # An array of zeros, such as a bias, has no size to compare with.
        relative_radii = {path: r / sizes[path] for path, r in made.radii.items() if sizes[path]}
    return Score(
        accuracy={domain: training.accuracy(scores[domain], labels[domain]) for domain in tests},
        auc={domain: training.auc(scores[domain], labels[domain]) for domain in tests},
        correct=correct,
        distance=distance,
        relative_distance=relative,
        deviation=deviations(params["encoder"], start["encoder"]),
        seconds=seconds,
        step_seconds=made.step_seconds,
        alpha=made.alpha,
        radii=made.radii,
        relative_radii=relative_radii,
    )


def row_norms(params: Params) -> dict[str, float]:
    """The largest absolute row sum of every array, by path: what a radius compares to."""
    sizes = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = "/".join(key.key for key in keys)
        array = np.abs(np.asarray(leaf)).astype(np.float64)
        rows = methods.LAYERS(path, leaf).output_axes if array.ndim > 1 else ()
        outputs = {axis % array.ndim for axis in rows}
        summed = tuple(axis for axis in range(array.ndim) if axis not in outputs)
        sizes[path] = float(array.sum(summed).max())
    return sizes


def deviations(params: Params, anchor: Params) -> dict[str, float]:
    """Relative deviation of every weight matrix and table of the encoder, by path."""
    ours = jax.tree_util.tree_leaves_with_path(params)
    theirs = jax.tree.leaves(anchor)
    return {
        "/".join(key.key for key in path): training.drift(leaf, pretrained)[1]
        for (path, leaf), pretrained in zip(ours, theirs, strict=True)
        if leaf.ndim == 2
    }


def _batches(*texts: data.Texts) -> int:
    return sum(1 for each in texts for _ in data.evaluation_indices(each))


@contextmanager
def _bar(progress: Progress, label: str, total: int) -> Iterator[Tick]:
    """A progress bar that lives as long as its task."""
    task = progress.add_task(label, total=total)
    try:
        yield lambda: progress.advance(task)
    finally:
        progress.remove_task(task)
