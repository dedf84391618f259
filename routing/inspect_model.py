"""Inspection of a Hugging Face model: its routing topology and fingerprints."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from routing.layers import find_moe_layers
from routing.topology import Layer, Stack, Topology

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

FINGERPRINT_CHARS = 16
"""Hexadecimal digits of a fingerprint."""


def topology_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> Topology:
    """The topology of a Hugging Face model, which may be on the meta device.

    Raises ValueError when the model has no MoE layers, or none that ExpertFlow can handle.
    """
    found = find_moe_layers(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no MoE layers: there are no experts to trace or to offload"
        )
    names = dict.fromkeys(layer.stack for layer in found)
    stacks = tuple(
        Stack(
            name=name,
            layers=tuple(
                Layer(layer.name, layer.num_experts, layer.top_k)
                for layer in found
                if layer.stack == name
            ),
        )
        for name in names
    )
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    return Topology(
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        stacks=stacks,
        model=_model_fingerprint(config, stacks),
        tokenizer=None if tokenizer is None else tokenizer_fingerprint(tokenizer),
    )


def _model_fingerprint(config: Any, stacks: tuple[Stack, ...]) -> str:
    """A hash of the fields that are the same in every version of transformers."""
    shape = {
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "stacks": [[s.name, [[x.num_experts, x.top_k] for x in s.layers]] for s in stacks],
    }
    return _digest(json.dumps(shape, sort_keys=True).encode())


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint of the vocabulary: the (token, id) pairs, by id."""
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return _digest(json.dumps(vocab, ensure_ascii=False).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:FINGERPRINT_CHARS]
