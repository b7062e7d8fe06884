"""One run of the demo: every method on every seed, and what is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from rich.progress import Progress

import optax_spd
from examples.demo import assets, data, training
from examples.demo.methods import METHODS, WISE_FT_ALPHAS
from examples.demo.minilm import Params, load_encoder
from examples.demo.training import Tick

DOMAINS = (data.IN_DISTRIBUTION, *data.OUT_OF_DISTRIBUTION)
VALIDATION = 500  # snippets that choose the probe's regularisation and WiSE-FT's share


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
    """One method on one seed. `correct` says of every test snippet whether it was right."""

    accuracy: dict[str, float]
    auc: dict[str, float]
    correct: dict[str, np.ndarray]
    distance: float
    relative_distance: float
    deviation: dict[str, float]
    seconds: float
    alpha: float | None

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


def run(settings: Settings, bench: Workbench, progress: Progress) -> Results:
    """Runs every method on every seed.

    The test sets and the split are the same for all seeds; a seed draws the training snippets and
    their order, the same for all methods.
    """
    tests = {
        data.IN_DISTRIBUTION: bench.splits.test.first(settings.evaluation),
        **{name: texts.first(settings.evaluation) for name, texts in bench.splits.shifted.items()},
    }
    validation = bench.splits.validation.first(min(VALIDATION, settings.evaluation))
    results: Results = {name: [] for name in settings.methods}
    total = progress.add_task("whole run", total=settings.seeds * len(settings.methods) + 1)

    # The probe's features: the same for every seed, so they are computed once.
    with _bar(progress, "pretrained embeddings", _batches(validation, *tests.values())) as tick:
        frozen = {name: training.embed(bench.encoder, texts, tick) for name, texts in tests.items()}
        frozen_validation = training.embed(bench.encoder, validation, tick)
    progress.advance(total)

    for seed in range(settings.seeds):
        texts = bench.splits.training(settings.examples, seed)
        head = training.linear_probe(
            training.embed(bench.encoder, texts),
            texts.labels,
            frozen_validation,
            validation.labels,
        )
        start = {"encoder": bench.encoder, "head": head}
        fitted: dict[str, Params] = {}
        for name in settings.methods:
            method = METHODS[name]
            label = method.label if settings.seeds == 1 else f"{method.label}, seed {seed}"
            began = time.perf_counter()
            params, alpha = start, None
            if method.optimizer is not None:
                batches = data.training_batches(texts, settings.steps, seed)
                tx = method.optimizer(training.schedule(settings.learning_rate, settings.steps))
                with _bar(progress, f"{label}: training", settings.steps) as tick:
                    params = training.fit(start, tx, batches, tick)
            elif method.average_of is not None:
                work = len(WISE_FT_ALPHAS) * _batches(validation)
                with _bar(progress, f"{label}: validation", work) as tick:
                    params, alpha = average(fitted[method.average_of], start, validation, tick)
            fitted[name] = params
            seconds = time.perf_counter() - began

            with _bar(progress, f"{label}: evaluation", _batches(*tests.values())) as tick:
                embedded = frozen
                if params is not start:
                    embedded = {
                        domain: training.embed(params["encoder"], snippets, tick)
                        for domain, snippets in tests.items()
                    }
            score = measure(params, start, tests, embedded, seconds, alpha)
            results[name].append(score)
            progress.console.print(
                f"{label}: ID {100 * score.accuracy[data.IN_DISTRIBUTION]:.1f}, "
                f"mean OOD {100 * score.shifted_accuracy:.1f} ({seconds:.0f} s)"
            )
            progress.advance(total)
    return results


def average(
    fitted: Params, start: Params, validation: data.Texts, tick: Tick
) -> tuple[Params, float]:
    """WiSE-FT with the share of `WISE_FT_ALPHAS` that validates best in distribution."""

    def accuracy(alpha: float) -> float:
        params = optax_spd.wise_ft(fitted, start, alpha)
        scores = training.logits(params, training.embed(params["encoder"], validation, tick))
        return training.accuracy(scores, validation.labels)

    best = max(WISE_FT_ALPHAS, key=accuracy)  # of equals, the first: nearest to the start
    return optax_spd.wise_ft(fitted, start, best), best


def measure(
    params: Params,
    start: Params,
    tests: dict[str, data.Texts],
    embedded: dict[str, np.ndarray],
    seconds: float,
    alpha: float | None,
) -> Score:
    """Scores one result; the distances are the encoder's, whose start is the pretrained weights."""
    scores = {domain: training.logits(params, embedded[domain]) for domain in tests}
    labels = {domain: texts.labels for domain, texts in tests.items()}
    correct = {domain: (scores[domain] > 0) == (labels[domain] == 1) for domain in tests}
    distance, relative = training.drift(params["encoder"], start["encoder"])
    return Score(
        accuracy={domain: training.accuracy(scores[domain], labels[domain]) for domain in tests},
        auc={domain: training.auc(scores[domain], labels[domain]) for domain in tests},
        correct=correct,
        distance=distance,
        relative_distance=relative,
        deviation=deviations(params["encoder"], start["encoder"]),
        seconds=seconds,
        alpha=alpha,
    )


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
