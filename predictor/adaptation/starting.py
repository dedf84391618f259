"""Predictor files as something to train on: opened, and written with other weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from predictor.adaptation.graph import GraphPredictor, put_back
from predictor.file.documents import CachedPredictor, open_exported
from predictor.file.exporter import write_quantized
from predictor.file.parity import MAX_ERROR
from predictor.file.quantization import dequantize
from predictor.networks.windows import Windows
from routing.predictor_file.checksum import CHECKSUM_KEY, UNSTAMPED, stamp
from routing.predictor_file.format import METADATA_KEY

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Start:
    """An opened predictor file, and its graph in float32."""

    exported: CachedPredictor
    model: onnx.ModelProto
    description: dict[str, Any]
    """The file's metadata."""

    @property
    def is_int8(self) -> bool:
        """Whether the file holds its weights in int8."""
        return bool(self.description["quantization"] != "none")

    def graph(self) -> GraphPredictor:
        """The graph with the file's weights, to train."""
        return GraphPredictor(self.model, self.exported.file.cache_shape)


def open_start(path: Path) -> Start:
    """Open a predictor to train it further. Raises ValueError where that is not possible."""
    import onnx

    exported = open_exported(path)
    if not isinstance(exported, CachedPredictor):
        raise ValueError(
            f"{path} runs over a whole window each time (the paper's T5): only predictors with a "
            "key/value cache are adapted; train it again with `expertflow train`"
        )
    model = onnx.load(str(path))
    start = Start(exported, dequantize(model), _description(model))
    start.graph()
    return start


def write_adapted(start: Start, graph: GraphPredictor, sample: Windows, folder: Path) -> Path:
    """Write the file of `start` with the weights of `graph` into `folder`, in int8 if it was.

    sample: a document on which the exact file must answer as `graph` does; else ValueError.
    """
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(start.model)
    put_back(model, graph)
    exact = folder / "exact.onnx"
    _save(model, exact, start.description | {"quantization": "none"})
    _require_parity(exact, graph, sample)
    if not start.is_int8:
        return exact
    smaller = folder / "int8.onnx"
    write_quantized(exact, smaller)
    return smaller


def describe(path: Path, changes: dict[str, Any]) -> None:
    """Change entries of a file's metadata."""
    import onnx

    model = onnx.load(str(path))
    _save(model, path, _description(model) | changes)


def _description(model: onnx.ModelProto) -> dict[str, Any]:
    entries = {entry.key: entry.value for entry in model.metadata_props}
    description: dict[str, Any] = json.loads(entries[METADATA_KEY])
    return description


def _save(model: onnx.ModelProto, path: Path, description: dict[str, Any]) -> None:
    import onnx

    entries = {METADATA_KEY: json.dumps(description), CHECKSUM_KEY: UNSTAMPED}
    onnx.helper.set_model_props(model, entries)
    onnx.save(model, str(path))
    stamp(path)


@torch.no_grad()
def _require_parity(path: Path, graph: GraphPredictor, sample: Windows) -> None:
    for ours, theirs in zip(graph(sample), open_exported(path)(sample), strict=False):
        error = float(((ours - theirs).abs() / ours.abs().clamp(min=1)).max())
        if not error <= MAX_ERROR:
            raise ValueError(
                f"the written graph differs from the trained one by {error:.2e}; nothing written"
            )
