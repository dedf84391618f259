"""A process that compiles one step and keeps the artefacts. It holds no weight.

    python -m runtime.cuda.compiling FILE   the number of an open file: a `Task`, pickled

When its standard input is closed, nobody waits for it any more, and it ends.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch._dynamo
import torch._inductor.compile_fx  # all modules now, none under fake tensors
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from runtime.cuda.compiling.background import NICENESS, Task
from runtime.cuda.compiling.blueprint import Blueprint, unpack
from runtime.cuda.compiling.compiled_forward import COMPILER, CompiledForward
from runtime.cuda.decode.graph_step import DecodeStep
from runtime.cuda.decode.row_decoder import RowStep
from runtime.cuda.prefetching import GENERATING
from runtime.cuda.sorted_experts import sorted_forwards
from runtime.kv.row_cache import row_cache
from runtime.kv.static_cache import shared_cache
from runtime.kv.storage import Storage


class Compiled(BaseException):
    """Everything is compiled, and nothing shall run."""


def main() -> None:
    """Compile what the task names, out of the way of those who answer."""
    os.nice(NICENESS)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    with open(int(sys.argv[1]), "rb") as file:
        task: Task = pickle.load(file)
    with task.artefacts.recording():
        compile_only(task.blueprint)


def _end_with_the_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def compile_only(content: bytes) -> None:
    """Compile the step of a blueprint, as one graph. Raises whatever a compiler raises."""
    with FakeTensorMode(), torch.no_grad():
        blueprint = unpack(content)
        device = blueprint.step.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        forward = CompiledForward(
            blueprint.model.forward, blueprint.layers, sorted_forwards(blueprint.model),
            num_sizes=1, fullgraph=True, backend=_compile_and_stop,
        )  # fmt: skip
        step = step_of(blueprint, forward)
        try:
            step.forward()
        except Compiled:
            return
    raise AssertionError("the compiled step ran")


def _compile_and_stop(graph: Any, inputs: list[Any]) -> Callable[..., Any]:
    """The types of the inputs are part of the caches' keys: those of live tensors."""
    for node, value in zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.type = nn.Parameter if isinstance(value, nn.Parameter) else Tensor
    graph.recompile()
    torch._inductor.compile(graph, inputs, options=COMPILER)
    return _stop


def _stop(*_: Any) -> NoReturn:
    raise Compiled


def step_of(blueprint: Blueprint, forward: Callable[..., Any]) -> DecodeStep | RowStep:
    """The step as it is in the process that asked, its key/value cache in use."""
    model, shape = blueprint.model, blueprint.step
    storage = Storage(*shape.storage)
    common: dict[str, Any] = {"batch": shape.key.batch, "device": shape.device, "stream": None}
    nothing: Any = None
    cache: Any
    step: DecodeStep | RowStep
    if shape.key.kind == GENERATING:
        cache = shared_cache(storage, model.config.get_text_config(decoder=True))
        step = DecodeStep(model, forward, cache, nothing, context=storage.context, **common)
        if not shape.has_own_attention:
            step.leave_attention()
    else:
        cache = row_cache(model, shape.key.rows, storage.context, storage)
        step = RowStep(forward, cache, nothing, **common)
    for layer, state in zip(cache.layers, shape.states, strict=True):
        if state is not None:
            keys, values, dtype = state
            likes = (torch.empty(size, dtype=dtype, device=shape.device) for size in (keys, values))
            layer.lazy_initialization(*likes)
    return step


if __name__ == "__main__":
    main()
