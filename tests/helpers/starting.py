"""Predictor files to adapt: tiny and untrained."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch

from predictor.file.exporter import write_graph, write_quantized
from predictor.training.checkpoint import Trained
from tests.helpers.predicting import TOPOLOGY, tiny_predictor


def start_file(path: Path) -> Path:
    """An untrained causal predictor of `TOPOLOGY`."""
    path.write_bytes(_exported())
    return path


@cache
def _exported() -> bytes:
    torch.manual_seed(1)
    provenance = {"traces": [{"seed": 7}]}
    trained = Trained(tiny_predictor(window=6), TOPOLOGY, "decoder", {}, {}, provenance)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictor.onnx"
        write_graph(trained, path)
        return path.read_bytes()


def int8_start(start: Path) -> Path:
    """A file beside `start` with its weights in int8."""
    path = start.with_name("int8.onnx")
    write_quantized(start, path)
    return path
