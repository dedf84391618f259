"""Where a model's weights lie, and putting them back exactly as they were.

Arms move the same model about, one after the other. The host tensors stay where they are the whole
time: an arm gets copies on the device, and the model gets its own tensors back afterwards. Only our
engine takes the experts over and gives them back itself, so that host memory holds them once.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

EXPERTS = ".experts"
"""How the path of a container of experts ends, in the shapes that are built here."""


@contextmanager
def restored(model: nn.Module, *, experts: bool = True) -> Iterator[None]:
    """Whatever happens meanwhile, every module has its own weights and attributes afterwards.

    experts: their containers too.
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
    """Give the model copies of its weights on `device`; of the experts only with `experts`.

    dtype: of the copies; by default the weights' own.
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
    """Return what nobody holds any more to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
