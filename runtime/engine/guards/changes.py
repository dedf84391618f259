"""Changes that captured steps would not notice: they repeat the kernels of the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import nn

from routing.layers import TOP_K_NAMES
from runtime.engine.guards.placeholder import Placeholder

OWNERS = ("runtime", "transformers")
"""Packages whose hooks and forwards are known to do nothing in a captured step."""
SETTINGS = ("training", *TOP_K_NAMES)
"""Attributes of modules that decide which kernels run."""

Function = TypeVar("Function", bound=Callable[..., Any])


def capturable(function: Function) -> Function:
    """Declare that this hook or forward of a module runs as kernels alone, so it can be captured.

    What its Python code does beside launching them happens only once, when a step is captured.
    """
    function.__dict__["is_capturable"] = True
    return function


def uncapturable(model: nn.Module) -> str | None:
    """Why the Python code of a model must run in every step; None where kernels are all of it."""
    if "prepare_inputs_for_generation" in model.__dict__:
        return "its inputs are prepared by another model (a learned prompt)"
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            return "it has an adapter, which can be switched between steps"
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if not all(map(_is_known, hooks)):
            return f"{name or 'the model'} has a forward hook"
        if not _is_known(module.__dict__.get("forward")):
            return f"{name or 'the model'} has a forward of its own"
    return None


def fingerprint(model: Any) -> Hashable:
    """Equal as long as captured steps read the weights, and run the modules, that there are."""
    modules = tuple(
        (id(module), tuple(module.__dict__.get(name) for name in SETTINGS))
        for module in model.modules()
    )
    weights = tuple(
        (parameter.data_ptr(), parameter.dtype)
        for parameter in model.parameters()
        if not isinstance(parameter, Placeholder)
    )
    return modules, weights, getattr(model.config, "_attn_implementation", None)


def _is_known(function: Any) -> bool:
    function = getattr(function, "func", function)  # of a partial
    home = getattr(function, "__module__", None) or ""
    declared = getattr(function, "is_capturable", False)
    return function is None or declared or home.partition(".")[0] in OWNERS
