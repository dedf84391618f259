"""The writing of a quantised directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.quantised.layouts import LAYOUTS

SINGLE = "model.safetensors"


def write_quantised(
    source: Path, target: Path, layout: str, *, twin: Path | None = None, **changes: object
) -> Path:
    """Write the model of `source`, whose weights are in one file, in one of LAYOUTS.

    twin: also write the unquantised model that has the decoded weights.
    changes: to the quantization_config.
    """
    chosen = LAYOUTS[layout]
    coded: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for key, tensor in read_tensors(source / SINGLE).items():
        found = chosen.code(key, tensor)
        coded |= {key: tensor} if found is None else found.tensors
        plain[key] = tensor if found is None else found.weights.to(tensor.dtype)
    if coded.keys() == plain.keys():
        raise ValueError(f"nothing of {source} can be stored as {layout}")
    _write(source, target, coded, {"quantization_config": chosen.quantization | changes})
    if twin is not None:
        _write(source, twin, plain, {})
    return target


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
