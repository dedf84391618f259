"""A random checkpoint of any size in hub layout, written shard by shard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHARD = 1 << 30


def write_olmoe(directory: Path, config: dict[str, Any]) -> int:
    """Write a random bfloat16 OLMoE as on the Hub: shards of 1 GiB, three tensors per expert.

    Returns the bytes of all tensors.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    settings = AutoConfig.for_model("olmoe", architectures=["OlmoeForCausalLM"], **config)
    settings.dtype = torch.bfloat16
    settings.save_pretrained(directory)
    shards: list[dict[str, Any]] = [{}]
    sizes = [0]
    index: dict[str, str] = {}
    for name, shape in _shapes(config):
        tensor = (torch.randn(shape) * 0.02).bfloat16()
        if sizes[-1] + tensor.nbytes > SHARD:
            save_file(shards[-1], directory / _file(len(sizes)), {"format": "pt"})
            shards[-1].clear()
            sizes.append(0)
        shards[-1][name] = tensor
        sizes[-1] += tensor.nbytes
        index[name] = _file(len(sizes))
    save_file(shards[-1], directory / _file(len(sizes)), {"format": "pt"})
    _write_index(directory, index, sum(sizes))
    return sum(sizes)


def _file(number: int) -> str:
    return f"model-{number:05}.safetensors"


def _write_index(directory: Path, index: dict[str, str], total: int) -> None:
    import json

    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(text)


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, vocab = (config[n] for n in ("hidden_size", "intermediate_size", "vocab_size"))
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{prefix}.self_attn.{name}.weight", (hidden, hidden)
        for name in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm"):
            yield f"{prefix}.{name}.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.gate.weight", (config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            for name in ("gate_proj", "up_proj"):
                yield f"{prefix}.mlp.experts.{expert}.{name}.weight", (inner, hidden)
            yield f"{prefix}.mlp.experts.{expert}.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)
