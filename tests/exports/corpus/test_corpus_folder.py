"""Text folders: the split by document, the manifest, resuming, packages that cannot be had."""

import hashlib
import json
from dataclasses import replace

import pytest

from exports.corpus.domains import Domain, Source, read_domains
from exports.corpus.folder import MANIFEST, SOURCES, build_folder
from exports.corpus.packages import Package, PackageCache
from exports.token_stream import read_documents

LONG = "This sentence is one of the many sentences that stand in the text of the test. "
POEMS = Package(registry="npm", name="poems", version="1.0.0")
SPEECHES = Package(registry="npm", name="speeches", version="0.1.0")
DOMAIN = Domain(
    name="prose",
    role="model",
    limit=1,
    sources=(
        Source(package=POEMS, files=("package/*.txt",), skip=("*/draft*",), licence="MIT"),
        Source(package=SPEECHES, files=("package/*.txt",), licence="CC0-1.0"),
    ),
)


def text_of(name):
    return f"{name}: {LONG * 3}"


@pytest.fixture
def packages(shelf, tmp_path):
    poems = {f"{i}.txt": text_of(f"poem {i}") for i in range(150)}
    shelf.add_npm(POEMS.name, POEMS.version, poems | {"draft.txt": text_of("draft")})
    speeches = {f"{i}.txt": text_of(f"speech {i}") for i in range(150)}
    shelf.add_npm(SPEECHES.name, SPEECHES.version, speeches)
    return PackageCache(tmp_path / "cache")


def build(folder, packages, domain=DOMAIN, **options):
    return build_folder(folder, [domain], packages, **options)[domain.name]


def test_a_document_is_either_trained_on_or_held_out(packages, tmp_path):
    entry = build(tmp_path / "text", packages)
    training = read_documents(tmp_path / "text/prose.txt")
    held_out = read_documents(tmp_path / "text/val/prose.txt")
    assert not set(training) & set(held_out)
    assert len(training) == entry["documents"] and len(held_out) == entry["held_out_documents"]
    assert len(training) + len(held_out) == 300
    assert not any("draft" in document for document in training + held_out)


def test_pieces_of_one_document_are_on_one_side_of_the_split(shelf, tmp_path):
    book = "\n\n".join(f"Chapter {i}. {LONG * 20}{i}" for i in range(40))
    shelf.add_npm(POEMS.name, POEMS.version, {"book.txt": book, "a.txt": text_of("a")})
    domain = replace(DOMAIN, sources=DOMAIN.sources[:1])
    build(tmp_path / "text", PackageCache(tmp_path / "cache"), domain)
    sides = [(tmp_path / "text" / name).read_text() for name in ("prose.txt", "val/prose.txt")]
    assert sum("Chapter" in side for side in sides) == 1


def test_the_same_packages_give_the_same_files(packages, tmp_path):
    first = build(tmp_path / "one", packages)
    assert build(tmp_path / "two", packages)["sha256"] == first["sha256"]


def test_the_manifest_names_archives_licences_and_checksums(packages, tmp_path):
    build(tmp_path / "text", packages)
    entry = json.loads((tmp_path / "text" / MANIFEST).read_text())["prose"]
    assert [source["licence"] for source in entry["sources"]] == ["MIT", "CC0-1.0"]
    assert [source["documents"] for source in entry["sources"]] == [150, 150]
    for name, digest in entry["sha256"].items():
        content = (tmp_path / "text" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
    assert "CC0-1.0" in (tmp_path / "text" / SOURCES).read_text()


def test_a_domain_that_is_there_is_not_made_again(packages, tmp_path, monkeypatch):
    first = build(tmp_path / "text", packages)
    monkeypatch.setattr(packages, "get", lambda package: pytest.fail("made again"))
    assert build(tmp_path / "text", packages) == first


def test_a_damaged_file_is_made_again(packages, tmp_path):
    first = build(tmp_path / "text", packages)
    (tmp_path / "text/prose.txt").write_text("half")
    assert build(tmp_path / "text", packages) == first
    assert (tmp_path / "text/prose.txt").read_text() != "half"


def test_the_scale_limits_the_text(packages, tmp_path):
    whole = build(tmp_path / "one", packages)
    part = build(tmp_path / "two", packages, scale=0.02)
    assert part["bytes"] <= 20_000 < whole["bytes"]


def test_a_source_that_cannot_be_had_fails_the_build_and_is_named(shelf, tmp_path):
    with pytest.raises(ValueError, match=r"npm poems 1\.0\.0 cannot be had"):
        build(tmp_path / "text", PackageCache(tmp_path / "cache"))


def test_a_build_that_skips_it_goes_on_and_the_manifest_says_so(shelf, tmp_path):
    shelf.add_npm(POEMS.name, POEMS.version, {"a.txt": text_of("a"), "b.txt": text_of("b")})
    entry = build(tmp_path / "text", PackageCache(tmp_path / "cache"), missing="skip")
    assert list(entry["missing"]) == ["npm speeches 0.1.0"]
    assert len(entry["sources"]) == 1


def test_a_domain_without_any_text_is_an_error(shelf, tmp_path):
    shelf.add_npm(POEMS.name, POEMS.version, {"other.md": "text"})
    domain = replace(DOMAIN, sources=DOMAIN.sources[:1])
    with pytest.raises(ValueError, match=r"prose has no text.*other files"):
        build(tmp_path / "text", PackageCache(tmp_path / "cache"), domain)


# ---------------------------------------------------------------------- the table of domains
def test_the_table_holds_out_ten_kinds_and_six_scripts_that_nothing_is_trained_on():
    domains = read_domains().values()
    held_out = [domain for domain in domains if domain.role == "held_out"]
    trained_scripts = {domain.script for domain in domains if domain.role != "held_out"}
    assert len(held_out) >= 10
    assert len({domain.script for domain in held_out} - trained_scripts) >= 6


def test_no_held_out_kind_shares_a_package_with_a_kind_that_is_trained_on():
    packages = {True: set(), False: set()}
    for domain in read_domains().values():
        packages[domain.role == "held_out"] |= {source.package for source in domain.sources}
    assert not packages[True] & packages[False]


def test_every_source_names_its_licence():
    assert all(source.licence for d in read_domains().values() for source in d.sources)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('role = "test"\nlimit = 1\nsources = []', "no role 'test'"),
        ('role = "model"\nlimit = 1\nscript = "Runic"\nsources = []', "no script 'Runic'"),
        (
            'role = "model"\nlimit = 1\nsources = [{package = "npm a", files = [], licence = ""}]',
            "version is given",
        ),
    ],
)
def test_a_mistake_in_the_table_is_named_with_its_domain(tmp_path, line, message):
    table = tmp_path / "domains.toml"
    table.write_text(f"[odd]\n{line}\n")
    with pytest.raises(ValueError, match=f"domain 'odd': .*{message}"):
        read_domains(table)
