"""``python -m optax_spd``: the versions, devices and optional packages to name in a bug report."""

import importlib.metadata
import platform

import jax

import optax_spd

REQUIRED = ("jax", "jaxlib", "optax", "numpy")
OPTIONAL = ("flax", "equinox", "orbax-checkpoint", "matplotlib")


def report() -> str:
    """One line per fact."""
    lines = [
        ("optax_spd", optax_spd.__version__),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        *((name, importlib.metadata.version(name)) for name in REQUIRED),
        *((name, _version(name)) for name in OPTIONAL),
        ("devices", _devices()),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    kinds = [device.device_kind for device in jax.devices()]
    return ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))


if __name__ == "__main__":
    print(report())
