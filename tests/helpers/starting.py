"""Predictor files to adapt: tiny and untrained."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import nn

from predictor.file.exporter import write_graph, write_quantized
from predictor.networks.block import Block
from predictor.networks.causal import CausalPredictor
from predictor.training.checkpoint import Trained
from tests.helpers.predicting import TOPOLOGY, tiny_predictor


def start_file(path: Path) -> Path:
    """An untrained causal predictor of `TOPOLOGY`."""
    path.write_bytes(_exported())
    return path


def older_start(path: Path) -> Path:
    """The same of the first network: GELU, and queries and keys that are not normalised."""
    torch.manual_seed(1)
    predictor = tiny_predictor(window=6)
    for block in (module for module in predictor.modules() if isinstance(module, Block)):
        block.mlp[1] = nn.GELU()
        block.attention.register_module("norm", nn.Identity())
    path.write_bytes(_written(predictor))
    return path


@cache
def _exported() -> bytes:
    torch.manual_seed(1)
    return _written(tiny_predictor(window=6))


def _written(predictor: CausalPredictor) -> bytes:
    provenance = {"traces": [{"seed": 7}]}
    trained = Trained(predictor, TOPOLOGY, "decoder", {}, {}, provenance)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictor.onnx"
        write_graph(trained, path)
        return path.read_bytes()


def int8_start(start: Path) -> Path:
    """A file beside `start` with its weights in int8."""
    path = start.with_name("int8.onnx")
    write_quantized(start, path)
    return path
