"""Predictor files to adapt: tiny, untrained, and of every kind."""

from __future__ import annotations

from pathlib import Path

import torch

from predictor.file.exporter import write_graph, write_quantized
from predictor.networks.interface import RoutePredictor
from predictor.networks.t5 import T5Settings
from predictor.training.checkpoint import Trained
from tests.helpers.predicting import TOPOLOGY, shape, tiny_predictor

T5 = T5Settings(width=16, mlp_width=32, blocks=1, attention_heads=2, head_width=8)


def start_file(path: Path) -> Path:
    """An untrained causal predictor of `TOPOLOGY`."""
    torch.manual_seed(1)
    return _write(tiny_predictor(window=6), path)


def int8_start(start: Path) -> Path:
    """A file beside `start` with its weights in int8."""
    path = start.with_name("int8.onnx")
    write_quantized(start, path)
    return path


def t5_file(path: Path) -> Path:
    """An untrained encoder-decoder, the paper's."""
    return _write(T5.build(shape(window=6)).eval(), path)


def _write(predictor: RoutePredictor, path: Path) -> Path:
    provenance = {"traces": [{"seed": 7}]}
    write_graph(Trained(predictor, TOPOLOGY, "decoder", {}, {}, provenance), path)
    return path
