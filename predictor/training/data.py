"""Traces as training data: documents split by content, and loaders of their rows."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from predictor.networks.windows import PredictorShape, Windows
from predictor.training.resumption import place_in_data
from predictor.training.rows import Documents, Rows
from routing.shards import Document, TraceReader

Split = Literal["train", "val", "test"]
BUCKETS = 1000
"""Steps in which the shares of the splits are rounded."""


def split_of(document: Document, val_fraction: float, test_fraction: float) -> Split:
    """The split of a document by a hash of its tokens: equal texts are in the same split."""
    tokens = np.ascontiguousarray(document.token_ids_T, np.int32)
    digest = hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()
    share = (int.from_bytes(digest, "big") % BUCKETS) / BUCKETS
    if share < val_fraction:
        return "val"
    return "test" if share < val_fraction + test_fraction else "train"


class TraceData(L.LightningDataModule):
    """Traces of one model, split by document into training, validation and test rows.

    Args:
        trace: A trace directory, or several of the same model.
        stack: The stack of MoE layers to predict ("decoder" or "encoder").
        window: A prediction depends on this many newest tokens.
        horizon: Tokens that the horizon head looks ahead (H).
        row_tokens: Tokens in a training row.
        batch_size: Rows in a batch.
        val_fraction: Share of the documents for validation.
        test_fraction: Share of the documents for the final test.
        max_eval_tokens: Validate and test on about this many tokens each.
        seed: Seed of the order and the cuts of training rows.
        num_workers: Processes that prepare training rows.
    """

    def __init__(
        self,
        trace: list[str] | str,
        stack: str = "decoder",
        window: int = 256,
        horizon: int = 8,
        row_tokens: int = 512,
        batch_size: int = 32,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        max_eval_tokens: int = 100_000,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < val_fraction + test_fraction < 1:
            raise ValueError(
                f"val_fraction {val_fraction} and test_fraction {test_fraction} leave no training"
            )
        self.traces = [Path(each) for each in ([trace] if isinstance(trace, str) else trace)]
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
        self.num_workers = num_workers
        self.provenance = [reader.provenance for reader in self.readers]
        self.shape = PredictorShape.of(
            self.readers[0].topology, stack, window=window, horizon=horizon
        )
        self._indices = self._split()
        self._place = (0, 0)

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
        """The documents of a split; for `val` and `test` about `max_eval_tokens` tokens of them."""
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
            place=self._place if split == "train" else (0, 0),
        )
        workers = self.num_workers if split == "train" else 0
        return DataLoader(
            rows,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def state_dict(self) -> dict[str, list[int]]:
        """The place in the training data, for a checkpoint."""
        assert self.trainer is not None
        return {"place": list(place_in_data(self.trainer))}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        """Go on at the place of a checkpoint."""
        passes, batches = state["place"]
        self._place = (passes, batches)

    def train_dataloader(self) -> DataLoader[Windows]:
        """Batches of the training split, in a new order at every pass."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Windows]:
        """Batches of the validation split."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Windows]:
        """Batches of the test split."""
        return self._loader("test")


def open_traces(directories: Sequence[Path], stack: str) -> list[TraceReader]:
    """Open traces. Raises ValueError unless all are of one model and hold a document."""
    if not directories:
        raise ValueError("name at least one trace directory (--data.trace)")
    readers = [TraceReader(directory, stack) for directory in directories]
    for directory, reader in zip(directories, readers, strict=True):
        reader.require_token_ids("a predictor")
        readers[0].topology.require_match(
            reader.topology, ours=f"the trace {directories[0]}", theirs=f"the trace {directory}"
        )
    if not any(len(reader) for reader in readers):
        raise ValueError(f"the trace {', '.join(map(str, directories))} holds no documents")
    return readers
