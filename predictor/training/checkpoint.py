"""Reading checkpoints of `predictor.train`, without unpickling anything but tensors."""

import csv
import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from predictor.networks.interface import RoutePredictor
from predictor.networks.windows import PredictorShape
from predictor.training.module import CHECKPOINT_KEY, settings_of
from predictor.training.resumption import LOG_ROWS, METRICS
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
        _require_finite(path, predictor)
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
        _require_intact(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch.load raise anything
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} cannot be read as a checkpoint of weights ({reason:.160})"
        ) from None
    if not isinstance(checkpoint, dict) or CHECKPOINT_KEY not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of predictor.train")
    return checkpoint


def _require_intact(path: Path) -> None:
    """Raise ValueError where a record does not match its checksum; torch.load does not look."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} does not match its checksum")


def _require_finite(path: Path, predictor: RoutePredictor) -> None:
    """Raise ValueError where a weight is NaN or infinite."""
    for name, weight in predictor.state_dict().items():
        if not weight.isfinite().all():
            raise ValueError(
                f"{path} has weights that are not finite ({name}): its training diverged; train "
                "again with a lower model.learning_rate"
            )


def _weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The predictor's own entries among those of the training module."""
    return {
        name.removeprefix(PREFIX): tensor
        for name, tensor in state.items()
        if name.startswith(PREFIX)
    }


def find_checkpoint(name: str, folder: Path) -> Path:
    """The file of `--ckpt_path`: a path, or "last" for the newest last.ckpt in `folder`.

    Raises ValueError where there is none.
    """
    if name in ("best", "hpc", "registry"):
        raise ValueError(f"--ckpt_path {name} is not known here: name a file, or last")
    if name != "last":
        return Path(name)
    found = sorted(folder.glob("last*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(
            f"--ckpt_path last: {folder} holds no last.ckpt; name the run with "
            "--trainer.default_root_dir, or start without --ckpt_path"
        )
    return found[-1]


def earlier_rows(file: Path, checkpoint: dict[str, Any]) -> list[dict[str, str]]:
    """The rows of metrics.csv that the run of the checkpoint in `file` had written before it."""
    count = int(checkpoint.get(LOG_ROWS, 0))
    path = file.parent.parent / METRICS
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as rows:
        return list(csv.DictReader(rows))[:count]


def require_same(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise ValueError unless both descriptions are of the same predictor of the same model."""
    for key in ("kind", "topology", "stack", "window", "horizon", "settings"):
        if json.loads(json.dumps(here[key])) != there[key]:
            raise ValueError(
                f"{path} does not fit: its {key} is {there[key]}, here it is {here[key]}"
            )


def require_resumable(path: Path, here: dict[str, Any]) -> None:
    """Raise ValueError unless the checkpoint is of the predictor `here` and has its optimizer."""
    checkpoint = read_checkpoint(path)
    require_same(path, json.loads(checkpoint[CHECKPOINT_KEY]), here)
    if "optimizer_states" not in checkpoint:
        raise ValueError(
            f"{path} holds weights only and cannot be resumed; name the run's checkpoints/last.ckpt"
        )
