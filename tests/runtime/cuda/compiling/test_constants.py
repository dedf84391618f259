"""What models make on the host in every step, in compiled steps: lowered as for a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import map_aggregate
from transformers import PhimoeConfig
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

META, GPU = torch.device("meta"), torch.device("cuda:0")


def traced() -> GraphModule:
    """Phi-MoE's rotations of two tokens on the device `META`."""
    rotations = PhimoeRotaryEmbedding(PhimoeConfig())

    def run(x: Tensor, positions_B1: Tensor) -> Any:
        return rotations.forward(x, position_ids=positions_B1)

    inputs = torch.empty(2, 1, 8, device=META), torch.zeros(2, 1, dtype=torch.int64, device=META)
    graph = make_fx(run, decomposition_table=select_decomp_table())(*inputs)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def move_to_gpu(graph: GraphModule, mode: FakeTensorMode) -> None:
    """Make a graph of `META` one of a GPU that need not be there."""
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            device = GPU if value.device == META else value.device
            node.meta["val"] = FakeTensor(mode, value.to(META), device)
        node.args = map_aggregate(node.args, lambda arg: GPU if arg == META else arg)


def test_constants_of_the_host_are_computed_on_the_device() -> None:
    """Phi-MoE's frequencies: a copy from the host could not be captured."""
    graph = traced()
    mode = FakeTensorMode(shape_env=ShapeEnv())
    assert any(node.meta["val"].device.type == "cpu" for node in graph.graph.nodes if node.meta)
    move_to_gpu(graph, mode)
    inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    lowered = GraphLowering(graph, example_inputs=inputs, shape_env=mode.shape_env)
    with V.set_graph_handler(lowered), V.set_fake_mode(mode):
        lowered.run(*inputs)
    assert {operation.get_device() for operation in lowered.operations} == {GPU}
    assert {type(one).__name__ for one in lowered.operations} == {"ComputedBuffer"}
