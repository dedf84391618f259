"""The trace format: a directory of safetensors shards and a manifest.json.

    manifest.json                 see routing.trace_format.manifest
    decoder-00000.safetensors     token_ids    int32   [T]
                                  experts      uint8   [T, L, K]   (uint16 above 256 experts)
                                  phase        uint8   [T]         PROMPT or GENERATED
                                  doc_offsets  int64   [D + 1]     document d is [d] : [d + 1]
                                  doc_labels   int32   [D]         index into the manifest's labels
                                  weights      float16 [T, L, K]   optional
                                  lookahead.NAME.experts, .scores  optional, see routing.lookahead
                                  router.*, hidden.*               optional, see trace_format.extras
    encoder-00000.safetensors     the same, for encoder-decoder models; document d is document d

A shard is written whole, synced and renamed. Only then does the manifest name it, which is replaced
in the same way. So the directory holds complete documents only, whatever happens. Shards of equal
runs are equal byte for byte; what may vary is in the manifest's provenance. The highest
value of the experts' dtype stands for "no expert". When E is 256, 255 is an ordinary id; models
that large drop no tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from routing.lookahead import LookAhead, from_tensors
from routing.topology import NO_EXPERT, Stack, Topology
from routing.trace_format.extras import Extras, RouterLogits
from routing.trace_format.extras import from_tensors as extras_from_tensors
from routing.trace_format.manifest import MANIFEST as MANIFEST
from routing.trace_format.manifest import read_manifest as read_manifest
from routing.trace_format.manifest import write_atomically as write_atomically
from routing.trace_format.shard_checks import check_file, check_tensors, check_values

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
    router: RouterLogits | None = None
    """The highest router logits, where the trace holds any."""
    hidden: Mapping[int, np.ndarray] = {}
    """MoE layer -> router inputs, float16 [T, H], where the trace holds any."""


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


class TraceReader:
    """Reads one stack of a trace; documents are slices of memory-mapped tensors.

    Raises ValueError, naming the file, when the manifest is damaged, or a shard is missing,
    truncated, of another model or not as the manifest describes it. With `verify`, the checksum and
    the values of each shard are checked too: every byte is read once.
    """

    def __init__(
        self, directory: str | Path, stack: str = "decoder", *, verify: bool = True
    ) -> None:
        self.directory = Path(directory)
        self._manifest = read_manifest(self.directory)
        self.topology = Topology.from_json(self._manifest["topology"])
        self.stack: Stack = self.topology.stack(stack)
        self.labels: list[str] = self._manifest["labels"]
        self.provenance: dict[str, Any] = self._manifest["provenance"]
        self.complete: bool = self._manifest["complete"]
        self.with_weights: bool = self._manifest["with_weights"]
        self.lookahead: dict[str, int] = self._manifest.get("lookahead", {})
        self.extras = Extras.from_json(self._manifest.get("extras", {}))
        self._shards = [
            self._open(entry, verify=verify) for entry in self._manifest["shards"][stack]
        ]
        self._first_doc = np.cumsum([0] + [len(shard) for shard in self._shards])
        self.doc_lengths = _concatenate([shard.lengths for shard in self._shards], np.int64)
        self.doc_labels = _concatenate([shard.labels for shard in self._shards], np.int32)

    def _open(self, entry: Mapping[str, Any], *, verify: bool) -> _Shard:
        path = self.directory / entry["file"]
        check_file(path, entry, verify=verify)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
            recorded = Topology.from_json(json.loads(metadata["topology"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); trace it again") from error
        self.topology.require_match(recorded, ours=f"the trace {self.directory}", theirs=str(path))
        try:
            self._check(tensors, metadata, entry, verify=verify)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}; trace it again") from error
        return _Shard(tensors, list(self.lookahead))

    def _check(
        self,
        tensors: Mapping[str, np.ndarray],
        metadata: Mapping[str, str],
        entry: Mapping[str, Any],
        *,
        verify: bool,
    ) -> None:
        if (recorded := metadata.get("stack", self.stack.name)) != self.stack.name:
            raise ValueError(f"it is of the {recorded} stack, not of the {self.stack.name} stack")
        check_tensors(
            tensors,
            entry,
            self.stack,
            num_labels=len(self.labels),
            with_weights=self.with_weights,
            lookahead=self.lookahead,
            extras=self.extras,
        )
        if verify:
            check_values(tensors, self.stack, self.topology.vocab_size)

    def require_token_ids(self, purpose: str) -> None:
        """Raise ValueError where the trace holds routes alone.

        purpose: what needs the ids, as the subject of the message.
        """
        if not self.extras.token_ids:
            raise ValueError(
                f"{purpose} needs token ids, and the trace {self.directory} has none: it was "
                "imported from a format without them; import it again with --token-ids, or "
                "compare rules that read routes alone"
            )

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
    """The tensors of one shard, checked."""

    def __init__(self, tensors: dict[str, np.ndarray], lookahead: list[str]) -> None:
        self._tensors = tensors
        self._lookahead = from_tensors(lookahead, tensors)
        self._router, self._hidden = extras_from_tensors(tensors)
        self._offsets = tensors["doc_offsets"]
        self.labels = tensors["doc_labels"]
        self.lengths = np.diff(self._offsets)

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int, label: str) -> Document:
        span = slice(int(self._offsets[index]), int(self._offsets[index + 1]))
        tensors = self._tensors
        return Document(
            tensors["token_ids"][span],
            tensors["experts"][span],
            tensors["phase"][span],
            label,
            tensors["weights"][span] if "weights" in tensors else None,
            {name: LookAhead(*(x[span] for x in ahead)) for name, ahead in self._lookahead.items()},
            None if self._router is None else RouterLogits(*(x[span] for x in self._router)),
            {layer: values[span] for layer, values in self._hidden.items()},
        )


def _concatenate(arrays: list[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)
