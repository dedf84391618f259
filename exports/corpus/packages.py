"""Packages of Debian, PyPI and npm: downloaded once with their own clients, and unpacked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

Registry = Literal["debian", "pypi", "npm"]
NOTE = "package.json"
"""Beside the unpacked files: name and checksum of the archive that they came in."""
REMEDIES = {
    "apt-get": "Debian 12 has it",
    "dpkg-deb": "Debian 12 has it",
    "pip": "run `python -m ensurepip`",
    "npm": "install Node.js",
}


@dataclass(frozen=True, kw_only=True)
class Package:
    """One package of a registry."""

    registry: Registry
    name: str
    version: str = ""
    """Exact on PyPI and npm. Of Debian's, the release on this machine decides."""

    def __str__(self) -> str:
        return f"{self.registry} {self.name} {self.version}".rstrip()

    @property
    def slug(self) -> str:
        """A file name."""
        return str(self).replace("/", "+").replace(" ", "_")


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    """Files of a package, and the archive that they came in."""

    folder: Path
    archive: str
    sha256: str


class PackageCache:
    """A folder of unpacked packages. One that is there is not downloaded again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, package: Package) -> Unpacked:
        """The files of a package. Raises ValueError for one that cannot be had, and says why."""
        place = self.folder / package.slug
        if not (place / NOTE).is_file():
            self._add(package, place)
        note = json.loads((place / NOTE).read_text(encoding="utf-8"))
        return Unpacked(folder=place / "files", archive=note["archive"], sha256=note["sha256"])

    def _add(self, package: Package, place: Path) -> None:
        """Download and unpack beside `place`, and move it there when it is whole."""
        print(f"downloading {package}", flush=True)
        partial = place.with_name(f"{place.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(place, ignore_errors=True)
        (partial / "download").mkdir(parents=True)
        archive = _download(package, partial / "download")
        UNPACKERS[package.registry](archive, partial / "files")
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        note = {"package": str(package), "archive": archive.name, "sha256": digest}
        (partial / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(partial / "download")
        os.replace(partial, place)


def _download(package: Package, folder: Path) -> Path:
    """The archive of a package, in an empty folder."""
    _run(_command(package), folder, package)
    found = sorted(folder.iterdir())
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "nothing"
        raise ValueError(f"downloading {package} gave {names} instead of one archive")
    return found[0]


def _command(package: Package) -> list[str]:
    """The command that downloads a package into the current folder."""
    if package.registry == "debian":
        return [_client("apt-get"), "download", "-q", package.name]
    if package.registry == "npm":
        return [_client("npm"), "pack", "--silent", f"{package.name}@{package.version}"]
    if find_spec("pip") is None:
        raise ValueError(_missing("pip"))
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    return [*pip, "--only-binary=:all:", f"{package.name}=={package.version}"]


def _client(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise ValueError(_missing(name))
    return path


def _missing(client: str) -> str:
    return f"{client} is missing, which downloads packages of the corpus: {REMEDIES[client]}"


def _run(command: list[str], folder: Path, package: Package) -> None:
    """Run a client. Raises ValueError with the last line that it wrote."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        update = " (`apt-get update` first?)" if package.registry == "debian" else ""
        raise ValueError(
            f"{package} cannot be had: {lines[-1]}{update}; "
            "--missing skip builds the corpus without it"
        )


def _unpack_deb(archive: Path, folder: Path) -> None:
    command = [_client("dpkg-deb"), "--extract", str(archive), str(folder)]
    subprocess.run(command, check=True, capture_output=True)


def _unpack_wheel(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)


def _unpack_tarball(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")


UNPACKERS: dict[Registry, Callable[[Path, Path], None]] = {
    "debian": _unpack_deb,
    "pypi": _unpack_wheel,
    "npm": _unpack_tarball,
}
