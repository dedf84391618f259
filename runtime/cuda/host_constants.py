"""Constants that a model makes on the host in every step, where a captured step can read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class HostConstants(TorchDispatchMode):
    """While active, copies from the host's memory to a GPU come from pinned memory.

    CUDA captures no others. A captured copy reads its source at every replay, so what is copied is
    kept. It is the same in every step: a step that never waits tells the host nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pinned: dict[tuple[Any, ...], Tensor] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is aten._to_copy.default and _leaves_host(args[0], kwargs.get("device")):
            return func(self.pinned(args[0]), **kwargs | {"non_blocking": True})
        if func is aten.copy_.default and _leaves_host(args[1], args[0].device):
            return func(args[0], self.pinned(args[1]), True)
        return func(*args, **kwargs)

    def pinned(self, constant: Tensor) -> Tensor:
        """The same numbers in pinned memory. They are there before a capture, in which nothing can
        be pinned: the same step has run.
        """
        constant = constant.contiguous()
        content = constant.flatten().view(torch.uint8).numpy().tobytes()
        key = constant.dtype, tuple(constant.shape), content
        if key not in self._pinned:
            self._pinned[key] = constant.pin_memory()
        return self._pinned[key]


def _leaves_host(source: Tensor, target: Any) -> bool:
    is_to_gpu = target is not None and torch.device(target).type == "cuda"
    return is_to_gpu and source.device.type == "cpu" and not source.is_pinned()
