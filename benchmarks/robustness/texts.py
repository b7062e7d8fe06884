"""What the settings with texts share: MiniLM, the demo's loop over mails or snippets, retention."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from benchmarks.robustness.setting import Draw, Examples, Params, Setting
from examples.demo import data, methods, training
from examples.demo.data import Texts
from examples.demo.experiment import VALIDATION, HeldOut, Workbench, prepare

STEPS = 128
TESTED = 500  # texts of a test set
CHOSEN_BY = 1000  # validation texts, besides those that radii are learned on
PROBE_STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)  # of the probe for the other task, inverse
PROBE_TESTED = 1000  # texts that the probe for the other task is tested on

Retained = Callable[[Params], float]


def setting(
    name: str,
    bench: Workbench,
    tests: Mapping[str, Texts],
    examples: int,
    retained: Retained | None,
) -> Setting:
    """Fine-tunes on `examples` texts, half of each class. The head starts as a linear probe."""
    learned_from = bench.splits.validation.first(VALIDATION)
    held_out = HeldOut(learned_from, {}, training.embed(bench.encoder, learned_from), {})
    others = np.arange(VALIDATION, min(VALIDATION + CHOSEN_BY, len(bench.splits.validation)))
    # Spam has too few mails to keep the two apart.
    validation = bench.splits.validation.take(others) if len(others) else learned_from

    def draw(seed: int) -> Draw:
        material = prepare(bench, held_out, examples, seed)
        return Draw(
            start=material.start,
            batches=list(data.training_batches(material.texts, STEPS, seed)),
            validation=_examples(validation),
            tests={name: _examples(test.first(TESTED)) for name, test in tests.items()},
            held_out=lambda count: data.validation_batches(material.validation, count, seed),
        )

    def scores(params: Params, examples: Examples) -> np.ndarray:
        texts = Texts(examples.inputs, examples.labels)
        return training.logits(params, training.embed(params["encoder"], texts))

    return Setting(
        name=name,
        tests=tuple(tests),
        steps=STEPS,
        draw=draw,
        loss=training.validation_loss,
        scores=scores,
        layers=methods.LAYERS,
        depth=methods.depth,
        balanced=methods.BALANCED,
        follows=methods.followed,
        retained=retained,
    )


def _examples(texts: Texts) -> Examples:
    return Examples(texts.tokens, texts.labels)


def retention(train: Texts, test: Texts) -> Retained:
    """Accuracy of a linear probe of another task, by encoder.

    The texts are always the same. The probe's regularisation is chosen for each encoder, by
    five-fold cross-validation.
    """

    def retained(encoder: Params) -> float:
        rows = training.embed_all(encoder, {"train": train, "test": test})
        with threadpool_limits(1):
            probe = GridSearchCV(LogisticRegression(max_iter=1000), {"C": PROBE_STRENGTHS}, cv=5)
            probe.fit(rows["train"], train.labels)
        return float(probe.score(rows["test"], test.labels))

    return retained
