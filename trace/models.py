"""Loading of the model to trace, whole or without weights, and its runner."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trace.runner import Runner
    from trace.settings import CollectSettings


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

    from routing.pretrained import model_class, read_config, require_plain_weights

    config = read_config(settings.model)
    require_plain_weights(settings.model, config)
    with torch.device("meta"):
        skeleton: PreTrainedModel = model_class(config)(config)
    return skeleton


def load_model(settings: CollectSettings) -> PreTrainedModel:
    """The model, in eval mode on its device. Raises ValueError or OSError."""
    import torch

    from routing.pretrained import load_plain, read_config

    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {settings.device}: torch sees no CUDA device here")
    config = read_config(settings.model)
    model: PreTrainedModel = load_plain(settings.model, config, settings.dtype)
    return model.eval().to(settings.device)


def build_runner(model: Any, settings: CollectSettings) -> Runner:
    """The runner of `model`. Raises ValueError if the model needs other settings."""
    from routing.inspect_model import topology_of
    from trace.router_values import extras_of
    from trace.runner import Runner

    return Runner(
        model,
        generate=settings.generate,
        sample=settings.sample,
        weights=settings.weights,
        lookahead=settings.lookahead,
        extras=extras_of(model, topology_of(model), settings.router_logits, settings.hidden),
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
