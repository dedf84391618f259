"""Comparison of an arm's logits with a reference."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.replay.text_replay import CHOSEN_LOGIT


def compare_logits(logits: Tensor, reference: Tensor) -> str:
    """`identical`, or the largest difference over the largest logit, and the share of equal argmax.

    The logit of the text's next token, which the replay set, is left out.
    """
    if torch.equal(logits, reference):
        return "identical"
    own, other = (x.masked_fill(x == CHOSEN_LOGIT, 0.0) for x in (logits, reference))
    worst = float((own - other).abs().max() / other.abs().max())
    agreeing = float((own.argmax(-1) == other.argmax(-1)).float().mean())
    return f"{worst:.1e}, argmax {agreeing:.0%}"
