"""Types of the arguments that several methods share."""

from collections.abc import Callable
from typing import Any, Literal

import jax

PyTree = Any
Anchor = Literal["initial", "zero", "argument"] | PyTree
AxisName = str | tuple[str, ...] | PyTree | None
DType = jax.typing.DTypeLike | None
Mask = PyTree | Callable[[PyTree], PyTree] | None
Norm = Literal["mars", "l2"]
