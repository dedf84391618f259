"""A model and one of its captured steps without any numbers, for a process that only compiles.

Modules and configurations are pickled, tensors as their shapes and places. Rebuilt under torch's
fake tensors they take no memory, and trace to the very graph that the live model traces to.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from routing.layers import MoELayer
from runtime.kv.storage import StorageSize

HOOKS_OF_STATES = (
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip
OFFLOADED = "expertflow"
"""The attribute that an offloaded model has its engine at."""


class StepKey(NamedTuple):
    """What a compiled step is of."""

    kind: str
    """GENERATING: sequences that go on together; SERVING: any rows of the cache."""
    batch: int
    rows: int
    """Sequences that the step's key/value cache has room for."""


class StepShape(NamedTuple):
    """All that a step's graph depends on, beside the model."""

    key: StepKey
    storage: StorageSize
    has_own_attention: bool
    states: list[tuple[Sequence[int], Sequence[int], torch.dtype] | None]
    """Shapes of each layer's keys and values; None of a layer without."""
    device: torch.device


class Blueprint(NamedTuple):
    """A model on tensors that have no memory."""

    model: Any
    layers: list[MoELayer]
    step: StepShape


def pack(model: nn.Module, layers: list[MoELayer], step: StepShape) -> bytes:
    """The blueprint of a live model. Raises ValueError where that is not possible."""
    experts = {id(layer.module) for layer in layers}
    made: dict[int, nn.Module] = {}
    bare = _bare(model, experts, made, is_top=True)
    bare_layers = [layer._replace(module=made[id(layer.module)]) for layer in layers]
    file = io.BytesIO()
    try:
        _Pickler(file).dump(Blueprint(bare, bare_layers, step))
    except Exception as error:  # whatever an attribute of somebody's module raises
        raise ValueError(f"the model cannot be described to another process: {error}") from error
    return file.getvalue()


def unpack(content: bytes) -> Blueprint:
    """Under an active FakeTensorMode, the model on fake tensors."""
    blueprint: Blueprint = _Unpickler(io.BytesIO(content)).load()
    return blueprint


def _bare(
    module: nn.Module, experts: set[int], made: dict[int, nn.Module], *, is_top: bool = False
) -> nn.Module:
    """The modules of `module`, without what the engine has put on them."""
    if id(module) in made:
        return made[id(module)]
    is_experts = id(module) in experts
    if "forward" in module.__dict__ and not (is_top or is_experts):
        raise ValueError(f"the forward of its {type(module).__name__} was replaced")
    bare = made[id(module)] = object.__new__(type(module))
    for name, value in module.__dict__.items():
        hides_a_method = callable(value) and callable(getattr(type(module), name, None))
        if name != OFFLOADED and not hides_a_method:
            bare.__dict__[name] = value
    for name in HOOKS_OF_STATES:
        bare.__dict__[name] = OrderedDict()
    bare.__dict__["_parameters"] = {} if is_experts else dict(module._parameters)
    bare.__dict__["_buffers"] = dict(module._buffers)
    children = {
        name: child and _bare(child, experts, made) for name, child in module._modules.items()
    }
    guarded = type(module._modules) is not dict
    bare.__dict__["_modules"] = _Guarded(children) if guarded else children
    return bare


class _Guarded(dict[str, Any]):
    """Stands for a guarded dictionary: a compiler's caches tell it from a plain one."""


class _Pickler(pickle.Pickler):
    """Writes of a tensor its properties, and its identity: weights may be tied."""

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return None
        storage = obj.untyped_storage().nbytes() // obj.element_size()
        layout = tuple(obj.shape), obj.stride(), obj.storage_offset(), storage
        is_parameter = isinstance(obj, nn.Parameter)
        return id(obj), layout, obj.dtype, str(obj.device), is_parameter, obj.requires_grad


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._made: dict[int, Tensor] = {}

    def persistent_load(self, pid: Any) -> Tensor:
        key, (shape, stride, offset, storage), dtype, device, is_parameter, requires_grad = pid
        if key not in self._made:
            memory = torch.empty(storage, dtype=dtype, device=device)
            tensor = memory.as_strided(shape, stride, offset)
            if (shape, stride, offset) == (tuple(memory.shape), memory.stride(), 0):
                tensor = memory
            if is_parameter:
                tensor = nn.Parameter(tensor, requires_grad=requires_grad)
            self._made[key] = tensor
        return self._made[key]
