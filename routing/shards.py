"""The trace format: a directory of safetensors shards and a manifest.json.

    manifest.json                 schema, topology, provenance, labels, and per stack its shards
    decoder-00000.safetensors     token_ids    int32   [T]
                                  experts      uint8   [T, L, K]   (uint16 above 256 experts)
                                  phase        uint8   [T]         PROMPT or GENERATED
                                  doc_offsets  int64   [D + 1]     document d is [d] : [d + 1]
                                  doc_labels   int32   [D]         index into the manifest's labels
                                  weights      float16 [T, L, K]   optional
                                  lookahead.NAME.experts, .scores  optional, see routing.lookahead
    encoder-00000.safetensors     the same, for encoder-decoder models; document d is document d

A shard is written whole, synced and renamed. Only then does the manifest name it, which is replaced
in the same way. So the directory holds complete documents only, whatever happens. The highest
value of the experts' dtype stands for "no expert". When E is 256, 255 is an ordinary id; models
that large drop no tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from routing.lookahead import LookAhead, from_tensors
from routing.topology import NO_EXPERT, Stack, Topology

SCHEMA = 1
MANIFEST = "manifest.json"
MANIFEST_KEYS = {
    "topology", "provenance", "with_weights", "num_documents", "complete", "labels", "shards"
}  # fmt: skip
PROMPT, GENERATED = 0, 1


class Document(NamedTuple):
    """One traced document of one stack."""

    token_ids_T: np.ndarray
    """int32"""
    experts_TLK: np.ndarray
    """uint8 or uint16 as stored, see `signed_experts`."""
    phase_T: np.ndarray
    """uint8, PROMPT or GENERATED."""
    label: str
    """The domain or data set of the document."""
    weights_TLK: np.ndarray | None = None
    """float16"""
    lookahead: Mapping[str, LookAhead] = {}
    """Source -> look-ahead, where the trace holds any."""


def experts_dtype(num_experts: int) -> type[np.uint8 | np.uint16]:
    """The dtype that stores ids of `num_experts` experts."""
    return np.uint8 if num_experts <= 256 else np.uint16


def signed_experts(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """Stored ids as int16 (int32 above 256 experts), with NO_EXPERT for none."""
    wide: np.ndarray = experts.astype(np.int16 if num_experts <= 256 else np.int32)
    wide[wide >= num_experts] = NO_EXPERT
    return wide


def stored_experts(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """Inverse of `signed_experts`. Raises ValueError for an id that cannot be stored."""
    dtype = experts_dtype(num_experts)
    nothing = np.iinfo(dtype).max
    missing = experts == NO_EXPERT
    if np.any(missing) and nothing < num_experts:
        raise ValueError(f"a token without an expert cannot be stored for {num_experts} experts")
    if np.any((experts < NO_EXPERT) | (experts >= num_experts)):
        raise ValueError(f"expert ids outside 0 .. {num_experts - 1}: {np.unique(experts)[:8]}")
    return np.where(missing, nothing, experts).astype(dtype)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the content of `path` by `data`: entirely or, after a crash, not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read the manifest of a trace directory. Raises ValueError where there is none."""
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"{directory} is not a trace: it has no {MANIFEST}")
    try:
        manifest = dict(json.loads(path.read_text()))
        schema = manifest["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the manifest of a trace: {error!r}") from error
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema}; this version reads schema {SCHEMA}")
    if lacking := MANIFEST_KEYS - manifest.keys():
        raise ValueError(f"{path} is not the manifest of a trace: it lacks {sorted(lacking)}")
    return manifest


class TraceReader:
    """Reads one stack of a trace; documents are slices of memory-mapped tensors.

    Raises ValueError, naming the file, when a shard is missing, truncated or of another model, or
    (with `verify`) does not match its checksum.
    """

    def __init__(
        self, directory: str | Path, stack: str = "decoder", *, verify: bool = False
    ) -> None:
        self.directory = Path(directory)
        manifest = read_manifest(self.directory)
        self.topology = Topology.from_json(manifest["topology"])
        self.stack: Stack = self.topology.stack(stack)
        self.labels: list[str] = manifest["labels"]
        self.provenance: dict[str, Any] = manifest["provenance"]
        self.complete: bool = manifest["complete"]
        self.with_weights: bool = manifest["with_weights"]
        self.lookahead: dict[str, int] = manifest.get("lookahead", {})
        self._shards = [
            _Shard(self.directory, entry, self.topology, list(self.lookahead), verify=verify)
            for entry in manifest["shards"][stack]
        ]
        self._first_doc = np.cumsum([0] + [len(shard) for shard in self._shards])
        self.doc_lengths = _concatenate([shard.lengths for shard in self._shards], np.int64)
        self.doc_labels = _concatenate([shard["doc_labels"] for shard in self._shards], np.int32)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.doc_lengths.sum())

    def __len__(self) -> int:
        return int(self._first_doc[-1])

    def document(self, index: int) -> Document:
        """Document `index`; its arrays are views of the mapped file. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        shard = int(np.searchsorted(self._first_doc, index, side="right")) - 1
        label = self.labels[self.doc_labels[index]]
        return self._shards[shard].document(index - int(self._first_doc[shard]), label)

    def documents(self) -> Iterator[Document]:
        """All documents, in order."""
        return (self.document(index) for index in range(len(self)))


class _Shard:
    def __init__(
        self,
        directory: Path,
        entry: Mapping[str, Any],
        topology: Topology,
        lookahead: list[str],
        *,
        verify: bool,
    ) -> None:
        self.path = directory / entry["file"]
        self._check(entry, verify)
        try:
            with safe_open(self.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
                self._lookahead = from_tensors(lookahead, tensors)
                recorded = Topology.from_json(json.loads(file.metadata()["topology"]))
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is damaged ({error}); trace it again") from error
        topology.require_match(recorded, ours=f"the trace {directory}", theirs=str(self.path))
        self._tensors: dict[str, np.ndarray] = tensors
        self.offsets = self["doc_offsets"]
        self.lengths = np.diff(self.offsets)

    def _check(self, entry: Mapping[str, Any], verify: bool) -> None:
        if not self.path.is_file():
            raise ValueError(
                f"{self.path} is missing, though the manifest names it; trace it again"
            )
        size = self.path.stat().st_size
        if size != entry["bytes"]:
            raise ValueError(
                f"{self.path} is truncated or changed: {size} bytes, but the manifest says "
                f"{entry['bytes']}; trace it again"
            )
        if verify and _sha256(self.path) != entry["sha256"]:
            raise ValueError(f"{self.path} does not match its checksum; trace it again")

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int, label: str) -> Document:
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return Document(
            self["token_ids"][span],
            self["experts"][span],
            self["phase"][span],
            label,
            self["weights"][span] if "weights" in self._tensors else None,
            {name: LookAhead(*(x[span] for x in ahead)) for name, ahead in self._lookahead.items()},
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _concatenate(arrays: list[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)
