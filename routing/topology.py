"""The routing topology: which MoE layers a model has, and a fingerprint of the model behind them.

L MoE layers, E experts a layer, K experts a token. Traces and predictors carry a `Topology`; every
stage compares it with the model at hand and refuses a mismatch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

NO_EXPERT = -1
"""Marks "no expert" in signed integer arrays: dropped by capacity, or unknown history."""

FINGERPRINT_CHARS = 16


class Layer(NamedTuple):
    """One MoE layer: the module path of its experts, and its own E and K."""

    name: str
    num_experts: int
    top_k: int


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The MoE layers that one token passes, in execution order ("decoder" or "encoder")."""

    name: str
    layers: tuple[Layer, ...]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_experts(self) -> int:
        """E, the largest number of experts of any layer."""
        return max(layer.num_experts for layer in self.layers)

    @property
    def top_k(self) -> int:
        """K, the largest top-k of any layer."""
        return max(layer.top_k for layer in self.layers)

    def __str__(self) -> str:
        return f"{self.name} {self.num_layers} x {self.num_experts}, top-{self.top_k}"


@dataclass(frozen=True, kw_only=True)
class Topology:
    """A model's routing topology and fingerprints."""

    model_type: str
    vocab_size: int
    stacks: tuple[Stack, ...]
    model: str
    """Fingerprint of the model's shape (hex)."""
    tokenizer: str | None = None
    """Fingerprint of the tokenizer's vocabulary (hex), or None where it is not known."""

    def stack(self, name: str = "decoder") -> Stack:
        """The stack called `name`. Raises ValueError when there is none."""
        for stack in self.stacks:
            if stack.name == name:
                return stack
        have = ", ".join(stack.name for stack in self.stacks)
        raise ValueError(f"the {self.model_type} model has no {name!r} MoE stack; it has: {have}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "stacks": [
                {"name": stack.name, "layers": [list(layer) for layer in stack.layers]}
                for stack in self.stacks
            ]
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Topology:
        """Inverse of `to_json`. Raises ValueError when a field is missing or of another form."""
        try:
            stacks = tuple(
                Stack(
                    name=str(stack["name"]),
                    layers=tuple(Layer(str(n), int(e), int(k)) for n, e, k in stack["layers"]),
                )
                for stack in data["stacks"]
            )
            return cls(
                model_type=str(data["model_type"]),
                vocab_size=int(data["vocab_size"]),
                stacks=stacks,
                model=str(data["model"]),
                tokenizer=data["tokenizer"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a routing topology: {error!r} in {data!r:.200}") from error

    def require_match(self, other: Topology, *, ours: str, theirs: str) -> None:
        """Raise ValueError, naming both sides, unless both describe the same model.

        Tokenizers are compared only where both are known.
        """
        if self.model != other.model:
            raise ValueError(f"{ours} is for {self}, but {theirs} is for {other}")
        if self.tokenizer and other.tokenizer and self.tokenizer != other.tokenizer:
            raise ValueError(
                f"{ours} and {theirs} were made with different tokenizers "
                f"({self.tokenizer} and {other.tokenizer}) for the same {self.model_type} model"
            )

    def __str__(self) -> str:
        stacks = "; ".join(str(stack) for stack in self.stacks)
        return f"{self.model_type} ({stacks}; vocabulary {self.vocab_size}; {self.model})"


def topology_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> Topology:
    """Read the topology off a Hugging Face model (which may live on the meta device).

    Raises ValueError when the model has no MoE layers, or none that ExpertFlow can handle.
    """
    from routing.layers import find_moe_layers

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
    """Only what every transformers version reports alike: a whole config.to_dict() does not."""
    shape = {
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "stacks": [[s.name, [[x.num_experts, x.top_k] for x in s.layers]] for s in stacks],
    }
    return _digest(json.dumps(shape, sort_keys=True).encode())


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint of the vocabulary: the (token, id) pairs in order of id."""
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return _digest(json.dumps(vocab, ensure_ascii=False).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:FINGERPRINT_CHARS]
