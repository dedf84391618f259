"""A default number format of one thread; `torch.set_default_dtype` changes it for all."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

MAKERS = (
    *(torch.empty, torch.empty_strided, torch.zeros, torch.ones, torch.full, torch.eye),
    *(torch.rand, torch.randn, torch.normal, torch.arange, torch.linspace, torch.logspace),
    *(torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor),
)
"""Functions that make a tensor of no other."""
SAID = ("to", "float", "double", "half", "bfloat16", "type", "type_as", "view")
"""Methods whose arguments say the format of their result."""


class DefaultDtype(TorchFunctionMode):
    """A context in which floating-point tensors are made in `dtype` unless a call says another.

    What it covers: functions that make a tensor, and those that make a floating-point tensor of
    integers, such as a division.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or result.dtype != torch.get_default_dtype():
            return result
        given = list(_with_dtype((*args, *kwargs.values())))
        says = kwargs.get("dtype") is not None or getattr(func, "__name__", "") in SAID
        if says or isinstance(result, torch.nn.Parameter) or not all(map(_is_whole, given)):
            return result
        if given:
            return result.to(self._dtype)
        return func(*args, **kwargs | {"dtype": self._dtype}) if func in MAKERS else result


def default_dtype(dtype: torch.dtype, module: str) -> AbstractContextManager[Any]:
    """A context for building a model whose classes are in `module`.

    Where these ask for torch's default (NLLB-MoE's positions do), it is set for all threads.
    """
    if "get_default_dtype" in inspect.getsource(sys.modules[module]):
        return _of_all_threads(dtype)
    return DefaultDtype(dtype)


@contextmanager
def _of_all_threads(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _with_dtype(values: Iterable[Any]) -> Iterator[Any]:
    """The tensors and arrays among arguments, those in lists included."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _with_dtype(value)
        elif hasattr(value, "dtype"):
            yield value


def _is_whole(value: Any) -> bool:
    """True for a tensor of whole numbers or truth values."""
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
