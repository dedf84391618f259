"""Packages: downloaded once with their clients, unpacked whole, and what is said of failures."""

import shutil

import pytest

from exports.corpus.packages import Package, PackageCache

NPM = Package(registry="npm", name="@scope/poems", version="1.0.0")
PYPI = Package(registry="pypi", name="speeches", version="0.1")
DEBIAN = Package(registry="debian", name="pages")


def fill(shelf, registry="npm"):
    if registry == "npm":
        shelf.add_npm(NPM.name, NPM.version, {"a.txt": "a poem"})
        return NPM
    shelf.add_pypi(PYPI.name, PYPI.version, {"speeches/a.txt": "a speech"})
    return PYPI


@pytest.mark.parametrize(
    ("registry", "file", "text"),
    [("npm", "package/a.txt", "a poem"), ("pypi", "speeches/a.txt", "a speech")],
)
def test_a_package_is_unpacked_with_its_checksum(shelf, tmp_path, registry, file, text):
    unpacked = PackageCache(tmp_path / "cache").get(fill(shelf, registry))
    assert (unpacked.folder / file).read_text() == text
    assert len(unpacked.sha256) == 64


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_a_debian_package_is_unpacked_without_being_installed(shelf, tmp_path):
    shelf.add_debian(DEBIAN.name, {"usr/share/man/man1/a.1": b".SH NAME\na\n"})
    unpacked = PackageCache(tmp_path / "cache").get(DEBIAN)
    assert (unpacked.folder / "usr/share/man/man1/a.1").read_text() == ".SH NAME\na\n"


def test_a_package_is_downloaded_once(shelf, tmp_path):
    package = fill(shelf)
    first = PackageCache(tmp_path / "cache").get(package)
    assert PackageCache(tmp_path / "cache").get(package) == first
    assert len(shelf.calls) == 1


def test_what_an_interrupted_download_left_is_replaced(shelf, tmp_path):
    package = fill(shelf)
    cache = tmp_path / "cache"
    (cache / package.slug / "files").mkdir(parents=True)  # without the note: not whole
    (cache / f"{package.slug}.partial" / "download" / "half").mkdir(parents=True)
    assert (PackageCache(cache).get(package).folder / "package/a.txt").is_file()
    assert not (cache / f"{package.slug}.partial").exists()


def test_a_package_that_the_registry_lacks_is_named_with_the_clients_own_words(shelf, tmp_path):
    with pytest.raises(
        ValueError, match=r"debian pages cannot be had: E: Unable to locate.*update"
    ):
        PackageCache(tmp_path / "cache").get(DEBIAN)


@pytest.mark.parametrize(
    ("package", "client"),
    [(NPM, "npm is missing.*Node"), (DEBIAN, "apt-get is missing.*Debian 12")],
)
def test_a_missing_client_is_named_with_the_remedy(monkeypatch, tmp_path, package, client):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=client):
        PackageCache(tmp_path / "cache").get(package)


def test_an_interpreter_without_pip_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setattr("exports.corpus.packages.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip is missing.*ensurepip"):
        PackageCache(tmp_path / "cache").get(PYPI)
