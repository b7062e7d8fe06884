"""Scores of a method's result, and the gain of one method over another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from examples.demo import data, methods, training
from examples.demo.minilm import Params

DOMAINS = (data.IN_DISTRIBUTION, *data.OUT_OF_DISTRIBUTION)


@dataclass(frozen=True)
class Score:
    """The scores of one method on one seed. `correct`: for every test snippet, whether it is right.

    Radii are by path, in units of the norm (MARS); relative radii are divided by the norm of the
    anchor's array. For `alpha`, `exponents` and `scales` see `training.Fitted`.
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
    exponents: dict[str, float] | None = None
    scales: dict[str, float] | None = None

    @property
    def shifted_accuracy(self) -> float:
        """Mean accuracy of the other domains, with equal weights."""
        return float(np.mean([self.accuracy[name] for name in data.OUT_OF_DISTRIBUTION]))

    @property
    def shifted_auc(self) -> float:
        """Mean area under the ROC curve of the other domains."""
        return float(np.mean([self.auc[name] for name in data.OUT_OF_DISTRIBUTION]))


Results = dict[str, list[Score]]  # method -> one score a seed


@dataclass(frozen=True)
class Gain:
    """The difference of two methods' accuracies, or of two gains.

    Attributes:
      seeds: the difference on each seed, a mean over the domains, in percentage points.
      snippets: for each domain the difference on each snippet, a mean over the seeds.
    """

    seeds: np.ndarray
    snippets: Sequence[np.ndarray]

    @property
    def mean(self) -> float:
        """The mean over the seeds, in points."""
        return float(np.mean(self.seeds))

    @property
    def error(self) -> float:
        """Standard error of the mean over the choice of test snippets, in points.

        It is paired, so it depends on how many snippets two methods differ, not on how hard they
        are.
        """
        variance = sum(float(np.var(snippets)) / len(snippets) for snippets in self.snippets)
        return 100 * math.sqrt(variance) / len(self.snippets)

    @property
    def is_noise(self) -> bool:
        """Whether the mean is within two standard errors, or the sign differs between seeds."""
        agree = bool(np.all(self.seeds >= 0) or np.all(self.seeds <= 0))
        return not agree or abs(self.mean) <= 2 * self.error

    def __sub__(self, other: Gain) -> Gain:
        """How much larger this gain is, on the same seeds and test snippets."""
        pairs = zip(self.snippets, other.snippets, strict=True)
        return Gain(self.seeds - other.seeds, [mine - others for mine, others in pairs])


def gain(ours: Sequence[Score], theirs: Sequence[Score], domains: Sequence[str]) -> Gain:
    """The gain of one method over another on the same seeds and test snippets."""

    def right(scores: Sequence[Score], domain: str) -> np.ndarray:
        return np.array([score.correct[domain] for score in scores], float)  # (seeds, snippets)

    differences = [right(ours, domain) - right(theirs, domain) for domain in domains]
    seeds = 100 * np.mean([each.mean(1) for each in differences], axis=0)
    return Gain(seeds, [each.mean(0) for each in differences])


def measure(
    made: training.Fitted,
    start: Params,
    tests: dict[str, data.Texts],
    embedded: dict[str, np.ndarray],
    seconds: float,
) -> Score:
    """Scores one result; distances are the encoder's, from its pretrained weights."""
    params = made.params
    scores = {domain: training.logits(params, embedded[domain]) for domain in tests}
    labels = {domain: texts.labels for domain, texts in tests.items()}
    correct = {domain: (scores[domain] > 0) == (labels[domain] == 1) for domain in tests}
    distance, relative = training.drift(params["encoder"], start["encoder"])
    relative_radii = None
    if made.radii is not None:
        sizes = row_norms(start)
        # A zero array, such as a bias, has no relative radius.
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
        exponents=made.exponents,
        scales=made.scales,
    )


def row_norms(params: Params) -> dict[str, float]:
    """The largest absolute row sum of every array, by path: the norm that a radius bounds."""
    sizes = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = "/".join(key.key for key in keys)
        array = np.abs(np.asarray(leaf)).astype(np.float64)
        rows = methods.LAYERS(path, leaf).output_axes if array.ndim > 1 else ()
        outputs = {axis % array.ndim for axis in rows}
        summed = tuple(axis for axis in range(array.ndim) if axis not in outputs)
        sizes[path] = float(np.max(array.sum(axis=summed)))
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
