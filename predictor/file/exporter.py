"""The exporter: writes a trained predictor as one ONNX file, in float32 or in int8."""

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from predictor.file.quantization import quantize
from predictor.training.checkpoint import Trained
from routing.predictor_file.checksum import CHECKSUM_KEY, UNSTAMPED, stamp
from routing.predictor_file.format import HEADS, METADATA_KEY, SCHEMA

OPSET = 20


class ExportedModule(nn.Module):
    """The predictor's ONNX graph as a module, for torch's exporter."""

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.predictor = trained.predictor

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the graph: takes `graph_inputs` and returns `graph_outputs`, in order."""
        return self.predictor.run_graph(*inputs)


def write_graph(trained: Trained, path: Path) -> None:
    """Export to one ONNX file that holds the weights and the metadata that the runtime reads."""
    predictor = trained.predictor
    example = predictor.random_inputs(2, 3, 5)
    dynamic = tuple(predictor.graph_inputs[name] for name in predictor.graph_inputs)
    with _quiet():
        program = torch.onnx.export(
            ExportedModule(trained).eval(),
            tuple(example[name] for name in predictor.graph_inputs),
            input_names=list(predictor.graph_inputs),
            output_names=list(predictor.graph_outputs),
            dynamic_shapes=(dynamic,),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    forget_origin(program.model)
    program.model.metadata_props[METADATA_KEY] = json.dumps(metadata(trained))
    program.model.metadata_props[CHECKSUM_KEY] = UNSTAMPED
    program.save(str(path))
    stamp(path)


def forget_origin(model: Any) -> None:
    """Drop the exporter's notes on the origin of each node: they hold paths of this machine."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def metadata(trained: Trained, quantization: str = "none") -> dict[str, Any]:
    """The file's description of itself; docs/formats.md lists its keys."""
    predictor = trained.predictor
    cache = predictor.cache
    sizes = {} if cache is None else cache._asdict()
    return {
        "schema": SCHEMA,
        "kind": predictor.kind,
        "topology": trained.topology.to_json(),
        "stack": trained.stack,
        "window": predictor.shape.window,
        "horizon": predictor.shape.horizon,
        "cache": cache is not None,
        **sizes,
        "quantization": quantization,
        "calibration": dict(
            zip(
                HEADS,
                torch.stack([predictor.scale_J, predictor.shift_J], 1).tolist(),
                strict=True,
            )
        ),
        "metrics": trained.metrics,
        "provenance": trained.provenance | {"settings": trained.settings},
    }


def write_quantized(source: Path, target: Path) -> None:
    """Copy an exported file with int8 weights, and say so in its metadata."""
    import onnx

    model = onnx.load(str(source))
    meta = json.loads({p.key: p.value for p in model.metadata_props}[METADATA_KEY])
    with _quiet():
        model = quantize(model)
    entry = {METADATA_KEY: json.dumps(meta | {"quantization": "int8"})}
    onnx.helper.set_model_props(model, entry | {CHECKSUM_KEY: UNSTAMPED})
    onnx.save(model, str(target))
    stamp(target)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep messages of the exporter and the quantiser out of the terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
