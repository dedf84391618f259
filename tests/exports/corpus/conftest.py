"""Clients of registries that serve packages made by a test, and such packages. No network."""

import io
import os
import shutil
import stat
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

CLIENT = """#!/bin/sh
for word; do last=$word; done
echo "$0 $*" >> "{shelf}/log"
name=$(printf '%s' "$last" | tr '/@' '--')
cp "{shelf}/$name" . 2>/dev/null || {{ echo "E: Unable to locate package $last" >&2; exit 100; }}
"""


class Shelf:
    """Packages in a folder, and clients named apt-get and npm that copy them from there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in ("apt-get", "npm"):
            client = self.bin / name
            client.write_text(CLIENT.format(shelf=folder))
            client.chmod(client.stat().st_mode | stat.S_IEXEC)

    def add_npm(self, name: str, version: str, files: dict[str, str]) -> None:
        path = self.folder / f"{name}@{version}".replace("/", "-").replace("@", "-")
        with tarfile.open(path, "w:gz") as archive:
            for inside, text in files.items():
                content = text.encode()
                entry = tarfile.TarInfo(f"package/{inside}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))

    def add_pypi(self, name: str, version: str, files: dict[str, str]) -> None:
        about = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(self.folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
            for inside, text in files.items():
                archive.writestr(inside, text)
            facts = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            archive.writestr(f"{about}/METADATA", facts)
            archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr(f"{about}/RECORD", "")

    def add_debian(self, name: str, files: dict[str, bytes]) -> None:
        root = self.folder / "root"
        for inside, content in files.items():
            (root / inside).parent.mkdir(parents=True, exist_ok=True)
            (root / inside).write_bytes(content)
        (root / "DEBIAN").mkdir()
        facts = f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: a <a@a>\n"
        (root / "DEBIAN" / "control").write_text(f"{facts}Description: text\n")
        command = ["dpkg-deb", "--build", "--root-owner-group", str(root), str(self.folder / name)]
        subprocess.run(command, check=True, capture_output=True)
        shutil.rmtree(root)
        os.replace(f"{self.folder / name}.deb", self.folder / name) if (
            self.folder / f"{name}.deb"
        ).exists() else None

    @property
    def calls(self) -> list[str]:
        """The command lines of apt-get and npm so far."""
        log = self.folder / "log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """An empty shelf, whose clients come first on the path, and where pip looks for wheels."""
    shelf = Shelf(tmp_path / "shelf")
    monkeypatch.setenv("PATH", f"{shelf.bin}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf.folder))
    return shelf
