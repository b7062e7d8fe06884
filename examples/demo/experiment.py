"""One run of the demo: trains and scores every method on every seed.

With several numbers of training examples it does so for each number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import numpy as np
import optax
from rich.progress import Progress

import optax_spd
from examples.demo import assets, data, methods, training
from examples.demo.errors import DivergedError
from examples.demo.methods import LINES_ALPHAS, METHODS, WISE_FT_ALPHAS, Method
from examples.demo.minilm import Params, load_encoder
from examples.demo.scores import Results, Score, measure
from examples.demo.training import Tick

# Snippets for choosing the probe's regularisation and WiSE-FT's share, and for TPGM's radii.
VALIDATION = 500


@dataclass(frozen=True)
class Settings:
    """The settings from the command line."""

    methods: Sequence[str]
    seeds: int
    examples: Sequence[int]  # more than one: the low-data mode
    steps: int
    learning_rate: float
    evaluation: int  # snippets scored in each test set


@dataclass(frozen=True)
class Outcome:
    """The results of the methods that finished on every seed, and why others diverged."""

    results: Results
    diverged: dict[str, str]


@dataclass(frozen=True)
class Workbench:
    """The pretrained encoder and the tokenised data."""

    encoder: Params
    splits: data.Splits

    @classmethod
    def load(cls, cache: Path, announce: Callable[[str], None]) -> Workbench:
        """Loads everything from the cache; what is missing is downloaded."""
        weights, tokenizer = assets.fetch(assets.MINILM, cache, announce)
        (archive,) = assets.fetch(assets.SENTIMENT, cache, announce)
        # Keep compiled programs for the next run.
        jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
        splits = data.make_splits(data.read_domains(archive), data.load_tokenizer(tokenizer))
        return cls(load_encoder(weights), splits)


@dataclass(frozen=True)
class HeldOut:
    """The snippets not used for training, and the pretrained encoder's embeddings of them.

    They are the same for all seeds and numbers of examples.
    """

    validation: data.Texts
    tests: dict[str, data.Texts]
    frozen_validation: np.ndarray
    frozen: dict[str, np.ndarray]


@dataclass(frozen=True)
class Material:
    """What all methods share on a seed; `frozen` are the test sets' embeddings at the start."""

    seed: int
    start: Params
    texts: data.Texts
    validation: data.Texts
    tests: dict[str, data.Texts]
    frozen: dict[str, np.ndarray]

    def start_of(self, method: Method) -> Params:
        """The pretrained encoder with the probe's head, or with a new head of zeros."""
        if not method.new_head:
            return self.start
        head = jax.tree.map(np.zeros_like, self.start["head"])
        return {"encoder": self.start["encoder"], "head": head}


def run(settings: Settings, bench: Workbench, progress: Progress) -> list[Outcome]:
    """Runs every method on every seed, with each number of examples; one outcome per number.

    The test sets and the split are always the same. A seed determines the training snippets and
    their order, the same for all methods. A method that diverges is left out for the rest of that
    number of examples, together with methods that need its result.
    """
    runs = len(settings.examples) * settings.seeds * len(settings.methods)
    total = progress.add_task("whole run", total=runs + 1)
    held_out = hold_out(settings, bench, progress)
    progress.advance(total)
    outcomes = []
    for examples in settings.examples:
        note = f", {examples} examples" if len(settings.examples) > 1 else ""
        outcome = Outcome({name: [] for name in settings.methods}, {})
        outcomes.append(outcome)
        for seed in range(settings.seeds):
            material = prepare(bench, held_out, examples, seed)
            fitted: dict[str, Params] = {}
            for name in settings.methods:
                label = METHODS[name].label + note
                if settings.seeds > 1:
                    label += f", seed {seed}"
                try:
                    if name not in outcome.diverged:
                        score = _train_and_score(name, label, settings, material, fitted, progress)
                        outcome.results[name].append(score)
                except DivergedError as error:
                    outcome.diverged[name] = f"{label}: {error}"
                    del outcome.results[name]
                    progress.console.print(f"{label}: diverged")
                progress.advance(total)
    return outcomes


def hold_out(settings: Settings, bench: Workbench, progress: Progress) -> HeldOut:
    """Validation and test snippets, with the embeddings that the probe needs."""
    splits = bench.splits
    tests = {
        data.IN_DISTRIBUTION: splits.test.first(settings.evaluation),
        **{name: texts.first(settings.evaluation) for name, texts in splits.shifted.items()},
    }
    validation = splits.validation.first(min(VALIDATION, settings.evaluation))
    everything = {"validation": validation, **tests}
    with _bar(progress, "pretrained embeddings", _batches(*everything.values())) as tick:
        frozen = training.embed_all(bench.encoder, everything, tick)
    return HeldOut(validation, tests, frozen.pop("validation"), frozen)


