"""llama.cpp's `llama-moe-trace`: a CSV with a row for each routed expert, or for each token.

Read from ggml-org/llama.cpp #28544 (open in November 2026) and thecodacus/llama.cpp at 0bc799a,
tools/moe-trace/moe-trace.cpp:

    layer,expert              upstream: token by token within a layer, layer by layer in a pass
    pos,layer,id0,id1,...     the fork: a row for each token and layer; prompts have negative `pos`

Both tools copy the selected experts as one block. Where they are a view of the full ranking, as in
today's `build_moe_ffn`, that is right for passes over one token only: leave prompts out with
--generated-only unless your build makes the tensor contiguous.

A row whose layer comes before the last one begins another forward pass. The tool runs one prompt
and its continuation; files put one after the other are told apart by their prompts. llama.cpp runs
the last layer of a prompt for its last token only: the other tokens of the prompt have no expert
there. Upstream's rows do not say where the prompt ends: a pass over one token is taken as
generated. There are no token ids: predictors refuse the trace unless --token-ids gives them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from routing.topology import Stack
from trace.formats.document import ForeignDocument
from trace.formats.passes import Pass, sequences
from trace.formats.settings import ImportSettings

Run = tuple[int, bool | None, list[list[int]], int]
"""Consecutive rows of one layer: its number, whether of a prompt, their experts, the first line."""


def read(path: Path, stack: Stack, options: ImportSettings) -> Iterator[ForeignDocument]:
    """The documents of a file. Raises ValueError, naming the line."""
    yield from sequences(_passes(path, stack.top_k), stack)


def _passes(path: Path, top_k: int) -> Iterator[Pass]:
    layers: dict[int, np.ndarray] = {}
    first, prompt = "", None
    for layer, is_prompt, rows, line in _runs(path):
        where = f"{path}, line {line}"
        if layers and layer <= max(layers):
            yield Pass(layers, first, prompt)
            layers = {}
        if not layers:
            first, prompt = where, is_prompt
        layers[layer] = _experts(rows, top_k, where)
    if layers:
        yield Pass(layers, first, prompt)


def _experts(rows: list[list[int]], top_k: int, where: str) -> np.ndarray:
    """[T, K], from rows of one expert each or of all experts of a token."""
    if len(rows[0]) > 1:
        if len(rows[0]) != top_k:
            raise ValueError(f"{where}: {len(rows[0])} experts a token, but the model uses {top_k}")
        return np.array(rows, np.int64)
    if len(rows) % top_k:
        raise ValueError(
            f"{where}: {len(rows)} rows of this layer are no whole tokens of {top_k} experts: the "
            "file is cut, or of another model"
        )
    return np.array(rows, np.int64).reshape(-1, top_k)


def _runs(path: Path) -> Iterator[Run]:
    running: Run | None = None
    for number, cells in _rows(path):
        with_position = len(cells) > 2
        prompt = cells[0] < 0 if with_position else None
        layer, experts = (cells[1], cells[2:]) if with_position else (cells[0], cells[1:])
        if running is not None and (layer, prompt) != running[:2]:
            yield running
            running = None
        running = running or (layer, prompt, [], number)
        running[2].append(experts)
    if running is not None:
        yield running


def _rows(path: Path) -> Iterator[tuple[int, list[int]]]:
    """Line numbers and cells; a header may come first. All rows have as many cells."""
    width: int | None = None
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            text = line.strip()
            if not text or text.replace(" ", "") == "layer,expert":
                continue
            try:
                cells = [int(np.int64(cell)) for cell in text.split(",")]
            except (ValueError, OverflowError):
                raise ValueError(
                    f"{path}, line {number}: {text[:60]!r} is no row of llama-moe-trace, which "
                    "writes layer,expert or pos,layer,expert,expert ..."
                ) from None
            width = width or len(cells)
            if len(cells) != width or width < 2:
                raise ValueError(
                    f"{path}, line {number}: {len(cells)} cells, but {width} in the rows before"
                    if width > 1
                    else f"{path}, line {number}: one cell; layer,expert has two"
                )
            yield number, cells
