"""The routing topology: a model's MoE layers, and a fingerprint of the model behind them.

L MoE layers, E experts a layer, K experts a token. Traces and predictors carry a `Topology`; every
stage compares it with the model at hand and refuses a mismatch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    pass

NO_EXPERT = -1
"""The id of no expert in signed integer arrays: dropped by capacity, or unknown history."""

FINGERPRINT_CHARS = 16


class Layer(NamedTuple):
    """One MoE layer: the module path of its experts, its E and its K."""

    name: str
    num_experts: int
    top_k: int


def _layer(name: object, num_experts: object, top_k: object) -> Layer:
    """A layer out of a file. Raises ValueError for what cannot be one."""
    counts = [num_experts, top_k]
    if not isinstance(name, str) or any(type(n) is not int or n < 1 for n in counts):
        raise ValueError(f"no MoE layer: {[name, num_experts, top_k]!r:.80}")
    return Layer(name, *counts)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The MoE layers that one token passes, in execution order ("decoder" or "encoder")."""

    name: str
    layers: tuple[Layer, ...]

    @property
    def num_layers(self) -> int:
        """L, the number of MoE layers."""
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
        """The topology in JSON types, as docs/formats.md describes it."""
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
                    layers=tuple(_layer(*layer) for layer in stack["layers"]),
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
