"""A layer is its path: a run goes on in containers that keep its layers in another order."""

import collections
import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.core
import jax
import numpy as np
import optax
from contract_methods import METHODS, RATE, every_method
from contract_runs import SIGNS, STEPS, STOP, at, on_device, step_of, vectors
from flax import nnx
from hypothesis import Phase, given, seed, settings, strategies as st

import optax_spd
from optax_spd.layers import trees

BLOCKS = 11


@functools.partial(jax.tree_util.register_dataclass, data_fields=("kernel", "bias"), meta_fields=())
@dataclasses.dataclass
class Block:
    """Not in the order of the alphabet."""

    kernel: Any
    bias: Any


class NamedBlock(NamedTuple):
    kernel: Any
    bias: Any


def ordered(tree: dict[str, Any]) -> Any:
    """From the last key to the first."""
    return collections.OrderedDict(reversed(tree.items()))


Container = Callable[[dict[str, Any]], Any]
# In the order of the numbers, in that of their spellings, and in that of insertion.
NUMBERED: dict[str, Container] = {
    "list": lambda tree: [*tree.values()],
    "tuple": lambda tree: (*tree.values(),),
    "numbers": lambda tree: {int(key): value for key, value in tree.items()},
    "dict": dict,
    "FrozenDict": flax.core.freeze,
    "OrderedDict": ordered,
    "nnx.State": nnx.State,
}
NAMED: dict[str, Container] = {
    "dict": dict,
    "FrozenDict": flax.core.freeze,
    "OrderedDict": ordered,
    "NamedTuple": lambda tree: NamedBlock(**tree),
    "dataclass": lambda tree: Block(**tree),
}


class Spelling(NamedTuple):
    """The containers of a tree of numbered blocks."""

    blocks: str
    block: str

    def write(self, tree: Any) -> Any:
        """Spells a tree of dicts."""
        blocks = tree["blocks"]
        blocks = {key: NAMED[self.block](blocks[key]) for key in sorted(blocks, key=int)}
        return {"blocks": NUMBERED[self.blocks](blocks), "head": tree["head"]}


def by_path(tree: Any) -> dict[str, np.ndarray]:
    """The arrays of a tree under their paths, as one writes them to a file."""
    flat = trees.flatten(jax.device_get(tree))
    return {trees.path_name(p): np.asarray(x) for p, x in zip(flat.paths, flat.leaves, strict=True)}


def restored(saved: Any, target: Any) -> Any:
    """A tree in the structure of another. (What formats do with it: test_checkpoints.py.)"""
    arrays, flat = by_path(saved), trees.flatten(target)
    return flat.unflatten(arrays[trees.path_name(path)] for path in flat.paths)


def arrays(start: int, *leading: int) -> Any:
    """Random numbers like the model."""
    draw = np.random.default_rng(start)
    normal = lambda *shape: draw.normal(size=(*leading, *shape)).astype(np.float32)
    block = lambda: {"bias": normal(3), "kernel": normal(6, 3)}
    return {"blocks": {str(i): block() for i in range(BLOCKS)}, "head": normal(3, 5)}


def gradients() -> Any:
    """As those of the other runs: they turn round, and momentum does so later."""

    def one(drift: np.ndarray, noise: np.ndarray) -> np.ndarray:
        return SIGNS.reshape(-1, *[1] * drift.ndim) * drift + noise

    return jax.tree.map(one, arrays(1), arrays(2, STEPS))


def differ(spellings: tuple[Spelling, Spelling]) -> bool:
    """Whether they keep the blocks in another order."""
    flat = [trees.flatten(spelling.write(arrays(0))) for spelling in spellings]
    first, second = ([number for _, number, *_ in tree.paths[:-1]] for tree in flat)
    return first != second


@every_method(where=lambda method: method.is_stage and bool(method.vectors))
def test_a_run_goes_on_in_another_spelling(name: str) -> None:
    tx = optax_spd.chain(optax.sgd(RATE, momentum=0.9), METHODS[name].stage())
    step = jax.jit(step_of(name, tx))
    spelling = st.builds(Spelling, st.sampled_from([*NUMBERED]), st.sampled_from([*NAMED]))

    def check(spellings: tuple[Spelling, Spelling]) -> None:
        first, second = spellings
        begin = on_device(first.write(arrays(0)))
        grads = gradients()
        of_step = [at(grads, index) for index in range(STEPS)]

        def train(spelling: Spelling, params: Any, state: Any, steps: list[Any]) -> Any:
            for grads in steps:
                params, state = jax.block_until_ready(step(params, state, spelling.write(grads)))
            return params, state

        saved = train(first, begin, tx.init(begin), of_step[:STOP])
        like = on_device(second.write(arrays(3)))
        found = restored(saved, (like, tx.init(like)))
        assert jax.tree.structure(found) == jax.tree.structure((like, tx.init(like)))
        end = train(second, *found, of_step[STOP:])
        expected = train(first, *saved, of_step[STOP:])
        for field, vector in vectors(name, expected[1]).items():
            assert len(np.unique(vector)) > 2, field
        found_arrays, expected_arrays = by_path(end), by_path(expected)
        assert found_arrays.keys() == expected_arrays.keys()
        for path, array in expected_arrays.items():
            np.testing.assert_allclose(found_arrays[path], array, 1e-5, 1e-6, err_msg=path)

    given_spellings = given(st.tuples(spelling, spelling).filter(differ))
    # Each test has one example of its own. It is compiled twice, so a failing one is not made
    # smaller.
    once = settings(max_examples=1, deadline=None, database=None, phases=[Phase.generate])
    seed(zlib.crc32(name.encode()))(once(given_spellings(check)))()
