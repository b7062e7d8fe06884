"""Bytes in a device's main memory, from the text of a compiled program.

XLA's own analysis does not distinguish a TPU's main memory from its on-chip memories, and on a GPU
does not count what a program reads and writes. The text of a compiled program contains both: it
lists the kernels in execution order, with the shapes of their operands and results. An array's
layout ends in the number of its memory, as in ``f32[8,128]{1,0:T(8,128)S(1)}``. Without a number it
is in main memory (a CPU has no other); 5 is the host's memory, the others are a TPU's on-chip ones.

Only the main program is read, and the costliest branch where it branches; a loop or a call is one
kernel. Every kernel is assumed to read each operand once and to write each result once, whole and
without padding.
"""

import collections
import itertools
import math
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

MAIN = 0
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# Kernels that return their operands under another name or shape.
VIEWS = {"bitcast", "ConcatBitcast", "get-tuple-element", "optimization-barrier", "tuple"}
# Kernels that move nothing but allocate a buffer.
UNMOVED = {"AllocateBuffer"}
OUTSIDE = {"after-all", "constant", "parameter", "partition-id", "replica-id"}

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{[^}]*?(?:S\((\d+)\))?\})?")
_INSTRUCTION = re.compile(
    r"\s*(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*?)\)(?:, ([\w-]+=.*))?$"
)
_BRANCHES = re.compile(r"branch_computations=\{[^}]*\}|(?:true|false)_computation=%[\w.-]+")


class Array(NamedTuple):
    """A part of a kernel's result: its size, and the number of its memory."""

    bytes: int
    memory: int


class Instruction(NamedTuple):
    """A line of the text. Its kind is the operation, or the target of a custom call."""

    name: str
    kind: str
    results: list[Array]
    operands: list[str]
    attributes: str
    is_root: bool


def moved_bytes(text: str) -> int:
    """Bytes that the program reads from main memory and writes to it.

    An asynchronous kernel is counted where it is done. Of each operand it reads at most as much as
    its result takes (it may be a slice).
    """
    return _moved(main_program(text), text)


def _moved(program: Iterable[Instruction], text: str) -> int:
    results: dict[str, list[Array]] = {}
    started: dict[str, list[str]] = {}
    total = 0
    for each in program:
        results[each.name] = each.results
        if each.kind == "conditional":
            total += max(_moved(branch, text) for branch in _branches(each, text))
        elif each.kind.endswith("-start"):
            started[each.name] = each.operands
        elif each.kind not in VIEWS | UNMOVED | OUTSIDE:
            operands, limit = each.operands, math.inf
            if each.kind.endswith("-done"):
                operands = started.get(operands[0], operands)
                limit = sum(array.bytes for array in each.results)
            read = [array for name in operands for array in results.get(name, ())]
            total += sum(int(min(array.bytes, limit)) for array in read if array.memory == MAIN)
            total += sum(array.bytes for array in each.results if array.memory == MAIN)
    return total


def temporary_bytes(text: str) -> int:
    """The largest number of bytes of main memory in use by intermediate results at any time.

    The program's results and a kernel's internal buffers are not included.
    """
    return _temporary(list(main_program(text)), text)


def _temporary(program: Sequence[Instruction], text: str) -> int:
    buffers: dict[str, list[list[int]]] = {}  # for each part of a result
    sizes: list[int] = []
    born: list[int] = []
    dies: list[int] = []
    started: dict[str, int] = {}
    kept: set[int] = set()
    in_branches = [0] * (len(program) + 1)
    for time, each in enumerate(program):
        if each.kind == "conditional":
            in_branches[time] = max(_temporary(list(x), text) for x in _branches(each, text))
        taken = [buffers.get(name, []) for name in each.operands]
        for buffer in _flat(map(_flat, taken)):
            dies[buffer] = time
        if each.kind == "get-tuple-element":
            index = int(re.findall(r"index=(\d+)", each.attributes)[0])
            parts = taken[0][index : index + 1]
        elif each.kind == "tuple":
            parts = [_flat(part) for part in taken]
        elif each.kind in VIEWS:
            parts = [_flat(map(_flat, taken))]
        elif each.kind.endswith("-start"):
            started[each.name] = time
            parts = [_flat(map(_flat, taken))]
        else:
            parts = []
            for array in [] if each.kind in OUTSIDE else each.results:
                parts.append([len(sizes)])
                sizes.append(array.bytes if array.memory == MAIN else 0)
                born.append(started.get(each.operands[0], time) if each.operands else time)
                dies.append(time)
        buffers[each.name] = parts
        if each.is_root:
            kept = set(_flat(parts))
    change = [0] * (len(program) + 1)
    for buffer, size in enumerate(sizes):
        if buffer not in kept:
            change[born[buffer]] += size
            change[dies[buffer] + 1] -= size
    most: int = max(map(operator.add, itertools.accumulate(change), in_branches))
    return most


def collectives(text: str) -> dict[str, list[int]]:
    """Bytes of the results of each collective operation, in the whole program, by kind."""
    found: dict[str, list[int]] = collections.defaultdict(list)
    for each in _instructions(text):
        kind = each.kind.removesuffix("-done")
        if kind in COLLECTIVES:
            found[kind].append(sum(array.bytes for array in each.results))
    return dict(found)


def main_program(text: str) -> Iterator[Instruction]:
    """The instructions of the main program, in execution order."""
    main = _computation("ENTRY", text)
    if main is None:
        raise ValueError("this is no text of a compiled program: no line begins with ENTRY")
    return _instructions(main)


def _branches(conditional: Instruction, text: str) -> Iterator[Iterator[Instruction]]:
    for names in _BRANCHES.findall(conditional.attributes):
        for name in re.findall(r"%([\w.-]+)", names):
            branch = _computation(f"%{name}", text)
            if branch is None:
                raise ValueError(f"the text has no computation {name}, a branch")
            yield _instructions(branch)


def _computation(head: str, text: str) -> str | None:
    found = re.search(rf"^{re.escape(head)} .*?^\}}", text, re.MULTILINE | re.DOTALL)
    return None if found is None else found[0]


def _instructions(text: str) -> Iterator[Instruction]:
    for line in text.splitlines():
        found = _INSTRUCTION.match(line)
        if found is not None:
            root, name, shapes, kind, operands, attributes = found.groups(default="")
            target = re.search(r'custom_call_target="(\w+)"', attributes)
            yield Instruction(
                name,
                target[1] if kind == "custom-call" and target else kind,
                [_array(*array) for array in _ARRAY.findall(shapes)],
                re.findall(r"%([\w.-]+)", operands),
                attributes,
                bool(root),
            )


def _array(dtype: str, sizes: str, memory: str) -> Array:
    bits = re.search(r"\d+", dtype)  # none in "token"
    width = 8 if dtype == "pred" else int(bits[0]) if bits else 0
    elements = math.prod(int(size) for size in sizes.split(",") if size)
    return Array(-(-elements * width // 8), int(memory or MAIN))


def _flat(parts: Iterator[list[int]] | list[list[int]]) -> list[int]:
    return [buffer for part in parts for buffer in part]
