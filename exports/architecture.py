"""Architectures that `exports.train_moe` trains: classes of transformers, with sizes to choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Name = Literal["qwen3_moe", "qwen2_moe", "olmoe"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of a decoder-only model whose every layer is a mixture of experts."""

    architecture: Name = "qwen3_moe"
    """`qwen3_moe`: the K weights of a token sum to 1. `qwen2_moe`: the weights are plain softmax
    probabilities, and there is a shared expert. `olmoe`: plain probabilities, no shared expert;
    Switch-style if top_k is 1."""
    hidden_size: int = 128
    """Width of the residual stream."""
    num_layers: int = 8
    """Decoder layers, each with a mixture of experts."""
    num_heads: int = 4
    """Attention heads."""
    kv_heads: int | None = None
    """Key/value heads. Default: half as many as attention heads."""
    num_experts: int = 32
    """Experts a layer."""
    top_k: int = 4
    """Experts that a token uses in each layer, not counting a shared one."""
    expert_size: int = 32
    """Width of an expert."""
    shared_expert_size: int = 0
    """Width of the shared expert, which every token uses; only for qwen2_moe."""
    normalised: bool | None = None
    """Whether the K weights of a token sum to 1. Default: as the architecture does."""

    def __post_init__(self) -> None:
        """Refuse sizes that the architecture does not have, and routers that cannot learn."""
        if (self.architecture == "qwen2_moe") != (self.shared_expert_size > 0):
            raise ValueError(
                "qwen2_moe needs a --shared_expert_size, and no other architecture has one"
            )
        if self.top_k == 1 and self.is_normalised:
            raise ValueError(
                f"with --top_k 1 the normalised weight of {self.architecture} is always 1, and its "
                "routers learn nothing from the text: take --architecture olmoe, not normalised"
            )
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key/value "
                "heads evenly: give --kv_heads that divides --num_heads"
            )

    @property
    def is_normalised(self) -> bool:
        """Whether the K weights of a token sum to 1."""
        by_default = self.architecture == "qwen3_moe"
        return by_default if self.normalised is None else self.normalised

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads of each layer."""
        return self.num_heads // 2 if self.kv_heads is None else self.kv_heads


def new_model(shape: Architecture, **text: Any) -> Any:
    """A model of `shape` with random float32 weights.

    `text` has the fields of its configuration that depend on the text, such as the vocabulary.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "norm_topk_prob": shape.is_normalised,
        "tie_word_embeddings": True,
        "bos_token_id": None,
    }
    config = AutoConfig.for_model(shape.architecture, **sizes, **_widths(shape), **text)
    return AutoModelForCausalLM.from_config(config)


def _widths(shape: Architecture) -> dict[str, int]:
    """The widths of the experts, under the names of the architecture's configuration."""
    if shape.architecture == "olmoe":
        return {"intermediate_size": shape.expert_size}
    widths = {
        "moe_intermediate_size": shape.expert_size,
        "intermediate_size": shape.expert_size * shape.top_k,
    }
    if shape.architecture == "qwen2_moe":
        widths["shared_expert_intermediate_size"] = shape.shared_expert_size
    return widths
