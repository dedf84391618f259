"""The writer of traces: whole documents, one durable shard at a time, resumable at any point."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors.numpy import save

from routing.lookahead import as_tensors
from routing.shards import Document
from routing.topology import Topology
from routing.trace_format.extras import Extras
from routing.trace_format.extras import as_tensors as extras_as_tensors
from routing.trace_format.lock import DirectoryLock
from routing.trace_format.manifest import (
    MANIFEST,
    SCHEMA,
    read_manifest,
    write_atomically,
    write_manifest,
)
from routing.trace_format.shard_checks import check_file, check_tensors, check_values

SHARD_TOKENS = 1 << 20
"""Tokens of a shard, about."""


class TraceWriter:
    """Appends documents to a trace directory; opening an existing one resumes it.

    lookahead: source -> number of layers, for the look-aheads that every document brings.
    extras: the optional contents that every document brings, and whether its token ids are known.
    Documents are durable once their shard is written; `num_documents` counts these. While the
    writer lives, no other one can open the directory. Raises ValueError when another one has, or
    when the directory holds a trace of another model or of other provenance, or a damaged one.
    """

    def __init__(
        self,
        directory: str | Path,
        topology: Topology,
        *,
        provenance: Mapping[str, Any],
        with_weights: bool = False,
        lookahead: Mapping[str, int] | None = None,
        extras: Extras | None = None,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self.directory = Path(directory)
        self.topology = topology
        self.shard_tokens = shard_tokens
        self._pending: list[Mapping[str, Document]] = []
        self._pending_tokens = 0
        self._lock: DirectoryLock | None = None
        self._is_new = False
        self._extras = extras or Extras()
        wanted = self._fresh(dict(provenance), with_weights, dict(lookahead or {}))
        self._manifest = self._open(wanted)  # refuses before it touches anything
        if not self.complete:
            self._is_new = not self.directory.exists()
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = DirectoryLock(self.directory)
            try:
                self._manifest = self._open(wanted)  # another writer may have ended in between
            except ValueError:
                self.release()
                raise

    def _fresh(
        self, provenance: dict[str, Any], with_weights: bool, lookahead: dict[str, int]
    ) -> dict[str, Any]:
        """The manifest of a trace without documents."""
        return {
            "schema": SCHEMA,
            "topology": self.topology.to_json(),
            "provenance": json.loads(json.dumps(provenance)),
            "with_weights": with_weights,
            "lookahead": lookahead,
            **({"extras": self._extras.to_json()} if self._extras != Extras() else {}),
            "num_documents": 0,
            "complete": False,
            "labels": [],
            "shards": {stack.name: [] for stack in self.topology.stacks},
        }

    def _open(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """The manifest in the directory, or a copy of `wanted` where there is none."""
        if not (self.directory / MANIFEST).exists():
            if self.directory.is_dir() and any(self.directory.glob("[!.]*")):
                raise ValueError(
                    f"{self.directory} is not empty and holds no trace; name a new one"
                )
            return copy.deepcopy(wanted)
        manifest = {"lookahead": {}} | read_manifest(self.directory)
        Topology.from_json(manifest["topology"]).require_match(
            self.topology, ours=f"the trace in {self.directory}", theirs="this model"
        )
        for key in ("provenance", "with_weights", "lookahead", "extras"):
            if manifest.get(key) != wanted.get(key):
                difference = _difference(manifest, wanted, key)
                raise ValueError(
                    f"{self.directory} was traced with other options ({difference}); "
                    "trace into another directory, or with the same options to resume"
                )
        for entry in (entry for entries in manifest["shards"].values() for entry in entries):
            check_file(self.directory / entry["file"], entry, verify=False)
        return manifest

    @property
    def num_documents(self) -> int:
        """Documents that are durable on disk: the place to resume."""
        return int(self._manifest["num_documents"])

    @property
    def complete(self) -> bool:
        """True when an earlier run has closed the trace: nothing is left to do."""
        return bool(self._manifest["complete"])

    def add(self, documents: Mapping[str, Document]) -> None:
        """Append one document, given once per stack. Raises ValueError for a complete trace."""
        if self.complete:
            raise ValueError(f"the trace in {self.directory} is complete: name another directory")
        assert set(documents) == set(self._manifest["shards"]), "one document per stack"
        self._pending.append(documents)
        self._pending_tokens += sum(len(d.token_ids_T) for d in documents.values())
        if self._pending_tokens >= self.shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Make everything added so far durable."""
        if not self._pending:
            return
        self._begin()
        for name, shards in self._manifest["shards"].items():
            shards.append(self._write_shard(name, len(shards)))
        self._manifest["num_documents"] += len(self._pending)
        self._pending, self._pending_tokens = [], 0
        self._save_manifest()

    def _begin(self) -> None:
        """Write the manifest before the first shard, so that an interrupted trace can resume."""
        if not (self.directory / MANIFEST).exists():
            self._save_manifest()

    def close(self) -> None:
        """Flush, mark the trace complete, and let others open it."""
        self.flush()
        self._begin()
        self._manifest["complete"] = True
        self._save_manifest()
        self.release()

    def release(self) -> None:
        """Let others open the directory; what was not flushed is dropped."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.release()
        if self._is_new and not (self.directory / MANIFEST).exists():
            with suppress(OSError):  # something else lies in it by now
                self.directory.rmdir()

    def _write_shard(self, name: str, index: int) -> dict[str, Any]:
        documents = [documents[name] for documents in self._pending]
        counts = {
            "documents": len(documents),
            "tokens": sum(len(d.token_ids_T) for d in documents),
        }
        tensors = self._tensors(documents)
        self._check(tensors, counts, name)
        data = serialize(
            tensors,
            {
                "format": "expertflow-trace",
                "schema": str(SCHEMA),
                "stack": name,
                "topology": json.dumps(self.topology.to_json()),
            },
        )
        file = f"{name}-{index:05d}.safetensors"
        write_atomically(self.directory / file, data)
        return {
            "file": file,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            **counts,
        }

    def _check(self, tensors: dict[str, np.ndarray], counts: dict[str, int], name: str) -> None:
        """Raise ValueError for documents that no reader would accept."""
        stack = self.topology.stack(name)
        try:
            check_tensors(
                tensors,
                counts,
                stack,
                num_labels=len(self._manifest["labels"]),
                with_weights=self._manifest["with_weights"],
                lookahead=self._manifest["lookahead"],
                extras=self._extras,
            )
            check_values(tensors, stack, self.topology.vocab_size)
        except ValueError as error:
            raise ValueError(f"not written into {self.directory}: {error}") from error

    def _tensors(self, documents: list[Document]) -> dict[str, np.ndarray]:
        lengths = [len(document.token_ids_T) for document in documents]
        tensors = {
            "token_ids": np.concatenate([d.token_ids_T for d in documents]).astype(np.int32),
            "experts": np.concatenate([d.experts_TLK for d in documents]),
            "phase": np.concatenate([d.phase_T for d in documents]).astype(np.uint8),
            "doc_offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            "doc_labels": np.array([self._label(d.label) for d in documents], np.int32),
        }
        if self._manifest["with_weights"]:
            tensors["weights"] = np.concatenate([_weights(d) for d in documents])
        for name in self._manifest["lookahead"]:
            tensors |= as_tensors(name, [document.lookahead[name] for document in documents])
        routers, hidden = [d.router for d in documents], [d.hidden for d in documents]
        return tensors | extras_as_tensors(self._extras, routers, hidden)

    def _label(self, label: str) -> int:
        labels: list[str] = self._manifest["labels"]
        if label not in labels:
            labels.append(label)
        return labels.index(label)

    def _save_manifest(self) -> None:
        write_manifest(self.directory, self._manifest)


def serialize(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file whose bytes follow from its content.

    The library writes the metadata in an order that varies from process to process.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    data = save(arrays, metadata=dict(metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(ordered) <= end - 8, "the same header in another order is no longer"
    return data[:8] + ordered.ljust(end - 8) + data[end:]


def _weights(document: Document) -> np.ndarray:
    assert document.weights_TLK is not None, "this trace keeps router weights"
    return document.weights_TLK.astype(np.float16)


def _difference(old: Mapping[str, Any], new: Mapping[str, Any], key: str) -> str:
    if key != "provenance":
        return f"{key}: {old.get(key)} there, {new.get(key)} here"
    keys = sorted(k for k in old[key] | new[key] if old[key].get(k) != new[key].get(k))
    return "; ".join(f"{k}: {old[key].get(k)} there, {new[key].get(k)} here" for k in keys)
