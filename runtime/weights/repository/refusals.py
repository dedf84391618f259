"""Directories that hold no model which can be loaded: the reason, and the remedy."""

from __future__ import annotations

from pathlib import Path

from routing.pretrained import CONFIG, read_json

ADAPTER_CONFIG = "adapter_config.json"
"""The file by which PEFT and transformers know an adapter."""


def require_model(directory: Path) -> None:
    """Raise ValueError for an adapter alone, or a directory without a model."""
    if (directory / ADAPTER_CONFIG).is_file() and not (directory / CONFIG).exists():
        base = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise ValueError(
            f"{directory} is an adapter and no model: load its base, "
            f"model = runtime.load({str(base)!r}), and then the adapter, "
            f"model.load_adapter({str(directory)!r})"
        )
    if not (directory / CONFIG).is_file():
        raise ValueError(
            f"{directory} is not a model directory: it has no {CONFIG}{_held(directory)}"
        )


def without_weights(directory: Path, wanted: str) -> str:
    """The message about a directory that lacks the safetensors `wanted`."""
    return f"{directory} has no {wanted}: only safetensors are read{_held(directory)}"


def _held(directory: Path) -> str:
    """A hint at what the directory holds instead, to append to a message."""
    names = sorted(path.name for path in directory.iterdir())
    if not names:
        return "; it is empty"
    for suffix, text in (
        (".gguf", "is a GGUF file; load the repository that it was converted from"),
        (".fp16.safetensors", "is a variant; rename it to model.safetensors"),
        (".bf16.safetensors", "is a variant; rename it to model.safetensors"),
        (".bin", "is pickled; convert it with transformers' save_pretrained"),
        (".pth", "is in its publisher's own format; take the repository for transformers"),
        (".safetensors", "has another name than transformers gives; its index may be missing"),
    ):
        found = next((name for name in names if name.endswith(suffix)), None)
        if found is not None:
            return f"; {found} {text}"
    inner = next((n for n in names if (directory / n / CONFIG).is_file()), None)
    return f"; {inner}/ in it has one" if inner else ""
