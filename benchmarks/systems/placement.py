"""Placement of a model's weights on a device, undone exactly afterwards.

Arms run on the same model, one after the other. The host tensors stay in place: an arm gets copies
on the device, and the model gets its own tensors back afterwards. ExpertFlow alone takes over the
experts and gives them back itself, so host memory holds them once.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

EXPERTS = ".experts"
"""Ending of the path of a container of experts, in the shapes built here."""


@contextmanager
def restored(model: nn.Module, *, experts: bool = True) -> Iterator[None]:
    """Restore every module's weights and attributes when the block ends, however it ends.

    experts: restore the containers of experts too.
    """
    modules = [
        module for path, module in model.named_modules() if experts or not path.endswith(EXPERTS)
    ]
    attributes = [
        (module, dict(module.__dict__), dict(module._parameters), dict(module._buffers))
        for module in modules
    ]
    weights = [(p, p.data) for module in modules for p in module.parameters(recurse=False)]
    try:
        yield
    finally:
        for parameter, data in weights:
            parameter.data = data
        for module, own, parameters, buffers in attributes:
            module.__dict__.clear()
            module.__dict__.update(own, _parameters=parameters, _buffers=buffers)
        free_memory()


def place(
    model: nn.Module, device: torch.device, *, experts: bool, dtype: torch.dtype | None = None
) -> None:
    """Replace the model's weights by copies on `device`, the experts' only if `experts`.

    dtype: number format of the copies; by default the weights' own.
    """
    for path, module in model.named_modules():
        if path.endswith(EXPERTS) and not experts:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            copy = parameter.detach().to(device).to(dtype or parameter.dtype)
            module._parameters[name] = nn.Parameter(copy, requires_grad=False)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def free_memory() -> None:
    """Collect garbage and return cached memory to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
