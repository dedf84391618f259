"""Other systems that a user could run, each a context manager that sets the model up.

Inside the block `model.generate` runs on `device`; its value holds further arguments for it.
`placement.restored` removes what these libraries leave behind on the modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from benchmarks.systems.placement import place

POLICYLANG = (
    "policy p {{ cache {{ capacity = {capacity} eviction = lru }} "
    "prefetch {{ strategy = history budget = 4 }} schedule {{ mode = gpu_only }} }}"
)


@contextmanager
def resident(
    model: Any, device: torch.device, *, experts: str, dtype: torch.dtype | None = None
) -> Iterator[dict[str, Any]]:
    """Transformers' own code, everything on the device; `experts` is one of its implementations."""
    before = model.get_experts_implementation()
    place(model, device, experts=True, dtype=dtype)
    model.set_experts_implementation(experts)
    try:
        yield {}
    finally:
        model.set_experts_implementation(before)


@contextmanager
def compiled(model: Any, device: torch.device) -> Iterator[dict[str, Any]]:
    """Transformers with a static cache, and the compilation that comes with it."""
    with resident(model, device, experts="batched_mm"):
        try:
            yield {"cache_implementation": "static"}
        finally:
            torch.compiler.reset()
            import_module("torch._inductor.cudagraph_trees").reset_cudagraph_trees()


@contextmanager
def accelerated(model: Any, device: torch.device) -> Iterator[dict[str, Any]]:
    """Accelerate's offloading: a layer's experts lie on the CPU and are copied whole when they run.

    The model must be on the CPU before `dispatch_model`: experts on the GPU would stay there.
    """
    accelerate = import_module("accelerate")
    accelerate.dispatch_model(model, _device_map(model, device.index or 0))
    try:
        yield {}
    finally:
        import_module("accelerate.hooks").remove_hook_from_submodules(model)


def _device_map(model: Any, gpu: int) -> dict[str, str | int]:
    """Device of each module that has weights: the CPU for experts, the GPU for the others."""
    return {
        path: "cpu" if path.endswith(".experts") else gpu
        for path, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
        or next(module.buffers(recurse=False), None) is not None
    }


@contextmanager
def policylang(model: Any, device: torch.device, *, slots: int) -> Iterator[dict[str, Any]]:
    """moe-policylang: LRU over `slots` experts a layer, prefetching by history, synchronous copies.

    Its asynchronous transfers stay off: with them it computes with another layer's weights.
    """
    moe_policylang = import_module("moe_policylang")
    before = model.get_experts_implementation()
    place(model, device, experts=False)
    manager = moe_policylang.attach(
        model, POLICYLANG.format(capacity=slots), gpu_device=device.index or 0
    )
    try:
        yield {}
    finally:
        manager.detach()
        model.set_experts_implementation(before)
