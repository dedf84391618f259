"""Where a model's weights lie, and putting them back exactly as they were.

Arms move the same model about, one after the other. The host tensors stay where they are the whole
time: an arm gets copies on the device, and the model gets its own tensors back afterwards.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Whatever happens meanwhile, every parameter and buffer is itself again afterwards."""
    parameters = [
        (module, name, parameter, parameter.data)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, name, parameter, data in parameters:
            parameter.data = data
            module._parameters[name] = parameter
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        free_memory()


def place(model: nn.Module, device: torch.device, *, experts: bool) -> None:
    """Give the model copies of its weights on `device`; of the experts only with `experts`."""
    for path, module in model.named_modules():
        if path.endswith(".experts") and not experts:
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def free_memory() -> None:
    """Return what nobody holds any more to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
