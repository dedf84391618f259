"""Traces as training rows: documents split by their content, packed end to end.

A row holds `row_tokens` tokens of one or several documents. Positions jump by more than the window
between documents, so that no token attends to another document. Each epoch cuts the documents at
other places.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from predictor.interface import PADDING, Shape, Windows
from routing.shards import PROMPT, Document, TraceReader, signed_experts
from routing.topology import NO_EXPERT

Split = Literal["train", "val", "test"]
BUCKETS = 1000


def split_of(document: Document, val_fraction: float, test_fraction: float) -> Split:
    """The split of a document, by a hash of its tokens: the same text is never in two splits."""
    tokens = np.ascontiguousarray(document.token_ids_T, np.int32)
    digest = hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()
    share = (int.from_bytes(digest, "big") % BUCKETS) / BUCKETS
    if share < val_fraction:
        return "val"
    return "test" if share < val_fraction + test_fraction else "train"


class Piece(NamedTuple):
    """Tokens [start, stop) of a document, and where they go in their row."""

    document: int
    start: int
    stop: int
    column: int
    position: int
    """Of the piece's first token."""


class Documents(Sequence[Document]):
    """The documents of one split over several traces."""

    def __init__(self, readers: Sequence[TraceReader], indices: Sequence[tuple[int, int]]) -> None:
        self._readers = readers
        self._indices = list(indices)
        self.lengths = np.array([len(self[i].token_ids_T) for i in range(len(self))], np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Document:  # type: ignore[override]
        reader, document = self._indices[index]
        return self._readers[reader].document(document)


class Rows(IterableDataset[Windows]):
    """Batches of packed rows; with `shuffle` in a new order, and cut elsewhere, at every pass."""

    def __init__(
        self,
        documents: Documents,
        shape: Shape,
        *,
        row_tokens: int,
        batch_size: int,
        shuffle: bool,
        seed: int,
    ) -> None:
        self.documents = documents
        self.shape = shape
        self.row_tokens = row_tokens
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self._passes = 0

    def __len__(self) -> int:
        """Batches in a pass. A shuffled one drops an incomplete batch unless it is the only one."""
        tokens = int(self.documents.lengths.sum())
        rows = -(-tokens // self.row_tokens)
        return max(rows // self.batch_size, 1) if self.shuffle else -(-rows // self.batch_size)

    def __iter__(self) -> Iterator[Windows]:
        generator = np.random.default_rng((self.seed, self._passes))
        self._passes += 1
        rows = self.pack(generator)
        order = generator.permutation(len(rows)) if self.shuffle else np.arange(len(rows))
        for batch in range(len(self)):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield self.stack([rows[row] for row in chosen])

    def pack(self, generator: np.random.Generator) -> list[list[Piece]]:
        """Lay the documents end to end and cut them into rows."""
        count = len(self.documents)
        order = generator.permutation(count) if self.shuffle else np.arange(count)
        rows: list[list[Piece]] = [[]]
        column = int(generator.integers(self.row_tokens)) if self.shuffle else 0
        position = 0
        for document in order.tolist():
            start, length = 0, int(self.documents.lengths[document])
            position += self.shape.window + 1
            while start < length:
                if column == self.row_tokens:
                    rows.append([])
                    column, position = 0, 0
                stop = min(length, start + self.row_tokens - column)
                rows[-1].append(Piece(document, start, stop, column, position))
                column, position, start = column + stop - start, position + stop - start, stop
        return rows

    def stack(self, rows: list[list[Piece]]) -> Windows:
        """Copy the tokens and routes of the rows out of the traces."""
        shape, batch, tokens = self.shape, len(rows), self.row_tokens
        token_ids = np.zeros((batch, tokens), np.int64)
        positions = np.full((batch, tokens), PADDING, np.int64)
        kind = np.int16 if shape.num_experts <= 256 else np.int32
        experts = np.full((batch, tokens, shape.num_layers, shape.top_k), NO_EXPERT, kind)
        routes = experts.copy()
        for row, pieces in enumerate(rows):
            for piece in pieces:
                document = self.documents[piece.document]
                span = slice(piece.column, piece.column + piece.stop - piece.start)
                first = max(piece.start - 1, 0)
                used = signed_experts(document.experts_TLK[first : piece.stop], shape.num_experts)
                token_ids[row, span] = document.token_ids_T[piece.start : piece.stop]
                positions[row, span] = piece.position + np.arange(piece.stop - piece.start)
                experts[row, span] = used[piece.start - first :]
                known = slice(span.start + (piece.start == 0), span.stop)
                routes[row, known] = used[: known.stop - known.start]
        return Windows(
            token_ids_BT=torch.from_numpy(token_ids),
            routes_BTLK=torch.from_numpy(routes),
            positions_BT=torch.from_numpy(positions),
            experts_BTLK=torch.from_numpy(experts),
            prompt_lengths_B=torch.tensor([self._prompt_length(pieces) for pieces in rows]),
        )

    def _prompt_length(self, pieces: list[Piece]) -> int:
        """Of a row's first document, its prompt; the first half of a row that is all prompt."""
        if not pieces:
            return 1
        first = pieces[0]
        phase_T = self.documents[first.document].phase_T[first.start : first.stop]
        num_prompt = int((phase_T == PROMPT).sum())
        total = sum(piece.stop - piece.start for piece in pieces)
        return num_prompt if 0 < num_prompt < len(phase_T) else max(total // 2, 1)


class TraceData(L.LightningDataModule):
    """Traces of one model, split by document into training, validation and test rows.

    Args:
        trace: Trace directories, all of the same model.
        stack: The stack of MoE layers to predict ("decoder" or "encoder").
        window: A prediction depends on this many of the newest tokens.
        horizon: Tokens that the horizon head looks ahead (H).
        row_tokens: Tokens of a training row.
        batch_size: Rows of a batch.
        val_fraction: Share of the documents that validates.
        test_fraction: Share of the documents that tests.
        max_eval_tokens: Validate and test on at most this many tokens each.
        seed: Order and cuts of the training rows.
    """

    def __init__(
        self,
        trace: list[str],
        stack: str = "decoder",
        window: int = 256,
        horizon: int = 8,
        row_tokens: int = 512,
        batch_size: int = 32,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        max_eval_tokens: int = 100_000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < val_fraction + test_fraction < 1:
            raise ValueError(
                f"val_fraction {val_fraction} and test_fraction {test_fraction} leave no training"
            )
        self.traces = [Path(directory) for directory in trace]
        self.readers = open_traces(self.traces, stack)
        self.topology = self.readers[0].topology.to_json()
        self.stack = stack
        self.window = window
        self.horizon = horizon
        self.row_tokens = row_tokens
        self.batch_size = batch_size
        self.fractions = (val_fraction, test_fraction)
        self.max_eval_tokens = max_eval_tokens
        self.seed = seed
        self.provenance = [reader.provenance for reader in self.readers]
        self.shape = Shape.of(self.readers[0].topology, stack, window=window, horizon=horizon)
        self._indices = self._split()

    def _split(self) -> dict[Split, list[tuple[int, int]]]:
        splits: dict[Split, list[tuple[int, int]]] = {"train": [], "val": [], "test": []}
        for number, reader in enumerate(self.readers):
            for index, document in enumerate(reader.documents()):
                splits[split_of(document, *self.fractions)].append((number, index))
        for split, documents in splits.items():
            if not documents and split != "test":
                raise ValueError(
                    f"{len(self.readers)} trace(s) with {sum(map(len, splits.values()))} documents "
                    f"leave none for the {split} split; trace more documents, or choose other "
                    "shares with data.val_fraction and data.test_fraction"
                )
        return splits

    def documents(self, split: Split) -> Documents:
        """The documents of a split; of `val` and `test` only the first `max_eval_tokens` tokens."""
        indices = self._indices[split]
        if split == "train":
            return Documents(self.readers, indices)
        order = np.random.default_rng(0).permutation(len(indices))
        lengths = [self.readers[r].doc_lengths[d] for r, d in (indices[i] for i in order)]
        keep = int(np.searchsorted(np.cumsum(lengths), self.max_eval_tokens)) + 1
        return Documents(self.readers, [indices[i] for i in sorted(order[:keep].tolist())])

    def _loader(self, split: Split) -> DataLoader[Windows]:
        rows = Rows(
            self.documents(split),
            self.shape,
            row_tokens=self.row_tokens,
            batch_size=self.batch_size,
            shuffle=split == "train",
            seed=self.seed,
        )
        return DataLoader(rows, batch_size=None)

    def train_dataloader(self) -> DataLoader[Windows]:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Windows]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Windows]:
        return self._loader("test")


def open_traces(directories: Sequence[Path], stack: str) -> list[TraceReader]:
    """Open traces that must all be of one model. Raises ValueError."""
    if not directories:
        raise ValueError("name at least one trace directory (--data.trace)")
    readers = [TraceReader(directory, stack) for directory in directories]
    for directory, reader in zip(directories, readers, strict=True):
        readers[0].topology.require_match(
            reader.topology, ours=f"the trace {directories[0]}", theirs=f"the trace {directory}"
        )
    if not any(len(reader) for reader in readers):
        raise ValueError(f"the trace {', '.join(map(str, directories))} holds no documents")
    return readers