def prepare(bench: Workbench, held_out: HeldOut, examples: int, seed: int) -> Material:
    """The data and the start of one seed.

    There are at most as many validation snippets as training examples. With few labels one would
    not have hundreds of others to choose the probe's regularisation.
    """
    texts = bench.splits.training(examples, seed)
    validation = held_out.validation.first(examples)
    head = training.linear_probe(
        training.embed(bench.encoder, texts),
        texts.labels,
        held_out.frozen_validation[: len(validation)],
        validation.labels,
    )
    start = {"encoder": bench.encoder, "head": head}
    return Material(seed, start, texts, validation, held_out.tests, held_out.frozen)


def _train_and_score(
    name: str,
    label: str,
    settings: Settings,
    material: Material,
    fitted: dict[str, Params],
    progress: Progress,
) -> Score:
    """Trains and scores one method, and stores its parameters in `fitted`."""
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
            embedded = training.embed_all(made.params["encoder"], material.tests, tick)
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
    """Trains a method, or derives its parameters from another method's result.

    Raises:
      DivergedError: something is not finite.
    """
    seed, validation = material.seed, material.validation
    start = material.start_of(method)
    if method.optimizer is not None:
        batches = list(data.training_batches(material.texts, settings.steps, seed))
        tx = optimizer(method.optimizer, method.rate * settings.learning_rate, settings.steps)
        held_out = None
        if method.validates_every is not None:
            held_out = validation_for(validation, settings.steps, method.validates_every, seed)
        with _bar(progress, f"{label}: training", settings.steps) as tick:
            return training.fit(start, tx, batches, tick, held_out)
    if method.average_of is not None:
        choose = lines if method.by_depth else average
        work = len(LINES_ALPHAS if method.by_depth else WISE_FT_ALPHAS) * _batches(validation)
        with _bar(progress, f"{label}: validation", work) as tick:
            return choose(fitted[method.average_of], start, validation, tick)
    if method.radii_of is not None:
        with _bar(progress, f"{label}: radii", 1):
            return project_back(fitted[method.radii_of], start, validation, seed)
    return training.Fitted(start)


@cache
def optimizer(recipe: methods.Recipe, peak: float, steps: int) -> optax.GradientTransformation:
    """The optimizer of a recipe; cached, so that its update is traced and compiled once."""
    return recipe(training.schedule(peak, steps))


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
    """TPGM after training: learns radii for the trained weights and projects onto the balls."""
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
    """WiSE-FT with the share from `WISE_FT_ALPHAS` that has the best validation accuracy."""

    def mixed(alpha: float) -> Params:
        params: Params = optax_spd.wise_ft(fitted, start, alpha)
        return params

    return _best(mixed, WISE_FT_ALPHAS, validation, tick)


def lines(fitted: Params, start: Params, validation: data.Texts, tick: Tick) -> training.Fitted:
    """LiNeS with the smallest share from `LINES_ALPHAS` that has the best validation accuracy."""

    def mixed(alpha: float) -> Params:
        alphas = optax_spd.lines_alpha(fitted, alpha, r"/block_(\d+)/")
        params: Params = optax_spd.wise_ft(fitted, start, alphas, mask=methods.LINES_MASK)
        return params

    return _best(mixed, LINES_ALPHAS, validation, tick)


def _best(
    mixed: Callable[[float], Params], alphas: Sequence[float], validation: data.Texts, tick: Tick
) -> training.Fitted:
    """The mix of fine-tuned and pretrained weights with the best validation accuracy."""

    def accuracy(alpha: float) -> float:
        params = mixed(alpha)
        scores = training.logits(params, training.embed(params["encoder"], validation, tick))
        return training.accuracy(scores, validation.labels)

    best = max(alphas, key=accuracy)  # the smallest share wins a tie
    return training.Fitted(mixed(best), alpha=best)


def _batches(*texts: data.Texts) -> int:
    return sum(1 for _ in data.evaluation_indices(data.join(texts)))


@contextmanager
def _bar(progress: Progress, label: str, total: int) -> Iterator[Tick]:
    """A progress bar that is removed when its task ends."""
    task = progress.add_task(label, total=total)
    try:
        yield lambda: progress.advance(task)
    finally:
        progress.remove_task(task)
