"""What a setting is: pretrained weights, a task to learn, and shifted test sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

import optax_spd

Params = dict[str, Any]
Batch = tuple[Any, ...]  # arrays, (batch, ...); the labels are the last


@dataclass(frozen=True)
class Examples:
    """Inputs in the setting's own form, and their labels, (n,), from 0."""

    inputs: Any
    labels: np.ndarray

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.labels)


@dataclass(frozen=True)
class Draw:
    """All that the methods share on one seed.

    Attributes:
      start: the pretrained weights, with a head fitted to their features (LP-FT): two subtrees,
        "encoder" and "head".
      batches: one a step, in the order that every method sees.
      validation: in-distribution examples, none of which are trained on. Settings are chosen by
        them.
      tests: by name; the first is in distribution, the others are shifted. Empty while settings are
        chosen.
      held_out: returns a number of batches, stacked on a leading axis, of further in-distribution
        examples. Methods that learn from validation data learn from these.
    """

    start: Params
    batches: Sequence[Batch]
    validation: Examples
    tests: Mapping[str, Examples]
    held_out: Callable[[int], Batch]


@dataclass(frozen=True, eq=False)  # compared by identity, so that it can be static under jit
class Setting:
    """One row of the benchmark's plan.

    Attributes:
      name: a word, for files and the command line.
      tests: the names of the test sets; the first is in distribution.
      steps: the number of training steps.
      draw: makes the data and the start of a seed.
      loss: the mean loss of a batch; called inside jit and differentiated.
      scores: the classifier's output for all examples: logits of the second class, (n,), or of all
        classes, (n, classes).
      layers: the output axes of arrays that are not kernels of Flax, for the norms of TPGM and FTP.
      depth: an array's depth from its path, for layer decay: -1 for what stands before the blocks,
        then 0, 1, ..., the largest for the head.
      balanced: the layers whose spectra TempBalance balances.
      follows: the module whose scale a module takes (`optax_spd.temp_balance`), or None.
      embedding: a pattern for the first layer, which freeze-embed does not train; None if it has
        one of the usual names.
      retained: accuracy of a linear probe for another task on the frozen encoder, or None.
    """

    name: str
    tests: Sequence[str]
    steps: int
    draw: Callable[[int], Draw]
    loss: Callable[[Params, Batch], jax.Array]
    scores: Callable[[Params, Examples], np.ndarray]
    layers: Callable[[str, Any], optax_spd.LayerSpec] | None
    depth: Callable[[str], int]
    balanced: Callable[[Any], Any]
    follows: Callable[[str], str] | None = None
    embedding: str | None = None
    retained: Callable[[Params], float] | None = None

    @property
    def shifts(self) -> Sequence[str]:
        """The test sets from other distributions."""
        return self.tests[1:]
