"""``python -m optax_spd`` names versions and devices."""

import importlib.metadata
import subprocess
import sys

import pytest

import optax_spd
from optax_spd import __main__ as main


def test_it_prints_versions_and_devices() -> None:
    command = [sys.executable, "-m", "optax_spd"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    facts = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert facts["optax_spd"] == optax_spd.__version__
    assert facts["jax"] == importlib.metadata.version("jax")
    assert facts["flax"] == importlib.metadata.version("flax")
    assert "×" in facts["devices"]


def test_a_missing_package_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "OPTIONAL", ("no-such-package",))
    assert "no-such-package  not installed" in main.report()
