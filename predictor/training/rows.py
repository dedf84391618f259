"""Rows of training tokens: documents packed end to end, and cut at other places in every pass.

Positions jump by more than the window between documents, so that no token attends to another
document.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from predictor.networks.windows import PredictorShape, Windows
from routing.predictor_file.format import PADDING
from routing.shards import PROMPT, Document, TraceReader, signed_experts
from routing.topology import NO_EXPERT


class Piece(NamedTuple):
    """Tokens [start, stop) of a document, and their place in a row."""

    document: int
    start: int
    stop: int
    column: int
    position: int
    """Position of the piece's first token."""


class Documents(Sequence[Document]):
    """The documents of one split over several traces."""

    def __init__(self, readers: Sequence[TraceReader], indices: Sequence[tuple[int, int]]) -> None:
        """indices: (trace, document in it) of each document."""
        self._readers = readers
        self._indices = list(indices)
        self.lengths = np.array([len(self[i].token_ids_T) for i in range(len(self))], np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Document:  # type: ignore[override]
        reader, document = self._indices[index]
        return self._readers[reader].document(document)


class Rows(IterableDataset[Windows]):
    """Batches of packed rows; with `shuffle` in a new order and with other cuts at every pass.

    The workers of a loader take turns at the batches of one pass, so that their number changes
    nothing. They must outlive a pass, or every pass would be the first.
    """

    def __init__(
        self,
        documents: Documents,
        shape: PredictorShape,
        *,
        row_tokens: int,
        batch_size: int,
        shuffle: bool,
        seed: int,
        place: tuple[int, int] = (0, 0),
    ) -> None:
        """place: passes that are over, and batches taken of the first to come."""
        self.documents = documents
        self.shape = shape
        self.row_tokens = row_tokens
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self._passes, self._taken = place

    def __len__(self) -> int:
        """Batches of a pass. A shuffled pass drops an incomplete batch that is not its only one."""
        tokens = int(self.documents.lengths.sum())
        rows = -(-tokens // self.row_tokens)
        return max(rows // self.batch_size, 1) if self.shuffle else -(-rows // self.batch_size)

    def __iter__(self) -> Iterator[Windows]:
        generator = np.random.default_rng((self.seed, self._passes))
        self._passes += 1
        rows = self.pack(generator)
        order = generator.permutation(len(rows)) if self.shuffle else np.arange(len(rows))
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        taken, self._taken = self._taken, 0
        for batch in range(taken + first, len(self), stride):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield self.stack([rows[row] for row in chosen])

    def pack(self, generator: np.random.Generator) -> list[list[Piece]]:
        """Lay the documents end to end, and cut them into rows."""
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
        """Copy the rows' tokens and routes out of the traces."""
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
        """Prompt tokens of a row's first document; half the row where it is all prompt or none."""
        if not pieces:
            return 1
        first = pieces[0]
        phase_T = self.documents[first.document].phase_T[first.start : first.stop]
        num_prompt = int((phase_T == PROMPT).sum())
        total = sum(piece.stop - piece.start for piece in pieces)
        return num_prompt if 0 < num_prompt < len(phase_T) else max(total // 2, 1)
