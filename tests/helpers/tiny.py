"""Tiny random MoE models and a byte-level tokenizer: no test needs weights or the network."""

from __future__ import annotations

from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

PAD, EOS = 0, 1
VOCAB_SIZE = 256

KINDS = ("olmoe", "mixtral", "qwen3_moe", "switch_transformers")
"""One architecture of every kind: no shared trait beyond the experts call."""

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
}
CAUSAL: dict[str, Any] = COMMON | {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "olmoe": CAUSAL | {"num_hidden_layers": 4, "intermediate_size": 24, "num_experts": 8},
    "mixtral": CAUSAL | {"num_hidden_layers": 3, "intermediate_size": 24, "num_local_experts": 8},
    "qwen3_moe": CAUSAL
    | {
        "num_hidden_layers": 4,
        "mlp_only_layers": [1],  # a dense layer between MoE layers
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "head_dim": 8,
    },
    "gpt_oss": CAUSAL
    | {
        "num_hidden_layers": 4,  # with a sliding window in every other one
        "intermediate_size": 24,
        "num_local_experts": 8,
        "head_dim": 8,
        "sliding_window": 8,
    },
    "switch_transformers": COMMON
    | {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 24,
        "num_heads": 4,
        "num_layers": 2,
        "num_sparse_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_decoder_layers": 2,
        "num_experts": 8,
        "expert_capacity": 4,  # small, so that tokens are dropped
        "decoder_start_token_id": PAD,
        "tie_word_embeddings": False,  # tied, a random decoder repeats its first token for ever
    },
}


def tiny_config(kind: str, **overrides: Any) -> PretrainedConfig:
    """The configuration of `tiny_model`: 2 to 4 layers of 8 experts, hidden size 32."""
    return AutoConfig.for_model(kind, **(CONFIGS[kind] | overrides))


def tiny_model(kind: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """A random float32 model of one of `CONFIGS`, in eval mode; `overrides` go to its config."""
    config = tiny_config(kind, **overrides)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_config(config).eval()


def tiny_tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of exactly `vocab_size` tokens with `<pad>` and `<eos>`.

    It covers every string: bytes that UTF-8 never uses are left out, pairs of letters fill it up.
    """
    unused = {0xC0, 0xC1, *range(0xF5, 0x100)}
    alphabet = set(pre_tokenizers.ByteLevel.alphabet()) - _bytes_to_characters(unused)
    tokens = ["<pad>", "<eos>", *sorted(alphabet)]
    pairs = list(islice(product(ascii_lowercase, ascii_lowercase), vocab_size - len(tokens)))
    vocab = {token: index for index, token in enumerate([*tokens, *(a + b for a, b in pairs)])}
    assert len(vocab) == vocab_size, f"a vocabulary of {len(tokens)} to {len(tokens) + 26 * 26}"
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def _bytes_to_characters(values: set[int]) -> set[str]:
    """GPT-2's byte-to-character map: printable Latin-1 as it is, the rest from U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    table = {value: chr(value) for value in printable}
    table |= {value: chr(0x100 + place) for place, value in enumerate(others)}
    return {table[value] for value in values}


def save_tiny(directory: str | Path, kind: str, seed: int = 0, **overrides: Any) -> Path:
    """Save `tiny_model` and `tiny_tokenizer` in Hub layout under `directory`; returns its path."""
    path = Path(directory)
    tiny_model(kind, seed, **overrides).save_pretrained(path)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(path)
    return path
