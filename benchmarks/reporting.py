"""Helpers for the benchmarks' tables and command lines."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

import optax_spd

PACKAGES = ("jax", "jaxlib", "optax", "optax_spd")


def environment() -> dict[str, Any]:
    """The machine, its current load, and the versions of the packages."""
    device = jax.devices()[0]
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "device": f"{device.platform} ({device.device_kind})",
        "cpu": models[0] if models else "unknown CPU",
        "cores": cores(),
        "load_average": os.getloadavg()[0],
        **{name: importlib.metadata.version(name) for name in PACKAGES[:-1]},
        "optax_spd": optax_spd.__version__,
        "huge_pages": huge_pages(os.environ.get("GLIBC_TUNABLES", "")),
    }


def cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def huge_pages(tunables: str) -> bool:
    """Whether GLIBC_TUNABLES, "name=value:name=value", makes malloc use huge pages."""
    values = dict(each.partition("=")[::2] for each in tunables.split(":"))
    return values.get("glibc.malloc.hugetlb", "0") != "0"


def header(env: dict[str, Any]) -> list[str]:
    """The environment as the first lines of a table."""
    return [
        f"device    {env['device']}: {env['cpu']}, {env['cores']} cores, load average before the "
        f"run {env['load_average']:.1f}",
        f"versions  {', '.join(f'{name} {env[name]}' for name in PACKAGES)}",
        f"memory    huge pages {'set' if env['huge_pages'] else 'not set'} by GLIBC_TUNABLES",
    ]


def quartiles(values: dict[str, float], scale: float = 1.0, digits: int = 2) -> str:
    """The quartiles of a spread, as text."""
    low, high = (scale * values[key] for key in ("lower_quartile", "upper_quartile"))
    return f"{low:.{digits}f}-{high:.{digits}f}"


def megabytes(size: int | None, digits: int = 1) -> str:
    """A number of bytes in MB; "unknown" if the backend does not give it."""
    return "unknown" if size is None else f"{size / 1e6:.{digits}f}"


def run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    compare: Callable[..., dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    plot: Callable[[dict[str, Any], pathlib.Path], None] | None = None,
) -> None:
    """Measures with the command line's options, prints the table, writes JSON and picture."""
    parser.add_argument(
        "--json", type=output, metavar="FILE", help="also write all numbers to this file"
    )
    if plot is not None:
        parser.add_argument(
            "--plot", type=picture, metavar="FILE", help="also draw them in this PNG file"
        )
    options = vars(parser.parse_args(argv))
    file, drawing = options.pop("json"), options.pop("plot", None)
    result = compare(**options)
    print(table(result))
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n")
    if plot is not None and drawing is not None:
        plot(result, drawing)


# argparse shows this function's name: "invalid count value".
def count(text: str) -> int:
    """Parses a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"at least 1 is needed, got {text}")
    return value


def picture(text: str) -> pathlib.Path:
    """Parses the path of a picture to write; needs matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib: pip install matplotlib")
    return output(text)


def output(text: str) -> pathlib.Path:
    """Parses the path of a file to write; its folder must exist."""
    path = pathlib.Path(text)
    # Fail before the measurement, not after it.
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r} to write to")
    return path
