"""Checkpoints and configuration files written before the predictor had packages still work."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from predictor.networks.causal import CausalPredictor
from predictor.networks.t5 import T5Predictor
from predictor.training.checkpoint import load_checkpoint
from tests.helpers.predicting import TOPOLOGY, random_windows, train, write_trace

CAUSAL_SETTINGS = {
    "width": 48, "blocks": 1, "attention_heads": 2, "kv_heads": 2, "mlp_ratio": 4.0, "stages": 1,
    "embedding_rank": 12, "dropout": 0.0,
}  # fmt: skip
CAUSAL_WEIGHTS = {
    "predictor.history_XD": (24, 48),
    "predictor.unknown_history_D": (48,),
    "predictor.scale_J": (4,),
    "predictor.shift_J": (4,),
    "predictor.heads.weight": (96, 48),
    "predictor.heads.bias": (96,),
    "predictor.embedding_VR.weight": (12, 12),
    "predictor.project_embedding.weight": (48, 12),
    "predictor.blocks.0.attention_norm.weight": (48,),
    "predictor.blocks.0.attention.qkv.weight": (144, 48),
    "predictor.blocks.0.attention.norm.weight": (24,),
    "predictor.blocks.0.attention.out.weight": (48, 48),
    "predictor.blocks.0.mlp_norm.weight": (48,),
    "predictor.blocks.0.mlp.0.weight": (192, 48),
    "predictor.blocks.0.mlp.2.weight": (48, 192),
    "predictor.norm.weight": (48,),
}
"""Names and shapes of the weights that training wrote for these settings."""


def older_checkpoint(path: Path) -> dict[str, Any]:
    """Write a checkpoint of the time of `predictor.causal`; returns its weights."""
    weights = {name: torch.randn(shape) for name, shape in CAUSAL_WEIGHTS.items()}
    meta = {
        "kind": "causal",
        "settings": CAUSAL_SETTINGS,
        "topology": TOPOLOGY.to_json(),
        "stack": "decoder",
        "window": 8,
        "horizon": 2,
        "metrics": {"this_known": {"recall": [0.5, 0.6, 0.7]}},
        "provenance": {"traces": [{"seed": 0}]},
    }
    content = {
        "epoch": 1,
        "global_step": 5,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": weights,
        "expertflow": json.dumps(meta),
    }
    torch.save(content, path)
    return weights


def test_an_older_checkpoint_loads_with_its_weights_and_metrics(tmp_path: Path) -> None:
    weights = older_checkpoint(tmp_path / "older.ckpt")
    trained = load_checkpoint(tmp_path / "older.ckpt")
    assert isinstance(trained.predictor, CausalPredictor)
    assert trained.settings == CAUSAL_SETTINGS
    assert trained.metrics["this_known"]["recall"] == [0.5, 0.6, 0.7]
    loaded = trained.predictor.state_dict()
    assert {f"predictor.{name}" for name in loaded} == set(weights)
    for name, tensor in loaded.items():
        assert torch.equal(tensor, weights[f"predictor.{name}"]), name
    with torch.no_grad():
        assert trained.predictor(random_windows(1, 5)).this_BTLE.shape == (1, 5, 3, 8)


@pytest.mark.parametrize(
    ("class_path", "sizes", "kind"),
    [
        ("predictor.causal.CausalSettings", {"width": 32, "blocks": 1}, CausalPredictor),
        ("predictor.t5.T5Settings", {"width": 16, "mlp_width": 16, "blocks": 1}, T5Predictor),
    ],
)
def test_a_configuration_with_an_older_class_path_trains(
    class_path: str, sizes: dict[str, int], kind: type, tmp_path: Path
) -> None:
    predictor = {"class_path": class_path, "init_args": sizes}
    config = tmp_path / "older.yaml"
    config.write_text(json.dumps({"model": {"predictor": predictor}}))
    trace = write_trace(tmp_path / "trace")
    checkpoint = train(trace, tmp_path / "run", "--trainer.max_steps=1", config=config)
    trained = load_checkpoint(checkpoint)
    assert isinstance(trained.predictor, kind)
    assert trained.settings.items() >= sizes.items()


def test_the_shipped_configurations_name_classes_where_they_are_defined() -> None:
    folder = Path(__file__).parents[2] / "predictor" / "configs"
    for path in sorted(folder.glob("*.yaml")):
        (class_path,) = re.findall(r"class_path: (\S+)", path.read_text())
        module, _, name = class_path.rpartition(".")
        assert getattr(import_module(module), name).__module__ == module, path.name
