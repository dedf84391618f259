"""A predictor file relabelled for another model of the same topology, for benchmarks only.

A random model of a large shape has no routes worth predicting. It replays those of a small trained
model of the same topology. That model's predictor is the right one, but it names the small model.

python -m benchmarks.replay.relabel_predictor --predictor FILE --shape olmoe-7b --out FILE
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from routing.cli import run
from routing.inspect_model import topology_of
from routing.predictor_file.checksum import CHECKSUM_KEY, UNSTAMPED, stamp
from routing.predictor_file.format import METADATA_KEY
from routing.topology import Stack, Topology


@dataclass(frozen=True, kw_only=True)
class RelabelSettings:
    """Relabel a predictor for a benchmark's model."""

    predictor: Path
    """ONNX file of a model of the same layers, experts and top-k."""
    shape: str
    """Model shape, as in benchmarks.decode."""
    out: Path
    """New ONNX file."""


def main(settings: RelabelSettings) -> None:
    """Write the copy. `benchmarks.decode` does the same by itself where onnx is installed."""
    from benchmarks.common.shapes import empty_model, shape_named

    topology = topology_of(empty_model(shape_named(settings.shape)))
    print(relabel_predictor(settings.predictor, topology, settings.out))


def relabel_predictor(predictor: Path, topology: Topology, into: Path) -> Path:
    """Copy the ONNX file `predictor` to `into`, relabelled for the model of `topology`.

    Raises ValueError if layers, experts or top-k differ, or the file is not a predictor.
    """
    import onnx

    if not predictor.is_file():
        raise ValueError(f"there is no predictor at {predictor}")
    model = onnx.load(predictor)
    entries = {entry.key: entry for entry in model.metadata_props}
    entry = entries.get(METADATA_KEY)
    if entry is None:
        raise ValueError(f"{predictor} is an ONNX file, but not one that predictor.export wrote")
    metadata = json.loads(entry.value)
    stack, predicted = topology.stack(), Topology.from_json(metadata["topology"]).stack()
    if _sizes(stack) != _sizes(predicted):
        raise ValueError(f"{predictor} predicts {predicted}, but the benchmark's model is {stack}")
    metadata["topology"] = topology.to_json()
    entry.value = json.dumps(metadata)
    into.parent.mkdir(parents=True, exist_ok=True)
    if CHECKSUM_KEY in entries:
        entries[CHECKSUM_KEY].value = UNSTAMPED
    onnx.save(model, into)
    if CHECKSUM_KEY in entries:
        stamp(into)
    return into


def _sizes(stack: Stack) -> list[tuple[int, int]]:
    return [(layer.num_experts, layer.top_k) for layer in stack.layers]


if __name__ == "__main__":
    run(main, RelabelSettings, prog="python -m benchmarks.replay.relabel_predictor")
