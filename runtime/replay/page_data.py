"""The data of a page: JSON in which long lists of numbers are base64 of little-endian integers.

    {"bits": 8 | 16 | 32, "data": "..."}                   numbers
    {"counts": numbers, "keys": numbers}                   a list of keys for each step

The page's `recording.js` reads it.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from routing.shards import TraceReader
from runtime.replay.model_files import ModelFiles, texts_of
from runtime.replay.recording import CacheRun, Recording


def page_data(
    reader: TraceReader, recording: Recording, files: ModelFiles, index: int
) -> dict[str, Any]:
    """All that the page shows. index: of the document in the trace."""
    stack, document = reader.stack, recording.document
    ids = document.token_ids_T if reader.extras.token_ids else np.arange(len(document.token_ids_T))
    texts = None if files.tokenizer is None else texts_of(files.tokenizer, ids.tolist())
    predicted = recording.predicted_SLK
    return {
        "model": reader.topology.model_type,
        "trace": reader.directory.resolve().name,
        "layers": stack.num_layers,
        "experts": stack.num_experts,
        "top_k": stack.top_k,
        "document": index,
        "documents": len(reader),
        "label": document.label,
        "of_tokens": int(reader.doc_lengths[index]),
        "token_ids": packed(ids),
        "texts": texts,
        "remark": files.remark,
        "lengths": packed([len(step.token_ids_T) for step in recording.steps]),
        "routes": packed(document.experts_TLK),
        "predicted": None if predicted is None else packed(predicted),
        "expert_bytes": files.expert_bytes,
        "caches": [_run(run) for run in recording.runs],
    }


def _run(run: CacheRun) -> dict[str, Any]:
    return {
        "policy": run.policy,
        "slots": run.num_slots,
        "missed": _ragged(run.missed),
        "left": _ragged(run.left),
    }


def _ragged(lists: Sequence[np.ndarray]) -> dict[str, Any]:
    return {"counts": packed([len(keys) for keys in lists]), "keys": packed(np.concatenate(lists))}


def packed(numbers: Sequence[int] | np.ndarray) -> dict[str, Any]:
    """Non-negative integers of any shape, flat, in as few bits each as the largest needs."""
    flat = np.asarray(numbers, np.int64).reshape(-1)
    largest = int(flat.max(initial=0))
    bits = next(bits for bits in (8, 16, 32) if largest < 1 << bits)
    data = flat.astype(f"<u{bits // 8}").tobytes()
    return {"bits": bits, "data": base64.b64encode(data).decode("ascii")}
