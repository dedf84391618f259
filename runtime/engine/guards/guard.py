"""The guards of one model: what would change, copy or save it is exact or refused at the call."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from routing.layers import MoELayer
from runtime.engine.attachment import Attachment
from runtime.engine.guards.contents import Contents
from runtime.engine.guards.placeholder import REMEDY, Placeholder
from runtime.weights.store import ExpertStore

Placeholders = dict[str, Placeholder]
"""By path in the model."""


def guard(
    model: nn.Module, layers: list[MoELayer], store: ExpertStore, changes: Attachment
) -> None:
    """Put guards on an offloaded model whose other weights are where they will stay.

    They outlive `Attachment.release`: a closed model has no experts either. None refers to the
    model strongly, so that a closed model is freed when it is dropped.
    """
    device = next(model.parameters()).device
    placeholders: Placeholders = {}
    for index, layer in enumerate(layers):
        placeholders |= _hide(layer, index, store, device, changes)
        block, _, name = layer.name.rpartition(".")
        _fix(model.get_submodule(block), "_modules", {}, block, {name}, changes)
        _put(changes, layer.module, "__getstate__", _refuse_to_copy)
        _put(changes, layer.module, "_replicate_for_data_parallel", _refuse_to_copy)
        text = ", ".join(filter(None, [layer.module.extra_repr(), _summary(layer)]))
        _put(changes, layer.module, "extra_repr", partial(str, text))
    dtype = next(iter(placeholders.values())).dtype
    sample = torch.empty(0, dtype=dtype, device=device)
    for name, inside in _by_module(placeholders).items():
        module = model.get_submodule(name)
        _guard_conversions(module, sample, changes)
        hook = partial(_refuse_to_load, prefix_length=len(name) + bool(name), experts=inside)
        changes.add(module.register_load_state_dict_pre_hook(hook).remove)
    for name in ("__getstate__", "_replicate_for_data_parallel"):
        _put(changes, model, name, _refuse_to_copy)
    for name in ("save_pretrained", "push_to_hub"):
        _put(changes, model, name, partial(_save, weakref.ref(model), name))


def _put(changes: Attachment, owner: Any, name: str, value: Any) -> None:
    changes.put(owner, name, value, holds=False)


def _by_module(placeholders: Placeholders) -> dict[str, Placeholders]:
    """The placeholders within each module that has any, by its path."""
    inside: defaultdict[str, Placeholders] = defaultdict(dict)
    for path, placeholder in placeholders.items():
        names = path.split(".")
        for length in range(len(names)):
            inside[".".join(names[:length])][path] = placeholder
    return inside


def _summary(layer: MoELayer) -> str:
    return f"{layer.num_experts} experts, offloaded"


# ---------------------------------------------------------------------- experts


def _hide(
    layer: MoELayer, index: int, store: ExpertStore, device: torch.device, changes: Attachment
) -> Placeholders:
    """List the parameters of a layer's experts, but let nobody replace them."""
    placeholders = {
        f"{layer.name}.{path}": Placeholder(f"{layer.name}.{path}", spec.shape, spec.dtype, device)
        for path, spec in store.whole_specs(index).items()
    }
    held: defaultdict[str, Placeholders] = defaultdict(dict)
    for path, placeholder in placeholders.items():
        holder, _, name = path.rpartition(".")
        held[holder][name] = placeholder
    for name, module in layer.module.named_modules(prefix=layer.name):
        _fix(module, "_modules", {}, name, None, changes)
        if name in held:
            _fix(module, "_parameters", held[name], name, held[name], changes)
    return placeholders


def _fix(
    module: nn.Module,
    kind: str,
    values: dict[str, Any],
    owner: str,
    fixed: Collection[str] | None,
    changes: Attachment,
) -> None:
    """Let nobody replace what `module` holds as `kind`: those names, or all."""
    before = module.__dict__[kind]
    module.__dict__[kind] = Contents(before | values, owner, fixed)
    changes.add(partial(_unfix, module, kind, dict.fromkeys(values)))


def _unfix(module: nn.Module, kind: str, values: dict[str, Any]) -> None:
    module.__dict__[kind] = dict(module.__dict__[kind]) | values


# ---------------------------------------------------------------------- dtype and device


def _guard_conversions(module: nn.Module, sample: Tensor, changes: Attachment) -> None:
    _put(changes, module, "_apply", partial(_convert, weakref.ref(module), sample))
    _put(changes, module, "to_empty", _refuse_to_empty)


def _convert(
    of: weakref.ref[nn.Module],
    sample: Tensor,
    change: Callable[[Tensor], Tensor],
    recurse: bool = True,
) -> nn.Module:
    """`Module._apply`, for changes that leave dtype and device as they are."""
    module = of()
    assert module is not None
    after = change(sample)
    if (after.dtype, after.device) != (sample.dtype, sample.device):
        raise ValueError(
            f"an offloaded model stays {sample.dtype} on {sample.device}, as its experts are, and "
            f"cannot become {after.dtype} on {after.device}; load it with dtype= and device=, or "
            f"{REMEDY}"
        )
    held = module.__dict__["_parameters"]
    others = {name: one for name, one in held.items() if not isinstance(one, Placeholder)}
    module.__dict__["_parameters"] = others
    try:
        type(module)._apply(module, change, recurse)
    finally:
        held.update(module.__dict__["_parameters"])
        module.__dict__["_parameters"] = held
    return module


def _refuse_to_empty(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(f"an offloaded model cannot be emptied: its experts would stay; {REMEDY}")


# ---------------------------------------------------------------------- copies, files


def _refuse_to_copy(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        "an offloaded model can be neither copied nor pickled: a copy would have no experts; "
        f"{REMEDY}, or load the copy by itself"
    )


def _save(of: weakref.ref[nn.Module], method: str, *args: Any, **kwargs: Any) -> Any:
    """`save_pretrained` and `push_to_hub`, where they write only an adapter."""
    model: Any = of()
    if getattr(model, "_hf_peft_config_loaded", False):
        return getattr(type(model), method)(model, *args, **kwargs)
    raise ValueError(
        "an offloaded model would be saved without its experts; save model.expertflow.detach()"
    )


def _refuse_to_load(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any,
    prefix_length: int, experts: Placeholders,
) -> None:  # fmt: skip
    """Raise ValueError, before anything is loaded, for a state dict with values of experts."""
    for path, placeholder in experts.items():
        value = state_dict.get(prefix + path[prefix_length:])
        if value is not None and getattr(value, "origin", None) is not placeholder.origin:
            raise ValueError(
                f"the state dict has values for {path}, and the experts of an offloaded model "
                f"cannot be replaced; {REMEDY}, or load_state_dict() without experts, strict=False"
            )
