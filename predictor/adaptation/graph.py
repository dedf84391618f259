"""A predictor's ONNX graph as a torch module whose weights can be trained and put back.

It runs the file itself, node by node, so that files of every age and of any network can be trained
on: no class of `predictor.networks` has to match them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from predictor.adaptation.operators import OPERATORS
from predictor.networks.windows import Windows
from routing.predictor_file.format import CACHED_INPUTS, HEADS, PADDING

if TYPE_CHECKING:
    import onnx

PREFIX = "predictor."
"""Of the weights that torch's exporter keeps by name; matrices of products have other names."""


class GraphPredictor(nn.Module):
    """The heads of an exported predictor with a key/value cache, in float32, read without a past.

    Args:
        model: The graph, with plain float32 weights (see `predictor.file.quantization`).
        cache_shape: (blocks, heads, head_dim) of the graph's key/value cache.
    """

    def __init__(self, model: onnx.ModelProto, cache_shape: tuple[int, int, int]) -> None:
        super().__init__()
        from onnx import numpy_helper

        self.cache_shape = cache_shape
        names = {value.name for value in model.graph.output}
        self.outputs = [head for head in HEADS if head in names]
        self._nodes = _needed(model.graph, self.outputs)
        _require_known(self._nodes)
        self._attributes = [_attributes(node) for node in self._nodes]
        self._constants: dict[str, Tensor] = {}
        self._weights: dict[str, nn.Parameter] = {}
        tables = {_table_of(node) for node in self._nodes}
        for entry in model.graph.initializer:
            tensor = torch.from_numpy(numpy_helper.to_array(entry).copy())
            learnt = entry.name.startswith(PREFIX) or entry.name in tables
            if tensor.is_floating_point() and tensor.dim() and (learnt or self._calibrates(tensor)):
                self._weights[entry.name] = nn.Parameter(tensor)
                self.register_parameter(entry.name.replace(".", "_"), self._weights[entry.name])
            else:
                self._constants[entry.name] = tensor

    def _calibrates(self, tensor: Tensor) -> bool:
        """Whether it is the scale or the shift of the heads' logits, [J, 1, 1]."""
        return tuple(tensor.shape) == (len(self.outputs), 1, 1)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """What is trained, by its name in the file."""
        return dict(self._weights)

    def calibration(self) -> tuple[nn.Parameter, nn.Parameter] | None:
        """The scale and the shift of the heads' logits, [J, 1, 1] each, if there are any."""
        found: dict[str, nn.Parameter] = {}
        for node in self._nodes:
            for name in node.input:
                if name in self._weights and self._calibrates(self._weights[name]):
                    found[node.op_type] = self._weights[name]
        return (found["Mul"], found["Add"]) if found.keys() == {"Mul", "Add"} else None

    def forward(self, batch: Windows) -> list[Tensor]:
        """The logits of each head that the file has, [B, T, L, E], in the order of HEADS."""
        blocks, heads, width = self.cache_shape
        rows = len(batch.token_ids_BT)
        values = dict(self._constants) | self._weights
        values |= dict(
            zip(
                CACHED_INPUTS,
                (
                    batch.token_ids_BT,
                    batch.routes_BTLK.long(),
                    batch.positions_BT,
                    torch.zeros(blocks, 2, rows, heads, 0, width),
                    torch.full((rows, 0), PADDING),
                ),
                strict=True,
            )
        )
        for node, attributes in zip(self._nodes, self._attributes, strict=True):
            inputs = (values[name] if name else None for name in node.input)
            result = OPERATORS[node.op_type](attributes, *inputs)
            results = result if isinstance(result, tuple) else (result,)
            values.update(zip(node.output, results, strict=True))
        return [values[name] for name in self.outputs]


def _table_of(node: onnx.NodeProto) -> str | None:
    """The name of the matrix that a product or a look-up by token reads, if it is a constant."""
    place = {"MatMul": 1, "Gather": 0}.get(node.op_type)
    return None if place is None else node.input[place]


def _needed(graph: onnx.GraphProto, outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes that the outputs depend on, in the file's order, which is one of computation."""
    wanted, nodes = set(outputs), []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            nodes.append(node)
    return nodes[::-1]


def _require_known(nodes: Iterable[onnx.NodeProto]) -> None:
    unknown = sorted({n.op_type for n in nodes if n.domain or n.op_type not in OPERATORS})
    if unknown:
        raise ValueError(
            f"the predictor has operators that cannot be trained here: {', '.join(unknown)}; "
            "train a new one on the trace with `expertflow train`"
        )


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    from onnx import helper, numpy_helper

    found: dict[str, Any] = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if attribute.name == "value":
            value = torch.from_numpy(numpy_helper.to_array(value).copy())
        found[attribute.name] = value.decode() if isinstance(value, bytes) else value
    return found


def put_back(model: onnx.ModelProto, graph: GraphPredictor) -> None:
    """Replace the weights of `model` by those of `graph`, which was made from it."""
    from onnx import numpy_helper

    weights = graph.weights
    for entry in model.graph.initializer:
        if entry.name in weights:
            trained = weights[entry.name].detach().numpy()
            entry.CopyFrom(numpy_helper.from_array(trained, entry.name))
