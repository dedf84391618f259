"""The writing of a quantised directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.quantised.layout import is_expert, is_stacked
from tests.helpers.quantised.layouts import LAYOUTS
from tests.helpers.tiny import tiny_model, tiny_tokenizer

SINGLE = "model.safetensors"


def write_quantised(
    source: Path, target: Path, layout: str, *, twin: Path | None = None, **changes: object
) -> Path:
    """Write the model of `source`, whose weights are in one file, in one of LAYOUTS.

    twin: also write the unquantised model that has the decoded weights.
    changes: to the quantization_config.
    Raises LookupError where the layout has no such experts.
    """
    chosen = LAYOUTS[layout]
    coded: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    has_experts = False
    for key, tensor in read_tensors(source / SINGLE).items():
        found = chosen.code(key, tensor)
        coded |= {key: tensor} if found is None else found.tensors
        plain[key] = tensor if found is None else found.weights.to(tensor.dtype)
        has_experts |= found is not None and (is_expert(key, tensor) or is_stacked(key, tensor))
    if not has_experts:
        raise LookupError(f"the experts of {source} cannot be stored as {layout}")
    _write(source, target, coded, {"quantization_config": chosen.quantization | changes})
    if twin is not None:
        _write(source, twin, plain, {})
    return target


WIDTHS: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
"""Widths that all layouts can have."""
QWEN: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_experts": 4,
}
"""Widths of several blocks."""


def save_source(directory: Path, architecture: str, sizes: Mapping[str, Any] | None = None) -> Path:
    """Save a tiny bfloat16 model; returns its directory.

    sizes: fields of its configuration; by default widths that all layouts can have.
    """
    if sizes is None:
        sizes = QWEN if architecture == "qwen3_moe" else WIDTHS
    model: Any = tiny_model(architecture, **sizes)
    model.bfloat16().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


class LayoutWriter:
    """Writes small models in any layout under `root`, each when it is first asked for.

    sizes: by architecture, of `save_source`.
    """

    def __init__(self, root: Path, sizes: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._root, self._sizes = root, sizes or {}

    def source(self, layout: str) -> Path:
        """The unquantised model that a layout is made of."""
        kind = LAYOUTS[layout].architecture
        directory = self._root / kind
        if not directory.exists():
            save_source(directory, kind, self._sizes.get(kind))
        return directory

    def __call__(self, layout: str) -> tuple[Path, Path]:
        """The model in a layout, and its twin that has the decoded weights."""
        target, twin = self._root / layout, self._root / f"{layout} twin"
        if not target.exists():
            write_quantised(self.source(layout), target, layout, twin=twin)
        return target, twin


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def _write(
    source: Path, target: Path, tensors: dict[str, Tensor], changes: dict[str, object]
) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.name not in (SINGLE, "config.json"):
            shutil.copy(path, target / path.name)
    config = json.loads((source / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config, indent=2))
    stored = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(stored, target / SINGLE, metadata={"format": "pt"})
