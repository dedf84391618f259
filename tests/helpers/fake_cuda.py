"""The GPU engine without a GPU: streams and pinning that do nothing, steps that run uncaptured, and
are traced where they would be compiled.

Everything else is the engine's own: books, kernels (interpreted), records, loop, predictor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from routing.predictor_file.reader import open_predictor
from runtime.cuda.backend import CudaBackend
from runtime.cuda.decode.experts import experts_call as experts
from runtime.cuda.decode.experts import mover
from runtime.cuda.decode.fused_forward import FusedForward, FusedNorms
from runtime.cuda.decode.graph_step import CapturedStep
from runtime.cuda.device_budget import device_budget
from runtime.cuda.memory import pinned
from runtime.cuda.options import CudaOptions
from runtime.engine.engine import Engine
from runtime.loading import choose_policy
from runtime.prediction.forecaster import Forecaster
from runtime.prediction.route_log import RouteLog
from runtime.weights.source import from_module, from_path
from tests.helpers import interpreter

interpreter.mend()

WAITS = (
    torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__int__,
    torch.Tensor.__float__, torch.Tensor.__index__, torch.Tensor.nonzero, torch.nonzero,
    torch.Tensor.unique, torch.unique, torch.masked_select, torch.Tensor.masked_select,
)  # fmt: skip
"""Operations that wait for the numbers of a tensor."""


class Stream:
    """A stream on which everything has happened already."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self) -> Stream:
        return self

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return False  # as far as anybody has looked


def without_streams(patch: pytest.MonkeyPatch) -> None:
    """Everything happens at once, in the order of the calls."""
    patch.setattr(torch.cuda, "Stream", Stream)
    patch.setattr(torch.cuda, "current_stream", lambda *_: Stream())
    patch.setattr(torch.cuda, "stream", lambda _: nullcontext())


@contextmanager
def fake_cuda(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """While active, the GPU engine runs on the CPU."""
    without_streams(patch)
    patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    patch.setattr(torch.cuda, "synchronize", lambda *_: None)
    patch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    patch.setattr(pinned.PinnedMemory, "register", lambda self, tensor: None)
    patch.setattr(pinned, "_cores_of_gpu", set)
    patch.setattr(CapturedStep, "__call__", CapturedStep._run)
    patch.setattr(FusedForward, "__call__", _run_without_waiting)
    patch.setattr(FusedNorms, "in_use", lambda _: nullcontext())  # a program a token takes long
    patch.setattr(experts, "FETCHERS", 2)
    patch.setattr(mover, "PREFETCHERS", 2)
    yield


class Waiting(TorchFunctionMode):
    """While active, what would wait for a GPU is refused, as CUDA refuses it in a capture."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        assert func not in WAITS, f"a captured step waits for the device: {func.__name__}"
        return func(*args, **kwargs or {})


def _run_without_waiting(
    forward: FusedForward, *args: Any, own: Any = FusedForward.__call__, **kwargs: Any
) -> Any:
    """Plain steps: what a compiler takes apart would depend on what is active."""
    with Waiting():
        return own(forward, *args, **kwargs)


@contextmanager
def fake_pinning(patch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """`fake_cuda`, with the addresses of what is pinned."""
    addresses: set[int] = set()
    with fake_cuda(patch):

        def register(memory: pinned.PinnedMemory, tensor: torch.Tensor) -> None:
            memory._registered[tensor.data_ptr()] = tensor
            addresses.add(tensor.data_ptr())

        def release(memory: pinned.PinnedMemory, tensor: torch.Tensor) -> None:
            if memory._registered.pop(tensor.data_ptr(), None) is not None:
                addresses.remove(tensor.data_ptr())

        patch.setattr(pinned.PinnedMemory, "register", register)
        patch.setattr(pinned.PinnedMemory, "release", release)
        yield addresses


def load_fake(
    model: Any,
    predictor: Any = None,
    *,
    memory: float = 0.25,
    policy: str | None = None,
    **options: Any,
) -> Any:
    """`runtime.load` for a GPU, on the CPU, under `fake_cuda`.

    model: also a directory. shared: its host tier, with other processes. host_bytes: of weights
    other than experts, to be kept in host memory.
    """
    is_module = isinstance(model, torch.nn.Module)
    shared = options.pop("shared", False)
    source = (
        from_module(model, None) if is_module else from_path(model, None, "auto", shared=shared)
    )
    file = None if predictor is None else open_predictor(predictor)
    chosen = choose_policy(policy, source, file, options.pop("replay", None))
    forecaster = None if file is None else Forecaster(file)
    folder = options.pop("record", None)
    route_log = None if folder is None else RouteLog(folder, source.topology)
    host_bytes = options.pop("host_bytes", 0)
    settings = CudaOptions(**({"context": 48, "prefetch": False, "cpu_share": False} | options))
    sizes = {"context": settings.context, "batch": settings.batch}
    budget = device_budget(source, memory, **sizes, tokens=settings.paged_tokens)
    budget = budget._replace(host_bytes=host_bytes or budget.host_bytes)
    cpu = torch.device("cpu")
    backend = CudaBackend(source, budget, cpu, chosen, settings, forecaster, route_log)
    Engine(source, backend, forecaster, route_log, cpu)
    return source.model
