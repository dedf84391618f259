"""Expert usage of a trace: counts by label, layer and expert, and the statistics on them.

D labels (domains), L MoE layers, E experts a layer, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from routing.shards import PROMPT, Document, TraceReader
from routing.topology import Stack

CHUNK_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Expert usage of one stack of a trace."""

    stack: Stack
    labels: list[str]
    documents_D: np.ndarray
    """Documents of each label."""
    tokens_D: np.ndarray
    """Tokens of each label."""
    prompt_tokens: int
    counts_DLE: np.ndarray
    """Tokens of each label that used each expert (int64)."""
    overlap_L: np.ndarray
    """Share of a token's experts that the previous token of the document used too."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all labels."""
        return int(self.tokens_D.sum())

    @property
    def counts_LE(self) -> np.ndarray:
        """Tokens that used each expert (int64)."""
        counts: np.ndarray = self.counts_DLE.sum(0)
        return counts

    @property
    def entropy_L(self) -> np.ndarray:
        """Entropy of the expert usage in bits; at most `max_entropy_L`, when usage is even."""
        share_LE = shares(self.counts_LE)
        logs_LE = np.log2(share_LE, out=np.zeros_like(share_LE), where=share_LE > 0)
        entropy: np.ndarray = -(share_LE * logs_LE).sum(-1)
        return entropy

    @property
    def max_entropy_L(self) -> np.ndarray:
        """log2 of the number of experts of each layer."""
        return np.log2([layer.num_experts for layer in self.stack.layers])

    @property
    def top_share_L(self) -> np.ndarray:
        """Share of all uses that goes to the K most used experts of each layer."""
        return self._top_shares(self.counts_LE)

    @property
    def top_share_D(self) -> np.ndarray:
        """The same within each label, mean over the layers."""
        return np.array([self._top_shares(counts_LE).mean() for counts_LE in self.counts_DLE])

    def _top_shares(self, counts_LE: np.ndarray) -> np.ndarray:
        ranked_LE = np.sort(shares(counts_LE), axis=-1)[:, ::-1]
        top_k = [layer.top_k for layer in self.stack.layers]
        return np.array([row[:k].sum() for row, k in zip(ranked_LE, top_k, strict=True)])


def shares(counts: np.ndarray) -> np.ndarray:
    """Counts over their sum along the last axis; 0 where the sum is 0."""
    shares: np.ndarray = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    return shares


def measure_usage(trace: TraceReader) -> Usage:
    """The usage of a trace, read once, a few thousand tokens at a time."""
    stack = trace.stack
    num_labels = len(trace.labels)
    counts_DLE = np.zeros((num_labels, stack.num_layers, stack.num_experts), np.int64)
    same_L, compared_L = np.zeros(stack.num_layers, np.int64), np.zeros(stack.num_layers, np.int64)
    prompt_tokens = 0
    for label, document in zip(trace.doc_labels, trace.documents(), strict=True):
        prompt_tokens += int((document.phase_T == PROMPT).sum())
        for chunk_TLK, follows in _chunks(document):
            counts_DLE[label] += count_experts(chunk_TLK[follows:], stack.num_experts)
            same, compared = compare_with_previous(chunk_TLK, stack.num_experts)
            same_L += same
            compared_L += compared
    return Usage(
        stack=stack,
        labels=trace.labels,
        documents_D=np.bincount(trace.doc_labels, minlength=num_labels),
        tokens_D=np.bincount(trace.doc_labels, trace.doc_lengths, num_labels).astype(np.int64),
        prompt_tokens=prompt_tokens,
        counts_DLE=counts_DLE,
        overlap_L=same_L / np.maximum(compared_L, 1),
    )


def _chunks(document: Document) -> list[tuple[np.ndarray, int]]:
    """The experts of a document in pieces, and the leading tokens that a piece repeats (0 or 1)."""
    experts_TLK = document.experts_TLK
    starts = range(0, len(experts_TLK), CHUNK_TOKENS)
    return [
        (experts_TLK[max(0, start - 1) : start + CHUNK_TOKENS], int(start > 0)) for start in starts
    ]


def count_experts(experts_TLK: np.ndarray, num_experts: int) -> np.ndarray:
    """Uses of each expert, int64 [L, E]. A stored id of `num_experts` or more is no expert."""
    num_layers = experts_TLK.shape[1]
    base_L1 = np.arange(num_layers)[:, None] * num_experts
    used = experts_TLK < num_experts
    keys = (experts_TLK + base_L1)[used]
    return np.bincount(keys, minlength=num_layers * num_experts).reshape(num_layers, num_experts)


def compare_with_previous(
    experts_TLK: np.ndarray, num_experts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Experts that the previous token used too, and all experts compared, both int64 [L]."""
    now, before = experts_TLK[1:], experts_TLK[:-1]
    used = now < num_experts
    same = (now[..., :, None] == before[..., None, :]).any(-1) & used
    return same.sum((0, 2)), used.sum((0, 2))
