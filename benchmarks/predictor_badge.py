"""A predictor of one model's routes, declared to be another's: a trick of the benchmarks only.

A random model of a large shape has no routes worth predicting; it replays those of a small trained
model of the same topology. That model's predictor is then the right one, but names the small model.

python -m benchmarks.predictor_badge --predictor FILE --shape olmoe-7b --out FILE
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from routing.cli import run
from routing.inspect_model import topology_of
from routing.topology import Stack, Topology

METADATA_KEY = "expertflow"


@dataclass(frozen=True, kw_only=True)
class BadgeSettings:
    """Declare a predictor to be for a benchmark's model."""

    predictor: Path
    """ONNX file of a model of the same layers, experts and top-k."""
    shape: str
    """Model shape, as in benchmarks.decode."""
    out: Path
    """New ONNX file."""


def main(settings: BadgeSettings) -> None:
    """Write the copy. benchmarks.decode does the same by itself where onnx is installed."""
    from benchmarks.shapes import empty_model, shape_named

    topology = topology_of(empty_model(shape_named(settings.shape)))
    print(rebadge(settings.predictor, topology, settings.out))


def rebadge(predictor: Path, topology: Topology, into: Path) -> Path:
    """Copy the ONNX file `predictor` to `into`, declared to be for the model of `topology`.

    Raises ValueError where layers, experts or top-k differ, or the file is no predictor.
    """
    import onnx

    if not predictor.is_file():
        raise ValueError(f"there is no predictor at {predictor}")
    model = onnx.load(predictor)
    entry = next((e for e in model.metadata_props if e.key == METADATA_KEY), None)
    if entry is None:
        raise ValueError(f"{predictor} is an ONNX file, but not one that predictor.export wrote")
    metadata = json.loads(entry.value)
    ours, theirs = topology.stack(), Topology.from_json(metadata["topology"]).stack()
    if _sizes(ours) != _sizes(theirs):
        raise ValueError(f"{predictor} predicts {theirs}, but the benchmark's model is {ours}")
    metadata["topology"] = topology.to_json()
    entry.value = json.dumps(metadata)
    into.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, into)
    return into


def _sizes(stack: Stack) -> list[tuple[int, int]]:
    return [(layer.num_experts, layer.top_k) for layer in stack.layers]


if __name__ == "__main__":
    run(main, BadgeSettings, prog="python -m benchmarks.predictor_badge")
