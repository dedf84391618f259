"""The manifest of a trace: reading it with every check that it allows, and replacing it.

schema         1
topology       see `routing.topology`
provenance     everything that decided the content, and all that may vary between equal traces
with_weights   whether shards hold router weights
lookahead      source -> largest distance (older manifests lack it)
extras         see `routing.trace_format.extras`; missing where there are none
num_documents  durable documents
complete       whether the trace was closed
labels         names that `doc_labels` index
shards         stack -> [{file, bytes, sha256, documents, tokens}]
checksum       SHA-256 of all of the above as canonical JSON (older manifests lack it)
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

from routing.topology import Topology
from routing.trace_format.extras import is_extras

SCHEMA = 1
MANIFEST = "manifest.json"
CHECKSUM = "checksum"


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the content of `path` by `data`: entirely or, after a crash, not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Replace the manifest of a trace directory, with its checksum."""
    data = json.dumps({**manifest, CHECKSUM: checksum(manifest)}, indent=1).encode()
    write_atomically(directory / MANIFEST, data)


def checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's values, whatever their order and white space."""
    values = {key: value for key, value in manifest.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read and check the manifest of a trace directory.

    Raises ValueError where there is none, or where it is damaged or not that of a trace. One
    without a checksum, as older versions wrote it, is read with a warning.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"{directory} is not a trace: it has no {MANIFEST}")
    try:
        manifest = dict(json.loads(path.read_bytes()))
        schema = manifest["schema"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not the manifest of a trace: {error!r}") from error
    if schema != SCHEMA or isinstance(schema, bool):
        raise ValueError(f"{path} has schema {schema!r}; this version reads schema {SCHEMA}")
    if lacking := TYPES.keys() - manifest.keys() - OPTIONAL:
        raise ValueError(f"{path} is not the manifest of a trace: it lacks {sorted(lacking)}")
    if CHECKSUM in manifest and manifest[CHECKSUM] != checksum(manifest):
        raise ValueError(
            f"{path} does not match its own checksum: it was damaged or edited; restore it, or "
            "trace again"
        )
    if CHECKSUM not in manifest:
        warnings.warn(
            f"{path} has no checksum, as older versions wrote it: damage to it may go unseen",
            stacklevel=2,
        )
    try:
        _check(manifest)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return manifest


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _is_file_name(value: object) -> bool:
    """Whether it names a file in the trace's own directory, and none elsewhere."""
    if not isinstance(value, str) or {"/", "\\", "\0"} & set(value):
        return False
    return PurePath(value).name == value and not value.startswith(".")


def _is_lookahead(value: object) -> bool:
    return isinstance(value, dict) and all(_is_count(depth) and depth for depth in value.values())


Check = tuple[Callable[[Any], bool], str]
COUNT: Check = (_is_count, "a count")
FLAG: Check = (lambda value: isinstance(value, bool), "true or false")
OBJECT: Check = (lambda value: isinstance(value, dict), "an object")
TYPES: dict[str, Check] = {
    "topology": OBJECT,
    "provenance": OBJECT,
    "with_weights": FLAG,
    "num_documents": COUNT,
    "complete": FLAG,
    "labels": (
        lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value),
        "a list of names",
    ),
    "shards": OBJECT,
    "lookahead": (_is_lookahead, "distances by source"),
    "extras": (is_extras, "a description of optional contents"),
    "checksum": (_is_digest, "a SHA-256"),
}
OPTIONAL = {"lookahead", "extras", CHECKSUM}
SHARD_TYPES: dict[str, Check] = {
    "file": (_is_file_name, "the name of a file in the trace's directory"),
    "bytes": COUNT,
    "sha256": (_is_digest, "a SHA-256"),
    "documents": COUNT,
    "tokens": COUNT,
}


def _check(manifest: Mapping[str, Any]) -> None:
    """Raise ValueError for what is of another type or contradicts itself."""
    _check_types(manifest, {key: TYPES[key] for key in TYPES if key in manifest}, "")
    labels, shards = manifest["labels"], manifest["shards"]
    if len(set(labels)) != len(labels):
        raise ValueError("a label is listed twice")
    stacks = {stack.name for stack in Topology.from_json(manifest["topology"]).stacks}
    if shards.keys() != stacks:
        raise ValueError(f"its shards are of {sorted(shards)}, its topology of {sorted(stacks)}")
    seen: set[str] = set()
    for stack, entries in shards.items():
        _check_shards(stack, entries, seen)
        documents = sum(entry["documents"] for entry in entries)
        if documents != manifest["num_documents"]:
            raise ValueError(
                f"num_documents is {manifest['num_documents']}, but the {stack} shards list "
                f"{documents}"
            )


def _check_shards(stack: str, entries: Any, seen: set[str]) -> None:
    if not isinstance(entries, list):
        raise ValueError(f"the {stack} shards are no list")
    for index, entry in enumerate(entries):
        where = f"{stack} shard {index}"
        if not isinstance(entry, dict):
            raise ValueError(f"{where} is {entry!r:.80}")
        _check_types(entry, SHARD_TYPES, f"{where}: ")
        if entry["file"] in seen:
            raise ValueError(f"{where}: {entry['file']} is listed twice")
        seen.add(entry["file"])


def _check_types(values: Mapping[str, Any], types: Mapping[str, Check], where: str) -> None:
    for key, (is_right, kind) in types.items():
        if key == "sha256" and key not in values:  # a shard of a tool that keeps no checksums
            continue
        if key not in values:
            raise ValueError(f"{where}{key} is missing")
        if not is_right(values[key]):
            raise ValueError(f"{where}{key} is {values[key]!r:.80}, not {kind}")
