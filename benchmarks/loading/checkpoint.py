"""A random checkpoint of any size in hub layout, written by threads, a file a layer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

POOL = 1 << 25
"""Random numbers that are drawn; each tensor takes them from a place of its own on."""
STEP = 1_000_003
"""Numbers between the places of two tensors."""

Shapes = dict[str, tuple[int, ...]]


def write_olmoe(directory: Path, config: dict[str, Any]) -> int:
    """Write a random bfloat16 OLMoE as on the Hub: three tensors per expert.

    Returns the bytes of all tensors.
    """
    from transformers import AutoConfig

    settings = AutoConfig.for_model("olmoe", architectures=["OlmoeForCausalLM"], **config)
    settings.dtype = torch.bfloat16
    settings.save_pretrained(directory)
    pool = (torch.randn(POOL, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    files = list(_files(_shapes(config)))
    firsts = accumulate(map(len, files), initial=0)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        paths = [directory / _name(number) for number in range(len(files))]
        pools = [pool] * len(files)
        sizes = list(threads.map(_write_file, paths, files, pools, firsts))
    _write_index(directory, {key: _name(n) for n, shapes in enumerate(files) for key in shapes})
    return sum(sizes)


def _name(number: int) -> str:
    return f"model-{number + 1:05}.safetensors"


def _files(shapes: Iterator[tuple[str, tuple[int, ...]]]) -> Iterator[Shapes]:
    """The tensors of each layer, and all others."""
    of_layer: dict[str, Shapes] = {}
    for key, shape in shapes:
        words = key.split(".")
        layer = words[2] if words[1] == "layers" else "others"
        of_layer.setdefault(layer, {})[key] = shape
    yield from of_layer.values()


def _write_file(path: Path, shapes: Shapes, pool: Tensor, first: int) -> int:
    """Write a safetensors file out of the pool. first: number of its first tensor."""
    ends = list(accumulate((2 * prod(shape) for shape in shapes.values()), initial=0))
    header = {
        key: {"dtype": "BF16", "shape": shape, "data_offsets": (start, stop)}
        for (key, shape), start, stop in zip(shapes.items(), ends[:-1], ends[1:], strict=True)
    }
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    data = pool.view(torch.uint8).numpy().data
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, shape in enumerate(shapes.values(), first):
            at, missing = 2 * (number * STEP % POOL), 2 * prod(shape)
            while missing:
                missing -= file.write(data[at : at + missing])
                at = 0
    return ends[-1]


def _write_index(directory: Path, index: dict[str, str]) -> None:
    text = json.dumps({"metadata": {}, "weight_map": index})
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
