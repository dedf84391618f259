"""Megatron-LM's `--moe-routing-trace-path`: a JSON line for each pass and layer.

The files are `router_trace_rank*.jsonl`. Read from NVIDIA/Megatron-LM:
megatron/core/transformer/moe/router_trace.py as of #5220 (merged).

    {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": 3, "rank": 0,
     "num_tokens": 128, "topk": 8, "top_indices": [[12, 45, ...], ...]}

`path` is one such file, or the directory of a run: then each rank is read by itself, as it is under
data parallelism. Lines of multi-token prediction (block "mtp") are left out. Experts come in
ascending order, not the router's. A step with several tokens begins a document. In training a step
is a batch, whose sequences are not told apart; in inference trace one request at a time. There are
no token ids: predictors refuse the trace unless --token-ids gives them. The side files (hidden
states, logits, router weights) are not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from routing.topology import Stack
from trace.formats.arrays import count, records
from trace.formats.document import ForeignDocument
from trace.formats.passes import Pass, sequences
from trace.formats.settings import ImportSettings

PATTERN = "router_trace_rank*.jsonl"
FIELDS = ("step", "layer", "num_tokens", "topk", "top_indices")


def read(path: Path, stack: Stack, options: ImportSettings) -> Iterator[ForeignDocument]:
    """The documents of a rank's file, or of every rank of a run. Raises ValueError."""
    files = sorted(path.glob(PATTERN)) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no {PATTERN}")
    for file in files:
        yield from sequences(_passes(file), stack)


def _passes(path: Path) -> Iterator[Pass]:
    """The steps of one rank; a layer that is there twice begins another pass of the same step."""
    layers: dict[int, np.ndarray] = {}
    running: tuple[Any, str] | None = None
    for record, where in records(path):
        if record.get("block", "decoder") != "decoder":
            continue
        if lacking := [name for name in FIELDS if name not in record]:
            raise ValueError(f"{where}: it lacks {', '.join(lacking)}")
        step, layer = (count(record[name], name, where) for name in ("step", "layer"))
        if running is not None and (step != running[0] or layer in layers):
            yield Pass(layers, running[1])
            layers, running = {}, None
        running = running or (step, where)
        layers[layer] = _indices(record, where)
    if running is not None:
        yield Pass(layers, running[1])


def _indices(record: dict[str, Any], where: str) -> np.ndarray:
    shape = tuple(count(record[name], name, where) for name in ("num_tokens", "topk"))
    try:
        indices_TK = np.array(record["top_indices"], np.int64)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{where}: top_indices are no lists of {shape[1]} integers") from error
    if indices_TK.shape != shape:
        raise ValueError(
            f"{where}: top_indices are {list(indices_TK.shape)}, but num_tokens and topk say "
            f"{list(shape)}"
        )
    return indices_TK
