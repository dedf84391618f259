"""Models of published shapes with random weights: for time and bytes, not for text.

The weights are drawn on the accelerator and copied into host memory, so 57 GB take seconds.
A random router spreads tokens evenly; replay a trace (`benchmarks.replay`) where reuse matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from routing.layers import MoELayer, find_moe_layers

SCALE = 0.02
CHUNK_ELEMENTS = 1 << 26
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One architecture of transformers at one size."""

    name: str
    model_type: str
    options: dict[str, Any]
    """Fields of the model's configuration; the others keep the library's defaults."""


OLMOE_7B = Shape(
    name="olmoe-7b",
    model_type="olmoe",
    options={
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "vocab_size": 50304,
    },
)
QWEN3_30B = Shape(
    name="qwen3-30b-a3b",
    model_type="qwen3_moe",
    options={
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 151936,
    },
)
MIXTRAL_8X7B = Shape(
    name="mixtral-8x7b",
    model_type="mixtral",
    options={
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
    },
)
GPT_OSS_20B = Shape(
    name="gpt-oss-20b",
    model_type="gpt_oss",
    options={
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
    },
)
GPT_OSS_120B = Shape(
    name="gpt-oss-120b",
    model_type="gpt_oss",
    options=GPT_OSS_20B.options | {"num_hidden_layers": 36, "num_local_experts": 128},
)
QWEN3_NEXT_80B = Shape(
    name="qwen3-next-80b-a3b",
    model_type="qwen3_next",
    options={
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 12,
        "linear_num_value_heads": 32,
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "vocab_size": 151936,
    },
)
"""Three layers of four are recurrent (Gated DeltaNet)."""
DEEPSEEK_V2_LITE = Shape(
    name="deepseek-v2-lite",
    model_type="deepseek_v2",
    options={
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "vocab_size": 102400,
    },
)
GRANITE_4_H_TINY = Shape(
    name="granite-4-h-tiny",
    model_type="granitemoehybrid",
    options={
        "hidden_size": 1536,
        "intermediate_size": 512,
        "shared_intermediate_size": 1024,
        "num_hidden_layers": 40,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "layer_types": [
            "full_attention" if layer % 10 == 5 else "linear_attention" for layer in range(40)
        ],
        "mamba_n_heads": 48,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "num_local_experts": 64,
        "num_experts_per_tok": 6,
        "vocab_size": 100352,
    },
)
"""Nine layers of ten are recurrent (Mamba-2)."""
LLAMA_4_SCOUT = Shape(
    name="llama-4-scout",
    model_type="llama4_text",
    options={
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_chunk_size": 8192,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "vocab_size": 202048,
    },
)
"""Three layers of four attend in chunks."""
TINY = Shape(
    name="tiny",
    model_type="olmoe",
    options=OLMOE_7B.options
    | {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 12288,
    },
)
TINY_GPT_OSS = Shape(
    name="tiny-gpt-oss",
    model_type="gpt_oss",
    options=GPT_OSS_20B.options
    | {
        "hidden_size": 96,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 12288,
    },
)
ALL = (
    OLMOE_7B, QWEN3_30B, MIXTRAL_8X7B, GPT_OSS_20B, GPT_OSS_120B, QWEN3_NEXT_80B,
    DEEPSEEK_V2_LITE, GRANITE_4_H_TINY, LLAMA_4_SCOUT, TINY, TINY_GPT_OSS,
)  # fmt: skip
SHAPES = {shape.name: shape for shape in ALL}


def shape_named(name: str) -> Shape:
    """The shape of that name. Raises ValueError for a name that is not one of `SHAPES`."""
    if name not in SHAPES:
        raise ValueError(f"shape={name!r} is not one of {', '.join(SHAPES)}")
    return SHAPES[name]


def empty_model(shape: Shape) -> Any:
    """The bfloat16 model on the meta device, without memory for its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(shape.model_type, **(shape.options | NO_TOKENS))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def build_model(shape: Shape, device: torch.device, *, seed: int = 0) -> Any:
    """A bfloat16 model in host memory, its weights drawn on `device` and every page touched."""
    return fill_model(empty_model(shape), device, seed=seed)


def fill_model(model: Any, device: torch.device, *, seed: int = 0) -> Any:
    """The model of the meta device with the weights that it has, drawn as in `build_model`."""
    draw = _Draw(device, seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            filled = nn.Parameter(draw(name, parameter), requires_grad=False)
            module.register_parameter(name, filled)
    rotary = model.model.rotary_emb
    if rotary is not None:
        model.model.rotary_emb = type(rotary)(model.config)  # its buffers are computed
    return model.eval()


class _Draw:
    """Fills host tensors through a staging buffer: normal values, but ones for the norms."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        on_gpu = device.type == "cuda"
        self._values = torch.empty(CHUNK_ELEMENTS, dtype=torch.bfloat16, device=device)
        self._staging = torch.empty(CHUNK_ELEMENTS, dtype=torch.bfloat16, pin_memory=on_gpu)

    def __call__(self, name: str, like: Tensor) -> Tensor:
        if like.dim() == 1 and name == "weight":
            return torch.ones(like.shape, dtype=like.dtype)
        filled = torch.empty(like.shape, dtype=like.dtype, device="cpu")
        for chunk in filled.view(-1).split(CHUNK_ELEMENTS):
            values = self._values[: len(chunk)].normal_(0, SCALE, generator=self._generator)
            chunk.copy_(self._staging[: len(chunk)].copy_(values))
        return filled


def expert_bytes(model: nn.Module) -> int:
    """Bytes of one expert of the first MoE layer."""
    layer = find_moe_layers(model)[0]
    return layer_bytes(layer) // layer.num_experts


def layer_bytes(layer: MoELayer) -> int:
    """Bytes of all experts of a layer."""
    return sum(p.numel() * p.element_size() for p in layer.module.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights: the GPU memory of a fully resident model."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
