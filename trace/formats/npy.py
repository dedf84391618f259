"""Plain numpy arrays of expert ids, [L, N, K] or [N, L, K].

A .npy file is one document. An .npz file may hold, beside `experts`:

    token_ids    [N]      without them the trace has none, and predictors refuse it
    doc_offsets  [D + 1]  document d is tokens [d] : [d + 1]
    num_prompt   [D]      tokens of each prompt; by default all are of prompts

The axes are told apart by the number of layers, unless --layout names their order. Layers are the
model's MoE layers, or all of its layers. -1 is no expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from routing.topology import Stack
from trace.formats.arrays import load_numpy
from trace.formats.document import ForeignDocument, layer_columns
from trace.formats.settings import ImportSettings


def read(path: Path, stack: Stack, options: ImportSettings) -> Iterator[ForeignDocument]:
    """The documents of a file. Raises ValueError."""
    arrays = load_numpy(path, str(path))
    if "experts" not in arrays:
        raise ValueError(f"{path} has no array `experts`, but {', '.join(arrays) or 'none'}")
    experts = arrays["experts"]
    if experts.ndim != 3 or experts.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: experts is {experts.dtype} {list(experts.shape)}, not integers [L, N, K] or "
            "[N, L, K]"
        )
    experts_NFK = _tokens_first(experts, stack, options.layout, str(path))
    columns = layer_columns(range(experts_NFK.shape[1]), stack, str(path))
    experts_NLK = experts_NFK[:, columns].astype(np.int64)
    offsets = _offsets(arrays, len(experts_NLK), str(path))
    ids_N = arrays.get("token_ids")
    if ids_N is not None and (ids_N.shape, ids_N.dtype.kind in "iu") != ((len(experts_NLK),), True):
        raise ValueError(
            f"{path}: {ids_N.size} token ids ({ids_N.dtype}) for {len(experts_NLK)} tokens"
        )
    prompts = arrays.get("num_prompt", np.diff(offsets))
    if prompts.shape != (len(offsets) - 1,) or prompts.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: num_prompt is {prompts.dtype} {list(prompts.shape)}, not a count for each of "
            f"{len(offsets) - 1} documents"
        )
    for d, num_prompt in enumerate(prompts.tolist()):
        span = slice(offsets[d], offsets[d + 1])
        where = str(path) if len(prompts) == 1 else f"{path}, document {d}"
        ids = None if ids_N is None else ids_N[span]
        yield ForeignDocument(experts_NLK[span], ids, max(num_prompt, 0), where)


def _tokens_first(experts: np.ndarray, stack: Stack, layout: str, where: str) -> np.ndarray:
    if layout == "auto":
        fits = [name for name, axis in (("LNK", 0), ("NLK", 1)) if _is_layers(experts, axis, stack)]
        if len(fits) != 1:
            raise ValueError(
                f"{where}: {list(experts.shape)} does not show which axis is the model's "
                f"{stack.num_layers} layers: give --layout LNK or --layout NLK"
            )
        layout = fits[0]
    return experts.swapaxes(0, 1) if layout == "LNK" else experts


def _is_layers(experts: np.ndarray, axis: int, stack: Stack) -> bool:
    return experts.shape[axis] == stack.num_layers and experts.shape[2] == stack.top_k


def _offsets(arrays: dict[str, Any], num_tokens: int, where: str) -> np.ndarray:
    offsets = arrays.get("doc_offsets", np.array([0, num_tokens]))
    if (
        offsets.ndim != 1
        or offsets.dtype.kind not in "iu"
        or len(offsets) < 2
        or offsets[0] != 0
        or offsets[-1] != num_tokens
    ):
        raise ValueError(f"{where}: doc_offsets do not run from 0 to its {num_tokens} tokens")
    if (np.diff(offsets) < 0).any():
        raise ValueError(f"{where}: doc_offsets do not rise")
    return np.asarray(offsets, np.int64)
