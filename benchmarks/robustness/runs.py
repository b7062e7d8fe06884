"""One run: fine-tunes with one method on one seed and scores the result. Results are JSON lines."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.special import softmax  # type: ignore[import-untyped]
from sklearn.metrics import log_loss, roc_auc_score

from benchmarks.reporting import environment
from benchmarks.robustness.methods import METHODS, TPGM_EVERY, one_by_one
from benchmarks.robustness.setting import Batch, Draw, Params, Setting
from examples.demo.errors import DivergedError
from examples.demo.training import apply_gradient, schedule


@dataclass(frozen=True)
class Key:
    """What identifies a run.

    It gives the same result again on the same machine with as many threads.
    """

    setting: str
    method: str
    seed: int
    rate: float = 0.0  # the peak learning rate; 0 for methods that do not train
    strength: float = 0.0


@dataclass(frozen=True)
class Result:
    """One line of a results file. Shares are from 0 to 1; `auc` lacks sets with one class only."""

    key: Key
    validation: float = 0.0  # accuracy on the validation set
    validation_loss: float | None = None
    accuracy: Mapping[str, float] = field(default_factory=dict)
    auc: Mapping[str, float] = field(default_factory=dict)
    distance: float | None = None  # of the encoder from its pretrained weights, Euclidean
    relative_distance: float | None = None
    retained: float | None = None  # accuracy of the other task's probe on the encoder
    fired: float | None = None  # share of SPD's decisions that pulled a layer back
    seconds: float | None = None  # of the training, compilation included
    step_seconds: float | None = None  # a mean over the second half of the steps
    diverged: bool = False
    made: Mapping[str, Any] = field(default_factory=dict)  # machine, versions, commit

    def line(self) -> str:
        """The result as it stands in the file."""
        return json.dumps(asdict(self), allow_nan=False) + "\n"

    @classmethod
    def parse(cls, line: str) -> Result:
        """The result of a line."""
        fields = json.loads(line)
        return cls(**{**fields, "key": Key(**fields["key"])})


class Store:
    """The results of a setting: a file that only grows, one line a run."""

    def __init__(self, path: Path) -> None:
        """Reads what is there. What a killed program left of a line is cut off."""
        self.path = path
        self.results: dict[Key, Result] = {}
        if path.exists():
            text = path.read_text()
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                path.write_text(whole)
            parsed = map(Result.parse, whole.splitlines())
            self.results = {result.key: result for result in parsed}

    def add(self, result: Result) -> None:
        """Appends a line with one write."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, result.line().encode())
        finally:
            os.close(descriptor)
        self.results[result.key] = result


@cache
def provenance() -> Mapping[str, Any]:
    """Machine, versions and commit, which stand with every result."""
    found = environment()
    del found["load_average"]  # not the same during all runs
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        **found,
        "flax": importlib.metadata.version("flax"),
        "commit": described.stdout.strip() or "unknown",
    }


# Compiled apart from the optimizer's update, so that all methods of a setting share it.
@partial(jax.jit, static_argnums=0)
def _loss_and_gradient(setting: Setting, params: Params, batch: Batch) -> tuple[jax.Array, Params]:
    return jax.value_and_grad(setting.loss)(params, batch)


