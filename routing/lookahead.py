"""Look-ahead: experts of the coming layers, predicted from one layer's router input.

T tokens, L MoE layers, D distances, M experts named. A trace may hold look-aheads of several
sources by name ("gate": the later layer's own gate applied early; "mlp" and "linear": the networks
of `predictor.layer_ahead`). In shards each is two tensors, `lookahead.NAME.experts` and `.scores`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import numpy as np

PREFIX = "lookahead"
GATE, MLP, LINEAR = "gate", "mlp", "linear"
"""The names of the sources."""


class LookAhead(NamedTuple):
    """The predictions of one source for one document.

    Entry [t, l, d - 1] names the experts of layer l + d that token t's router input at layer l
    predicts, the most likely first. Beyond the last layer there is no prediction.
    """

    experts_TLDM: np.ndarray
    """uint8 (uint16 above 256 experts), distinct within a prediction."""
    scores_TLDM: np.ndarray
    """float16, on the source's own logarithmic scale; -inf without a prediction."""

    def cut(self, length: int) -> LookAhead:
        """The look-ahead of the first `length` tokens."""
        return LookAhead(self.experts_TLDM[:length], self.scores_TLDM[:length])

    def within(self, depth: int) -> LookAhead:
        """The look-ahead over distances up to `depth`."""
        return LookAhead(self.experts_TLDM[:, :, :depth], self.scores_TLDM[:, :, :depth])

    @classmethod
    def joined(cls, documents: Sequence[LookAhead]) -> Self:
        """The look-aheads of documents, one after the other."""
        return cls(*map(np.concatenate, zip(*documents, strict=True)))


def num_named(top_k: int, num_experts: int) -> int:
    """M: twice as many experts as a token uses, so that near misses are recorded too."""
    return min(2 * top_k, num_experts)


def as_tensors(name: str, documents: Sequence[LookAhead]) -> dict[str, np.ndarray]:
    """The tensors of the source `name` in a shard."""
    return {
        f"{PREFIX}.{name}.{field.removesuffix('_TLDM')}": array
        for field, array in LookAhead.joined(documents)._asdict().items()
    }


def from_tensors(names: Sequence[str], tensors: Mapping[str, np.ndarray]) -> dict[str, LookAhead]:
    """Inverse of `as_tensors`, for every source."""
    return {
        name: LookAhead(tensors[f"{PREFIX}.{name}.experts"], tensors[f"{PREFIX}.{name}.scores"])
        for name in names
    }


def recall_ahead(ahead: LookAhead, experts_TLK: np.ndarray) -> list[float]:
    """recall@K at each distance, averaged over the layers.

    experts_TLK: the experts used, signed ids, NO_EXPERT for none.
    """
    recalls = []
    for distance in range(1, min(ahead.experts_TLDM.shape[2], experts_TLK.shape[1] - 1) + 1):
        named_TLM = ahead.experts_TLDM[:, :-distance, distance - 1].astype(np.int32)
        used_TLK = experts_TLK[:, distance:]
        first_TLK = named_TLM[:, :, : used_TLK.shape[-1]]
        found_TLK = (used_TLK[..., None] == first_TLK[..., None, :]).any(-1)
        recalls.append(float((found_TLK.sum((0, 2)) / (used_TLK >= 0).sum((0, 2)).clip(1)).mean()))
    return recalls
