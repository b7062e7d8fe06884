"""Writes the output of a run: pictures and results.json."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
from rich.table import Table

import optax_spd
from examples.demo.errors import DemoError
from examples.demo.experiment import Settings
from examples.demo.methods import METHODS
from examples.demo.pictures import on_any_page
from examples.demo.scores import DOMAINS, Results

PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy", "scikit-learn")


@dataclass(frozen=True)
class Report:
    """A run's results, for the terminal and for files.

    Attributes:
      table: the main numbers.
      legend: explains the table.
      statement: what the run shows, without extrapolation.
      remarks: further observations.
      pictures: by file name.
      record: what results.json holds besides the settings.
    """

    table: Table
    legend: list[str]
    statement: str
    remarks: list[str]
    pictures: Mapping[str, Figure]
    record: Mapping[str, Any]


def check_directory(directory: Path) -> None:
    """Raises DemoError if results cannot be written; creates nothing."""
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise DemoError(f"--out {directory}: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise DemoError(f"--out {directory}: {existing} cannot be written")


def write(directory: Path, settings: Settings, report: Report, seconds: float) -> list[Path]:
    """Writes the pictures and results.json; no file is ever incomplete."""
    record = {**_circumstances(settings, seconds), "statement": report.statement, **report.record}
    contents = {name: _png(figure) for name, figure in report.pictures.items()}
    contents["results.json"] = json.dumps(record, indent=1).encode()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".results-", dir=directory) as scratch:
            for name, content in contents.items():
                (Path(scratch) / name).write_bytes(content)
            for name in contents:
                os.replace(Path(scratch) / name, directory / name)
    except OSError as error:
        raise DemoError(f"cannot write to {directory}: {error.strerror or error}") from error
    return [directory / name for name in contents]


def numbers(results: Results) -> dict[str, list[dict[str, Any]]]:
    """The scores for results.json, without the answers to single snippets."""
    return {
        name: [
            {key: value for key, value in dataclasses.asdict(score).items() if key != "correct"}
            | {"mean_ood_accuracy": score.shifted_accuracy, "mean_ood_auc": score.shifted_auc}
            for score in scores
        ]
        for name, scores in results.items()
    }


def _circumstances(settings: Settings, seconds: float) -> dict[str, Any]:
    return {
        "settings": dataclasses.asdict(settings),
        "methods": {
            name: {"label": METHODS[name].label, **METHODS[name].chosen}
            for name in settings.methods
        },
        "versions": {
            "python": platform.python_version(),
            "optax_spd": optax_spd.__version__,
            **{package: version(package) for package in PACKAGES},
        },
        "device": str(jax.devices()[0].device_kind),
        "cores": os.cpu_count(),
        "seconds": seconds,
        "domains": DOMAINS,
    }


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    on_any_page(figure).savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
