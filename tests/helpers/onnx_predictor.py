"""Predictor files whose answers are known: ONNX graphs made by hand to the contract of the runtime.

With `onehot(x)` the indicator of x % E, the logits of token i in layer l are

    with a cache    this     (l + 1) * sum over visible tokens j of onehot(token_j), i included
                    next     (l + 1) * onehot(token_i)
                    horizon  (l + 1) * sum over the given routes of token i of onehot(route)
                    far      twice the horizon
    stateless       this     as above, over the tokens that were fed
                    next     (l + 1) * prompt length
                    horizon  (l + 1) * number of tokens fed
                    far      twice the horizon

and token j is visible to token i when it is no padding and 0 <= position_i - position_j < window.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from routing.predictor_file.checksum import CHECKSUM_KEY, UNSTAMPED, stamp
from routing.topology import Topology

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


class GraphBuilder:
    """Collects the nodes and constants of a graph; every method returns the name of its result."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def __call__(self, operator: str, *inputs: str, to: str = "", **attributes: Any) -> str:
        result = to or f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [result], **attributes))
        return result

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def unsqueeze(self, value: str, *axes: int) -> str:
        return self("Unsqueeze", value, self.constant(axes))

    def onehot(self, index: str, depth: int) -> str:
        """Indicator of `index`; zeros where it is negative."""
        inside = self("Less", index, self.constant(0))
        index = self("Where", inside, self.constant(depth), index)
        values = self.constant([0, 1], np.float32)
        return self("OneHot", index, self.constant(depth), values, axis=-1)

    def visible(self, queries_BT: str, keys_BT: str, window: int) -> str:
        """float32 [B, T, T'], 1 where the query sees the key."""
        queries, keys = self.unsqueeze(queries_BT, 2), self.unsqueeze(keys_BT, 1)
        distance = self("Sub", queries, keys)
        near = self("Less", distance, self.constant(window))
        past = self("GreaterOrEqual", distance, self.constant(0))
        real = self("GreaterOrEqual", keys, self.constant(0))
        return self("Cast", self("And", self("And", near, past), real), to_type=FLOAT)


def write_predictor(
    path: Path,
    topology: Topology,
    *,
    window: int = 8,
    horizon: int = 4,
    cache: bool = True,
    without: Collection[str] = (),
    metadata: str | None = None,
) -> Path:
    """Write the predictor of the module's docstring for the decoder of `topology` to `path`.

    without: inputs and outputs to leave out. metadata: instead of the proper one.
    """
    stack = topology.stack()
    graph = GraphBuilder()
    scale_L1 = graph.constant(np.arange(1, stack.num_layers + 1)[:, None], np.float32)
    index_BT = graph("Mod", "token_ids", graph.constant(stack.num_experts))
    onehot_BTE = graph.onehot(index_BT, stack.num_experts)
    counts = graph("MatMul", graph.visible("positions", "positions", window), onehot_BTE)
    if cache:
        counts = graph("Add", counts, _past_counts(graph, window))
        routes = graph.onehot("routes", stack.num_experts)
        present = graph.unsqueeze(onehot_BTE, 0, 1, 3)
        graph("Concat", present, present, to="present", axis=1)
        following, later = onehot_BTE, graph("ReduceSum", routes, graph.constant([3]), keepdims=0)
    else:
        following, later = _lengths(graph, onehot_BTE)
    for name, value in (("this", counts), ("next", following)):
        graph("Mul", graph.unsqueeze(value, 2), scale_L1, to=name)
    later = later if cache else graph.unsqueeze(later, 2)
    graph("Mul", later, scale_L1, to="horizon")
    graph("Mul", later, graph("Add", scale_L1, scale_L1), to="far")
    model = _model(graph, topology, cache, set(without))
    meta = _metadata(topology, window, horizon, cache) if metadata is None else metadata
    helper.set_model_props(model, {"expertflow": meta, CHECKSUM_KEY: UNSTAMPED})
    onnx.save(model, path)
    stamp(path)
    return path


def _past_counts(graph: GraphBuilder, window: int) -> str:
    values = "past"
    for axis, index in ((0, 0), (0, 1), (1, 0)):  # block 0, values, head 0: [B, P, E]
        values = graph("Gather", values, graph.constant(index), axis=axis)
    return graph("MatMul", graph.visible("positions", "past_positions", window), values)


def _lengths(graph: GraphBuilder, like_BTE: str) -> tuple[str, str]:
    """The prompt lengths and the number of tokens, as float32 [B, T, E]."""
    zeros = graph("Mul", like_BTE, graph.constant(0, np.float32))
    prompt = graph.unsqueeze(graph("Cast", "prompt_lengths", to_type=FLOAT), 1, 2)
    length = graph("Gather", graph("Shape", "token_ids"), graph.constant([1]), axis=0)
    return graph("Add", zeros, prompt), graph("Add", zeros, graph("Cast", length, to_type=FLOAT))


def _model(
    graph: GraphBuilder, topology: Topology, cache: bool, without: set[str]
) -> onnx.ModelProto:
    stack = topology.stack()
    layers, num_experts = stack.num_layers, stack.num_experts
    inputs: dict[str, tuple[int, list[Any]]] = {
        "token_ids": (INT, ["B", "T"]),
        "positions": (INT, ["B", "T"]),
    }
    outputs: dict[str, tuple[int, list[Any]]] = {
        name: (FLOAT, ["B", "T", layers, num_experts])
        for name in ("this", "next", "horizon", "far")
    }
    if cache:
        inputs["routes"] = (INT, ["B", "T", layers, stack.top_k])
        inputs["past"] = (FLOAT, [1, 2, "B", 1, "P", num_experts])
        inputs["past_positions"] = (INT, ["B", "P"])
        outputs["present"] = (FLOAT, [1, 2, "B", 1, "T", num_experts])
    else:
        inputs["prompt_lengths"] = (INT, ["B"])
    for node in graph.nodes:
        for attribute in node.attribute:
            if attribute.name == "to_type":
                attribute.name = "to"
    made = helper.make_graph(
        [node for node in graph.nodes if not set(node.output) & without],
        "predictor",
        [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [
            helper.make_tensor_value_info(n, *kind)
            for n, kind in outputs.items()
            if n not in without
        ],
        graph.constants,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return _renamed(model, without)


def _renamed(model: onnx.ModelProto, without: set[str]) -> onnx.ModelProto:
    """Rename the inputs that are left out."""
    for value in model.graph.input:
        if value.name in without:
            for node in model.graph.node:
                node.input[:] = [f"{n}_" if n == value.name else n for n in node.input]
            value.name += "_"
    return model


def _metadata(topology: Topology, window: int, horizon: int, cache: bool) -> str:
    return json.dumps(
        {
            "schema": 1,
            "kind": "causal" if cache else "t5",
            "topology": topology.to_json(),
            "stack": "decoder",
            "window": window,
            "horizon": horizon,
            "cache": cache,
            "blocks": 1,
            "heads": 1,
            "head_dim": topology.stack().num_experts,
            "quantization": "none",
            "calibration": {},
            "metrics": {},
            "provenance": {},
        }
    )
