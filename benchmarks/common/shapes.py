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
SHAPES = {shape.name: shape for shape in (OLMOE_7B, QWEN3_30B, MIXTRAL_8X7B, GPT_OSS_20B, TINY)}


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
    model, draw = empty_model(shape), _Draw(device, seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            filled = nn.Parameter(draw(parameter), requires_grad=False)
            module.register_parameter(name, filled)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config)  # its buffers are computed
    return model.eval()


class _Draw:
    """Fills host tensors through a staging buffer: normal values; ones for the norms."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        on_gpu = device.type == "cuda"
        self._values = torch.empty(CHUNK_ELEMENTS, dtype=torch.bfloat16, device=device)
        self._staging = torch.empty(CHUNK_ELEMENTS, dtype=torch.bfloat16, pin_memory=on_gpu)

    def __call__(self, like: Tensor) -> Tensor:
        if like.dim() == 1:
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
