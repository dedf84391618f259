"""Reading checkpoints of `predictor.train`, without unpickling anything but tensors."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from predictor.networks.interface import RoutePredictor
from predictor.networks.windows import PredictorShape
from predictor.training.module import CHECKPOINT_KEY, settings_of
from routing.topology import Topology

PREFIX = "predictor."
"""Of the predictor's entries among those of the training module."""


class Trained(NamedTuple):
    """A trained predictor, on the CPU and in evaluation mode."""

    predictor: RoutePredictor
    topology: Topology
    stack: str
    """Name of the stack that it predicts."""
    settings: dict[str, Any]
    """The fields of its `PredictorSettings`."""
    metrics: dict[str, Any]
    """Held-out metrics, for each layer."""
    provenance: dict[str, Any]
    """The traces and libraries that it was trained with."""


def load_checkpoint(path: str | Path) -> Trained:
    """Rebuild the predictor from a checkpoint. Raises ValueError for any other file."""
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
    """Read a checkpoint of predictor.train as it is. Raises ValueError for any other file."""
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch.load raise anything
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
