"""The choice of a router in one kernel, wherever a captured step calls `torch.topk`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph
from torch.overrides import TorchFunctionMode

from runtime.cuda.kernels.dense import top_k as kernel

_CACHED_ONLY = ContextVar("cached_only", default=False)


class NotCached(Exception):
    """A graph is about to be compiled that was expected in the compiler's caches."""


@contextmanager
def cached_only() -> Iterator[None]:
    """Within the block, graphs come out of the compiler's caches: it raises `NotCached` otherwise,
    as `FusedTopKPass` runs for those only that do not.
    """
    token = _CACHED_ONLY.set(True)
    try:
        yield
    finally:
        _CACHED_ONLY.reset(token)


class FusedTopK(TorchFunctionMode):
    """While active, small `torch.topk` run in the project's kernel."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, Tensor.topk) and not kwargs.get("out"):
            x, k = _arguments(*args, **kwargs)
            if x is not None:
                return torch.return_types.topk(kernel.top_k(x, k))
        return func(*args, **kwargs)


class FusedTopKPass(CustomGraphPass):
    """The same for graphs that are compiled: `aten.topk` becomes an operator of the project's."""

    def __call__(self, graph: Graph) -> None:
        if _CACHED_ONLY.get():
            raise NotCached("the compiled step is not in the compiler's caches")
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.topk.default):
            args = [getattr(arg, "meta", {}).get("val", arg) for arg in node.args]
            x, k = _arguments(*args, **node.kwargs)
            if x is None or not isinstance(k, int):
                continue
            with graph.inserting_before(node):
                own = graph.call_function(torch.ops.expertflow.top_k.default, (node.args[0], k))
                own.meta.update(node.meta)
            node.replace_all_uses_with(own)
            graph.erase_node(node)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__, kernel.__file__))


def _arguments(
    input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, **_: Any
) -> tuple[Tensor | None, int]:
    """The arguments of `torch.topk` that are left, no tensor where the kernel does not fit."""
    return (input if kernel.takes(input, k, dim, largest=largest) else None), k