def fit(setting: Setting, draw: Draw, key: Key) -> tuple[Params, Any, float]:
    """Trains a copy of the start.

    Returns:
      The weights, the optimizer's state, and a step's seconds, a mean over the second half.

    Raises:
      DivergedError: a loss or a weight is not finite.
    """
    tx = optimizer(setting, key.method, key.rate, key.strength)
    params = jax.tree.map(jnp.array, draw.start)
    state = tx.init(params)
    held_out: dict[int, Any] = {}  # by step
    if METHODS[key.method].validates:
        steps = range(0, setting.steps, TPGM_EVERY)
        held_out = dict(zip(steps, one_by_one(draw.held_out(len(steps))), strict=True))
    times = [time.perf_counter()]
    for step, batch in enumerate(draw.batches):
        loss, grads = _loss_and_gradient(setting, params, batch)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "update got no validation data")  # on purpose
            params, state = jax.block_until_ready(
                apply_gradient(tx, params, state, grads, held_out.get(step), setting.loss)
            )
        times.append(time.perf_counter())
        if not jnp.isfinite(loss):
            raise DivergedError("the loss is not finite")
    if not jnp.isfinite(optax.tree.norm(params)):
        raise DivergedError("the weights are not finite")
    half = len(times) // 2
    return params, state, (times[-1] - times[half]) / (len(times) - 1 - half)


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of right answers; logits of the second class, (n,), or of all classes."""
    chosen = scores > 0 if scores.ndim == 1 else scores.argmax(-1)
    return float(np.mean(chosen == labels))


def auc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Area under the ROC curve; for several classes the mean of each against the rest."""
    if len(np.unique(labels)) < (2 if scores.ndim == 1 else scores.shape[1]):
        return None
    if scores.ndim == 1:
        return float(roc_auc_score(labels, scores))
    shares = softmax(scores.astype(np.float64), axis=-1)
    return float(roc_auc_score(labels, shares, multi_class="ovr"))


def cross_entropy(scores: np.ndarray, labels: np.ndarray) -> float:
    """The mean negative log-likelihood."""
    scores = np.stack([np.zeros_like(scores), scores], -1) if scores.ndim == 1 else scores
    shares = softmax(scores.astype(np.float64), axis=-1)
    return float(log_loss(labels, shares, labels=range(scores.shape[-1])))


@cache
def optimizer(
    setting: Setting, method: str, rate: float, strength: float
) -> optax.GradientTransformation:
    """A run's optimizer; cached, so that the next seed does not compile its update again."""
    make = METHODS[method].make
    assert make is not None
    return make(setting, schedule(rate, setting.steps), strength)


def execute(setting: Setting, draw: Draw, key: Key, after: Sequence[str] = ()) -> Iterator[Result]:
    """Runs a method, and the methods in `after`, which start from its result."""
    began = time.perf_counter()
    params, state, step_seconds = draw.start, None, None
    try:
        if METHODS[key.method].make is not None:
            params, state, step_seconds = fit(setting, draw, key)
    except DivergedError:
        found = Result(key, diverged=True, made=provenance())
    else:
        seconds = time.perf_counter() - began
        fired = optax.tree.get(state, "spd_fired")
        found = score(
            setting,
            draw,
            key,
            params,
            seconds=seconds,
            step_seconds=step_seconds,
            fired=None if fired is None else float(np.mean(fired)) / setting.steps,
        )
    yield found
    if found.diverged:
        yield from (replace(found, key=replace(key, method=method)) for method in after)
        return

    def validate(mixed: Params) -> float:
        return accuracy(setting.scores(mixed, draw.validation), draw.validation.labels)

    for method in after:
        began = time.perf_counter()
        finish = METHODS[method].after
        assert finish is not None
        made = jax.block_until_ready(finish(setting, draw, params, validate))
        more = time.perf_counter() - began
        yield score(setting, draw, replace(key, method=method), made, seconds=seconds + more)


def score(setting: Setting, draw: Draw, key: Key, params: Params, **measured: Any) -> Result:
    """Tests the weights on every set, and then what they kept of another task."""
    validation, labels = setting.scores(params, draw.validation), draw.validation.labels
    scores = {name: setting.scores(params, test) for name, test in draw.tests.items()}
    if not all(np.isfinite(some).all() for some in (validation, *scores.values())):
        return Result(key, diverged=True, made=provenance())
    areas = {name: auc(scores[name], draw.tests[name].labels) for name in scores}
    encoder, anchor = params["encoder"], draw.start["encoder"]
    distance = float(optax.tree.norm(optax.tree.sub(encoder, anchor)))
    return Result(
        key,
        validation=accuracy(validation, labels),
        validation_loss=cross_entropy(validation, labels),
        accuracy={name: accuracy(scores[name], draw.tests[name].labels) for name in scores},
        auc={name: area for name, area in areas.items() if area is not None},
        distance=distance,
        relative_distance=distance / float(optax.tree.norm(anchor)),
        retained=setting.retained(encoder) if setting.retained and scores else None,
        made=provenance(),
        **measured,
    )
