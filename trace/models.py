"""Loading of the model to trace, whole or without weights, and its runner."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trace.runner import Runner
    from trace.settings import CollectSettings


DECODED = ("mxfp4", "fp8", "mxfp8", "compressed-tensors")
"""Quantisation methods whose weights transformers decodes as it loads them."""
FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files in which quantisers describe weights that transformers takes for plain ones."""
SCALE = re.compile(r"(?P<codes>.*(weight|_proj))_scale(_inv)?$")


def load_model_and_tokenizer(
    settings: CollectSettings,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer; with workers, which load the weights, a model without any.

    Raises ValueError or OSError.
    """
    from routing.pretrained import read_tokenizer

    if settings.model.startswith((".", "/", "~")) and not Path(settings.model).is_dir():
        raise ValueError(f"--model {settings.model}: there is no such directory")
    model = load_skeleton(settings) if settings.workers else load_model(settings)
    return model, read_tokenizer(settings.model)


def load_skeleton(settings: CollectSettings) -> PreTrainedModel:
    """The model without weights, on the meta device."""
    import torch

    from routing.pretrained import model_class, read_config

    config = read_config(settings.model)
    require_decoding(settings.model, config)
    with torch.device("meta"):
        skeleton: PreTrainedModel = model_class(config)(config)
    return skeleton


def load_model(settings: CollectSettings) -> PreTrainedModel:
    """The model, in eval mode on its device. Raises ValueError or OSError."""
    import torch

    from routing.pretrained import model_class, read_config

    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {settings.device}: torch sees no CUDA device here")
    config = read_config(settings.model)
    require_decoding(settings.model, config)
    model = _load_decoded(settings, config, model_class(config))
    return model.eval().to(settings.device)


def require_decoding(model: str, config: Any) -> None:
    """Have transformers decode the weights of a quantised model, to the number format it runs in.

    Raises ValueError for a quantisation that it does not decode, or of which it loses a part.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        _require_plain(model, config)
        return
    fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = fields.get("quant_method")
    if method not in DECODED:
        raise ValueError(_not_decoded(model, f" ({method}), which transformers cannot decode"))
    groups = (fields.get("config_groups") or {}).values()
    formats = {str(group.get("format")) for group in groups} | {str(fields.get("format"))}
    if any("nvfp4" in name for name in formats):
        raise ValueError(
            _not_decoded(model, " (nvfp4), whose global scales transformers leaves out")
        )
    config.quantization_config = fields | {"dequantize": True}


def _require_plain(model: str, config: Any) -> None:
    for name in FILES:
        if (Path(model) / name).is_file():
            raise ValueError(_not_decoded(model, f" ({name}), which transformers does not read"))
    if getattr(config.get_text_config(), "quantization_config", None) is not None:
        raise ValueError(_not_decoded(model, " in a part, which transformers does not decode"))


def _load_decoded(settings: CollectSettings, config: Any, kind: Any) -> PreTrainedModel:
    """The model of class `kind`. Raises ValueError for one that transformers cannot decode."""
    is_coded = hasattr(config, "quantization_config")
    try:
        model, report = kind.from_pretrained(
            settings.model,
            config=config,
            dtype=settings.dtype,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (RuntimeError, ImportError) as error:
        if not is_coded:
            raise
        reason = " ".join(str(error).split())
        raise ValueError(
            _not_decoded(settings.model, f", and transformers cannot decode it ({reason:.200})")
        ) from error
    unexpected = set(report["unexpected_keys"])
    for key in sorted(unexpected):
        found = SCALE.match(key)
        if found is not None and found["codes"] not in unexpected:
            raise ValueError(_not_decoded(settings.model, f"; transformers leaves out {key}"))
    loaded: PreTrainedModel = model
    return loaded


def _not_decoded(model: str, reason: str) -> str:
    return (
        f"{model} is quantised{reason}; record a trace of it with runtime.load({model!r}, "
        "record=DIR), which runs it in its own codes"
    )


def build_runner(model: Any, settings: CollectSettings) -> Runner:
    """The runner of `model`. Raises ValueError if the model needs other settings."""
    from trace.runner import Runner

    return Runner(
        model,
        generate=settings.generate,
        sample=settings.sample,
        weights=settings.weights,
        lookahead=settings.lookahead,
    )


def context(model: Any, settings: CollectSettings) -> int:
    """The most tokens of a document: --max_tokens, or what --generate leaves of the context.

    Raises ValueError if it leaves nothing.
    """
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or model.config.is_encoder_decoder:
        return settings.max_tokens
    if settings.generate >= positions:
        raise ValueError(
            f"--generate {settings.generate} leaves no room for a prompt in the model's context of "
            f"{positions} tokens"
        )
    return min(settings.max_tokens, positions - settings.generate)
