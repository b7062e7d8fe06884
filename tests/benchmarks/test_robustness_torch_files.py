"""torch_files reads what PyTorch writes, and runs nothing that a file asks for.

PyTorch is not among the tests' packages: the files are written here, by Python's pickle.
"""

import io
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from benchmarks.robustness.torch_files import read_state_dict
from examples.demo.errors import DemoError

WEIGHT = np.arange(6, dtype="<f4").reshape(2, 3)
STEPS = np.array(7, "<i8")


class Storage:
    def __init__(self, kind, key, size):
        self.kind, self.key, self.size = kind, key, size


class Tensor:
    """Is pickled as PyTorch pickles its tensors."""

    def __init__(self, storage, offset, shape, strides):
        self.arguments = (storage, offset, shape, strides, False, OrderedDict())

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.arguments


class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


class Pickler(pickle.Pickler):
    legacy = False

    def persistent_id(self, item):
        if isinstance(item, Storage):
            reference = ("storage", item.kind, item.key, "cpu", item.size)
            return (*reference, None) if self.legacy else reference
        return None


@pytest.fixture(autouse=True)
def torch(monkeypatch, tmp_path):
    """Modules that have the names pickled; nothing reads them afterwards."""
    monkeypatch.chdir(tmp_path)
    for module, names in {
        "torch": ("FloatStorage", "LongStorage"),
        "torch._utils": ("_rebuild_tensor_v2",),
    }.items():
        made = types.ModuleType(module)
        for name in names:
            setattr(made, name, type(name, (), {"__module__": module, "__qualname__": name}))
        monkeypatch.setitem(sys.modules, module, made)


def state(**changed):
    torch = sys.modules["torch"]
    weight = {"offset": 0, "shape": (2, 3), "strides": (3, 1)} | changed
    tensors = OrderedDict(w=Tensor(Storage(torch.FloatStorage, "0", 6), **weight))
    tensors["steps"] = Tensor(Storage(torch.LongStorage, "1", 1), 0, (), ())
    tensors._metadata = OrderedDict(w={"version": 1})
    return tensors


def pickled(item, legacy=False, protocol=2):
    stream = io.BytesIO()
    pickler = Pickler(stream, protocol)
    pickler.legacy = legacy
    pickler.dump(item)
    return stream.getvalue()


def in_zip(path, pickle_bytes):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickle_bytes)
        archive.writestr("model/byteorder", "little")
        archive.writestr("model/data/0", WEIGHT.tobytes())
        archive.writestr("model/data/1", STEPS.tobytes())
    return path


def legacy(path, pickle_bytes):
    header = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}]
    parts = [*map(pickled, header), pickle_bytes, pickled(["1", "0"])]
    parts += [struct.pack("<q", 1), STEPS.tobytes(), struct.pack("<q", 6), WEIGHT.tobytes()]
    path.write_bytes(b"".join(parts))
    return path


@pytest.mark.parametrize("write", [in_zip, legacy])
def test_both_forms_are_read(tmp_path, write):
    found = read_state_dict(write(tmp_path / "w.pth", pickled(state(), write is legacy)))
    assert list(found) == ["w", "steps"]
    np.testing.assert_array_equal(found["w"], WEIGHT)
    assert found["w"].dtype == np.float32
    assert found["steps"].shape == ()
    assert found["steps"] == 7


def test_offsets_and_strides_are_those_of_the_view(tmp_path):
    view = state(offset=1, shape=(2, 2), strides=(1, 3))
    found = read_state_dict(in_zip(tmp_path / "w.pth", pickled(view)))
    np.testing.assert_array_equal(found["w"], WEIGHT[:, 1:].T)


@pytest.mark.parametrize("write", [in_zip, legacy])
def test_a_pickle_that_calls_a_program_is_refused_and_not_run(tmp_path, write):
    with pytest.raises(DemoError, match=rf"evil.pth: its pickle calls {os.system.__module__} syst"):
        read_state_dict(write(tmp_path / "evil.pth", pickled({"w": Attack()})))
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: pickled(state(), protocol=4), "the opcode FRAME"),
        (lambda: b"cos\nsystem\n\x81.", "the opcode NEWOBJ"),
        (lambda: pickled({"w": 3}), "it is not a state dict"),
        (lambda: pickled(state(shape=(3, 3))), "w reaches outside of its storage"),
        (lambda: pickled(state(shape=(9, 9), strides=(0, 0))), "w reaches outside"),
        (lambda: pickled(state(offset=-1)), "w reaches outside"),
        (lambda: pickled(state())[:-9], "cannot read"),
        (lambda: b"u.", "it is damaged"),
    ],
)
def test_what_is_not_a_state_dict_is_one_line(tmp_path, content, message):
    with pytest.raises(DemoError, match=message) as caught:
        read_state_dict(in_zip(tmp_path / "w.pth", content()))
    assert "w.pth" in str(caught.value)
    assert "\n" not in str(caught.value)
