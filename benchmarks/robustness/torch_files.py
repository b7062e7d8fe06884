"""Reads the tensors of a PyTorch state dict, without PyTorch and without unpickling.

A pickle is a program that may call anything. Here a small interpreter steps through its opcodes. It
knows those that state dicts use, takes a global for a name, and makes nothing but dictionaries,
tuples and arrays. Any other opcode or name ends in an error.

Two forms exist. Since version 1.6 PyTorch writes a zip archive with the pickle `*/data.pkl` and a
file of raw numbers for each storage. Before, it wrote pickles one after the other - a magic number,
a protocol number, the machine's properties, the object, the storages' keys - and then every
storage's length and numbers.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from examples.demo.errors import DemoError

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001

# What the stack, struct and zipfile raise where bytes are missing or in disorder.
_DAMAGED = (LookupError, TypeError, struct.error, RuntimeError, EOFError, zipfile.BadZipFile)

_DTYPES = {
    "torch DoubleStorage": "<f8",
    "torch FloatStorage": "<f4",
    "torch HalfStorage": "<f2",
    "torch LongStorage": "<i8",
    "torch IntStorage": "<i4",
    "torch ShortStorage": "<i2",
    "torch CharStorage": "<i1",
    "torch ByteStorage": "<u1",
    "torch BoolStorage": "?",
}


@dataclass(frozen=True)
class _Name:
    """What a pickle names and would import."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """A run of numbers that is stored outside of the pickle."""

    key: str
    dtype: np.dtype[Any]
    size: int


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict file by name; buffers too, such as running means.

    Raises:
      DemoError: the file is damaged, or asks for something that a state dict does not need.
    """
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                return _read_zip(file)
            file.seek(0)
            return _read_legacy(file)
    except OSError as error:
        raise DemoError(f"cannot read the weights in {path}: {error.strerror or error}") from error
    except ValueError as error:  # genops raises it too
        raise DemoError(f"cannot read the weights in {path}: {error}") from error
    except _DAMAGED as error:
        raise DemoError(f"cannot read the weights in {path}: it is damaged ({error})") from error


def _read_zip(file: IO[bytes]) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it is a zip archive without one data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist():
            _require(archive.read(f"{folder}byteorder") == b"little", "it is big-endian")
        with archive.open(pickles[0]) as stream:
            found = _interpret(stream)
        return _arrays(found, lambda storage: archive.read(f"{folder}data/{storage.key}"))


def _read_legacy(file: IO[bytes]) -> dict[str, np.ndarray]:
    known = _interpret(file) == _MAGIC and _interpret(file) == _PROTOCOL
    _require(known, "it is not a file of PyTorch")
    system = _interpret(file)
    little = isinstance(system, dict) and system.get("little_endian") is True
    _require(little, "it is big-endian")
    found = _interpret(file)
    keys = _interpret(file)
    if not isinstance(keys, list) or not isinstance(found, dict):
        raise ValueError("it is not a state dict")
    _require(all(type(key) is str for key in keys), "its storages have no names")
    storages = {t.storage.key: t.storage for t in found.values() if isinstance(t, _Tensor)}
    raw = {}
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        _require(
            storages[key].size == count, f"its storage {key} is not as long as its tensors say"
        )
        raw[key] = file.read(count * storages[key].dtype.itemsize)
    return _arrays(found, lambda storage: raw[storage.key])


def _arrays(found: Any, read: Callable[[_Storage], bytes]) -> dict[str, np.ndarray]:
    """Copies of the tensors' numbers. Bounds are checked: strides could reach other memory."""
    if not isinstance(found, dict) or not all(isinstance(t, _Tensor) for t in found.values()):
        raise ValueError("it is not a state dict")
    arrays = {}
    for name, tensor in found.items():
        storage = tensor.storage
        numbers = np.frombuffer(read(storage), storage.dtype)
        _require(len(numbers) == storage.size, f"the numbers of {name} are not as many as it says")
        steps = zip(tensor.shape, tensor.strides, strict=True)
        last = tensor.offset + sum((size - 1) * stride for size, stride in steps)
        whole = min((tensor.offset, *tensor.shape, *tensor.strides)) >= 0 and last < storage.size
        whole = whole and math.prod(tensor.shape) <= storage.size
        _require(whole, f"{name} reaches outside of its storage")
        strides = tuple(stride * numbers.itemsize for stride in tensor.strides)
        view = np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides)
        arrays[name] = view.copy()
    return arrays


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _interpret(file: IO[bytes]) -> Any:
    """What the next pickle in a file describes."""
    stack: list[Any] = []
    outer: list[list[Any]] = []  # the stacks below each mark
    memo: dict[Any, Any] = {}

    def since_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, outer.pop()
        return items

    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                outer.append(stack)
                stack = []
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                _require(len(stack) >= count, "its pickle is damaged")
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                items = since_mark()
                stack.append(tuple(items))
            case "APPENDS":
                items = since_mark()
                _require(isinstance(stack[-1], list), "its pickle appends to what is no list")
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set(stack[-1], [key, value])
            case "SETITEMS":
                items = since_mark()
                _set(stack[-1], items)
            case "GLOBAL":
                stack.append(_Name(str(argument)))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            case "BUILD":  # attributes of the ordered dict, such as the modules' versions
                stack.pop()
                _require(isinstance(stack[-1], dict), "its pickle sets attributes")
            case other:
                raise ValueError(f"its pickle has the opcode {other}, which no state dict needs")
    raise ValueError("its pickle has no end")


def _set(target: Any, items: list[Any]) -> None:
    # Only text, because hashing a nest of tuples may take for ever.
    keys, values = items[::2], items[1::2]
    _require(isinstance(target, dict) and all(type(key) is str for key in keys), "a key is no text")
    target.update(zip(keys, values, strict=True))


def _storage(written: Any) -> _Storage:
    match written:
        # The legacy form has a sixth entry, for storages that are views of others.
        case ("storage", _Name(name), str(key), str(), int(size), *rest) if rest in ([], [None]):
            if name not in _DTYPES:
                raise ValueError(f"its pickle has numbers of the type {name}, which is not known")
            return _Storage(key, np.dtype(_DTYPES[name]), size)
    raise ValueError("its pickle refers to something that is no storage of numbers")


def _call(function: Any, arguments: Any) -> Any:
    """The three calls that state dicts make, done here."""
    match function, arguments:
        case _Name("collections OrderedDict"), ():
            return {}
        case _Name("torch._utils _rebuild_parameter"), (_Tensor() as tensor, *_):
            return tensor
        case (
            _Name("torch._utils _rebuild_tensor_v2"),
            (_Storage() as storage, int(offset), tuple(shape), tuple(strides), *_),
        ):
            _require(all(type(n) is int for n in (*shape, *strides)), "a shape is not of integers")
            return _Tensor(storage, offset, shape, strides)
    name = function.name if isinstance(function, _Name) else "something without a name"
    raise ValueError(f"its pickle calls {name}, which no state dict needs")
