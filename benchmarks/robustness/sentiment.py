"""Sentiment: MiniLM learns movie snippets; tests are product reviews, editorials and tweets.

Model, data and splits are those of the demo (examples/demo/minilm.py, examples/demo/data.py): 512
movie snippets for training, 500 for validation, 500 in each test set. The retained task is spam.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.robustness import spam, texts
from benchmarks.robustness.setting import Setting
from examples.demo import data
from examples.demo.errors import DemoError
from examples.demo.experiment import Workbench

EXAMPLES = 512


def load(cache: Path, announce: Callable[[str], None], examples: int = EXAMPLES) -> Setting:
    """The setting with a number of training snippets. Without npm, retention is not measured."""
    bench = Workbench.load(cache, announce)
    try:
        other = spam.splits(cache, announce)
    except DemoError as error:
        announce(f"sentiment: the retained accuracy is left out: {error}")
        retained = None
    else:
        tested = data.join([other.test, other.shifted[spam.OTHER_MONTHS]])
        retained = texts.retention(
            other.training(spam.EXAMPLES, 0), tested.first(texts.PROBE_TESTED)
        )
    return texts.setting(
        name="sentiment" if examples == EXAMPLES else f"sentiment-{examples}",
        bench=bench,
        tests={data.IN_DISTRIBUTION: bench.splits.test, **bench.splits.shifted},
        examples=examples,
        retained=retained,
    )
