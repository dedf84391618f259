"""A tiny random model of every mixture-of-experts architecture that transformers knows.

A configuration is the architecture's own defaults with the widths of `TINY` where it has such a
field, and the exceptions of `OVERRIDES`. Nothing is downloaded.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig

TINY: dict[str, Any] = {
    "vocab_size": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "initializer_range": 0.2,
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "n_layers": 3,
    "num_attention_heads": 4,
    "n_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "max_seq_len": 128,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "top_k_experts": 2,
    "moe_k": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

LINEAR_AND_FULL = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
DELTA_NET = LINEAR_AND_FULL | {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 24,
}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 8,
}
GEMMA = {
    "enable_moe_block": True,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 256,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
DENSE_THEN_SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_hidden_layers": 4, "layer_group_size": 2},
    "beam": DENSE_THEN_SPARSE,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 24,
            "moe_num_experts": 8,
            "moe_top_k": 2,
        },
    },
    "deepseek_ocr2": {"text_config": DENSE_THEN_SPARSE | {"n_shared_experts": 1}},
    "diffusion_gemma": {
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
        }
    },
    "dots1": {"n_shared_experts": 1},
    "ernie4_5_vl_moe": {
        "text_config": {"moe_intermediate_size": [24, 16], "rope_parameters": MROPE}
    },
    "gemma4": {"text_config": GEMMA},
    "gemma4_text": GEMMA,
    "glm4v_moe": {"text_config": {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}}},
    "glm5_next": {
        "text_config": LINEAR_AND_FULL
        | {
            "qk_rope_head_dim": 0,
            "head_dim": 0,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "index_head_dim": 8,
            "index_n_heads": 2,
        }
    },
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "mamba_n_heads": 8,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "kimi_linear": LINEAR_AND_FULL,
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"]},
    "llama4": {"text_config": {"num_experts_per_tok": 1}},
    "llama4_text": {"num_experts_per_tok": 1},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "mistral4": {"head_dim": 16},
    "muse_spark": {"audio_config": {"num_hidden_layers": 4, "out_hidden_size": 32}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "nllb-moe": {
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "init_std": 0.2,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": False,
    },
    "qwen2_moe": {"shared_expert_intermediate_size": 24},
    "qwen3_5_moe": {"text_config": DELTA_NET},
    "qwen3_5_moe_text": DELTA_NET,
    "qwen3_next": DELTA_NET,
    "qwen3_vl_moe": {
        "image_token_id": 250,
        "vision_start_token_id": 251,
        "vision_config": {"out_hidden_size": 32, "deepstack_visual_indexes": [0, 1, 2]},
    },
    "qwen4_exp": {"text_config": DELTA_NET | INDEXER},
    "qwen4_exp_text": DELTA_NET | INDEXER,
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 250, "vision_end_token_id": 251},
    "step3p7": {"text_config": DENSE_THEN_SPARSE | {"sliding_window": 64}},
    "switch_transformers": {
        "d_kv": 8,
        "d_ff": 24,
        "num_heads": 4,
        "num_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_decoder_layers": 2,
        "num_sparse_decoder_layers": 2,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": False,
    },
    "zaya": {"num_experts_per_tok": 1, "num_key_value_heads": 2},
}

ARCHITECTURES = """
afmoe aria aria_text axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_ocr2 deepseek_v2
deepseek_v3 deepseek_v32 deepseek_v4 diffusion_gemma dots1 dots3_note_text ernie4_5_moe
ernie4_5_vl_moe exaone_moe flex_olmo flint gemma4 gemma4_text glm4_moe glm4_moe_lite glm4v_moe
glm5_next glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared
hunyuan_v1_moe hy_v3 hy_v4 inkling2 inkling2_text inkling_text jamba jetmoe kimi_k25 kimi_linear
kolibri1 laguna lfm2_moe llama4 llama4_text longcat_flash mellum mimo_v2_flash minimax minimax_m2
minimax_m3_vl minimax_m3_vl_text mistral4 mistral_large4 mixtral muse_spark nemotron_h
nemotron_h_omni nllb-moe olmoe openai_privacy_filter phimoe qwen2_moe qwen3_5_moe qwen3_5_moe_text
qwen3_moe qwen3_next qwen3_omni_moe_thinker qwen3_vl_moe qwen4_exp qwen4_exp_text solar_open
step3p7 switch_transformers unlimited_ocr zaya
""".split()  # noqa: SIM905
"""Model types, wrappers of text models included."""


def is_known(kind: str) -> bool:
    """True where the installed transformers has the model type `kind`."""
    return kind in transformers.CONFIG_MAPPING


def architecture_config(kind: str, **widths: int) -> PretrainedConfig:
    """The tiny configuration of the model type `kind`, with some other `widths`."""
    config_class = type(AutoConfig.for_model(kind))
    return config_class(**_fields(config_class, OVERRIDES.get(kind, {}), TINY | widths))


def _fields(config_class: Any, overrides: dict[str, Any], tiny: dict[str, Any]) -> dict[str, Any]:
    """The fields of `tiny` that the class has, in it and in the configurations within it."""
    defaults = config_class()
    fields = {name: value for name, value in tiny.items() if _has(defaults, name)}
    for name in config_class.sub_configs:
        inner = getattr(defaults, name, None)
        if inner is not None:
            inner_fields = _fields(type(inner), overrides.get(name, {}), tiny)
            overrides = overrides | {name: inner_fields | {"model_type": inner.model_type}}
    return fields | overrides


def _has(config: PretrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # a field that differs between layers says so with an error of its own
        return True


def architecture_model(kind: str, seed: int = 0, **widths: int) -> nn.Module:
    """A random float32 model of the model type `kind`, in eval mode."""
    config = architecture_config(kind, **widths)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = _auto_class(config).from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2 and not parameter.any():  # a router that prefers nobody
                    parameter.normal_(std=0.2)
        return model


def _auto_class(config: PretrainedConfig) -> Any:
    names = ["ForSeq2SeqLM", "ForCausalLM", "ForImageTextToText", "ForMultimodalLM"]
    if "text_config" in config.sub_configs:  # a wrapper, rather than the text model in it
        names = names[2:]
    for name in (*names, "ForTokenClassification", ""):
        auto = getattr(transformers, f"AutoModel{name}")
        if type(config) in auto._model_mapping:
            return auto
    raise ValueError(f"transformers has no model for {type(config).__name__}")
