"""Snapshots: a step as the JSON of an event, for whoever draws or records it."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from runtime.server.live.observation import Seen


def snapshot(seen: Seen, top_k: int) -> dict[str, Any]:
    """The data of an event `step`. Experts are bits: number layer * E + expert."""
    missing = seen.sighting.missing_LE.reshape(-1) != 0
    used = np.zeros_like(missing)
    used[seen.keys] = True
    predicted_LE = likeliest(seen.sighting.logits_NLE, top_k)
    return {
        "step": seen.number,
        "sequences": seen.sighting.num_sequences,
        "decoded": seen.sighting.num_decoded,
        "residents": bitmap(~missing),
        "hit": bitmap(used & ~missing),
        "missed": bitmap(used & missing),
        "predicted": None if predicted_LE is None else bitmap(predicted_LE),
        "counts": {name: round(count, 4) for name, count in seen.counts.items()},
    }


def likeliest(logits_NLE: list[np.ndarray], top_k: int) -> np.ndarray | None:
    """Bool [L, E]: the `top_k` likeliest experts of each layer for any of N tokens."""
    if not logits_NLE:
        return None
    stacked_NLE = np.stack(logits_NLE)
    best_NLK = np.argpartition(stacked_NLE, -top_k, axis=-1)[..., -top_k:]
    chosen = np.zeros(stacked_NLE.shape[1:], bool)
    for best_LK in best_NLK:
        np.put_along_axis(chosen, best_LK, True, axis=1)
    return chosen


def bitmap(flags: np.ndarray) -> str:
    """Flags of any shape as base64 of bytes whose lowest bit is the first flag."""
    return base64.b64encode(np.packbits(flags, bitorder="little").tobytes()).decode("ascii")
