"""Checkpoints of `predictor.train`, read without unpickling anything but tensors."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from predictor.networks.interface import PredictorShape, RoutePredictor
from predictor.training.module import CHECKPOINT_KEY, settings_of
from routing.topology import Topology

PREFIX = "predictor."


class Trained(NamedTuple):
    """A trained predictor, on the CPU and in evaluation mode."""

    predictor: RoutePredictor
    topology: Topology
    stack: str
    settings: dict[str, Any]
    metrics: dict[str, Any]
    provenance: dict[str, Any]


def load_checkpoint(path: str | Path) -> Trained:
    """Rebuild the predictor of a checkpoint. Raises ValueError for any other file."""
    path = Path(path)
    checkpoint = read_checkpoint(path)
    try:
        meta = json.loads(checkpoint[CHECKPOINT_KEY])
        topology = Topology.from_json(meta["topology"])
        shape = PredictorShape.of(
            topology, meta["stack"], window=meta["window"], horizon=meta["horizon"]
        )
        predictor = settings_of(meta["kind"])(**meta["settings"]).build(shape)
        predictor.load_state_dict(_weights(checkpoint["state_dict"]))
        return Trained(
            predictor.eval(),
            topology,
            meta["stack"],
            meta["settings"],
            meta["metrics"],
            meta["provenance"],
        )
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} was written by another version of predictor.train ({reason:.160}); train again"
        ) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of predictor.train. Raises ValueError for any other file."""
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make torch.load raise whatever they happen to hit
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} cannot be read as a checkpoint of weights ({reason:.160})"
        ) from None
    if not isinstance(checkpoint, dict) or CHECKPOINT_KEY not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of predictor.train")
    return checkpoint


def _weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The predictor's own entries among those of the training module."""
    return {
        name.removeprefix(PREFIX): tensor
        for name, tensor in state.items()
        if name.startswith(PREFIX)
    }
