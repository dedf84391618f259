"""Quantised checkpoints of one architecture: loaded from their codes, and equal to their twins.

`check_encodings` is what the columns of encodings in docs/compatibility.md are made of.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import runtime
from runtime.weights.encodings.table import ENCODINGS
from runtime.weights.source import Source, from_path
from tests.helpers.architectures import architecture_model
from tests.helpers.quantised.checkpoint import write_quantised
from tests.helpers.quantised.layouts import layouts_of

NOT_APPLICABLE = "-"
DECODED = "decoded"
"""Exact, but experts are not kept in their codes."""
WIDTHS = {"moe_intermediate_size": 32, "intermediate_size": 64}
"""Multiples of the numbers that share a scale."""
PREFERRED: dict[str, tuple[str, ...]] = {
    "mxfp4": ("mxfp4 compressed-tensors", "mxfp4 gpt-oss"),
    "fp8-block": ("fp8 16x16", "fp8 stacked"),
    "int4-group": ("int4 compressed-tensors 32",),
    "nvfp4": ("nvfp4 modelopt", "nvfp4 gpt-oss", "nvfp4 stacked"),
}
"""Layouts of an encoding that are tried; of the others all are, in the order of their table. An
architecture has the first that it can have."""
ONLY = {
    "mxfp4 gpt-oss": ("gpt_oss", "openai_privacy_filter"),
    "nvfp4 gpt-oss": ("gpt_oss", "llama4", "llama4_text"),
}
"""Architectures that alone have a layout."""
SHARE = 0.4
"""Of the experts that fit in memory."""

Logits = Callable[[Any], Tensor]


def check_encodings(kind: str, logits: Logits) -> dict[str, str]:
    """A cell for each encoding: "yes", DECODED, NOT_APPLICABLE, or what went wrong."""
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "plain"
        model: Any = architecture_model(kind, **WIDTHS)
        model.save_pretrained(source)
        return {
            encoding: _attempt(kind, encoding, source, logits) for encoding in sorted(ENCODINGS)
        }


def _attempt(kind: str, encoding: str, source: Path, logits: Logits) -> str:
    for layout in PREFERRED.get(encoding) or layouts_of(encoding):
        if kind not in ONLY.get(layout, (kind,)):
            continue
        target, twin = source.with_name(layout), source.with_name(f"{layout} twin")
        try:
            write_quantised(source, target, layout, twin=twin)
        except LookupError:
            continue
        try:
            return _compare(target, twin, encoding, logits)
        except (ValueError, AssertionError) as error:
            return f"no: {' '.join(str(error).split()) or type(error).__name__:.200}"
    return NOT_APPLICABLE


def _compare(coded: Path, twin: Path, encoding: str, logits: Logits) -> str:
    found, expected = from_path(coded, None, "auto"), from_path(twin, None, "auto")
    for layer in range(len(found.layers)):
        for expert in range(found.layers[layer].num_experts):
            experts = [_read(source, layer, expert) for source in (found, expected)]
            for name, tensor in experts[1].items():
                assert torch.equal(experts[0][name], tensor), f"{name} of expert {expert} differs"
    seen = [logits(runtime.load(path, memory=SHARE)) for path in (coded, twin)]
    assert torch.equal(*seen), f"logits differ by {float((seen[0] - seen[1]).abs().max()):.1e}"
    return "yes" if encoding in _encodings(found) else DECODED


def _encodings(source: Source) -> set[str]:
    layers = range(len(source.layers))
    return {
        matrix.encoding.name for layer in layers for matrix in source.store.coding(layer).values()
    }


def _read(source: Source, layer: int, expert: int) -> dict[str, Tensor]:
    specs = source.store.specs(layer)
    into = {
        name: torch.full(spec.shape, torch.nan, dtype=spec.dtype) for name, spec in specs.items()
    }
    source.store.read(layer, expert, into)
    return into
