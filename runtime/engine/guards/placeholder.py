"""A placeholder of an expert parameter: it has a shape and a dtype, but no values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

REMEDY = "call model.expertflow.detach() first"


class Placeholder(Tensor):
    """A parameter for lists of parameters: counted, named and typed, never read or written.

    An operation on it raises ValueError. `detach` gives another placeholder of the same origin, so
    that a state dict has all keys.
    """

    origin: object
    """Equal in placeholders of one parameter of one offloaded model."""
    path: str
    """The name of the parameter."""
    _is_param: bool

    @staticmethod
    def __new__(
        cls, path: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Placeholder:
        made: Placeholder = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.path, made.origin, made._is_param = path, object(), True
        return made

    def __init__(self, *_: Any) -> None:
        """Made by `__new__`."""

    def twin(self) -> Self:
        """Another placeholder of the same parameter."""
        twin = type(self)(self.path, tuple(self.shape), self.dtype, self.device)
        twin.origin = self.origin
        return twin

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in COPIES:
            return args[0].twin()
        if func in READABLE or (func in FREEZES and not _first(args, kwargs)):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is Tensor.copy_ and _is_own_copy(*args[:2]):
            return args[0]
        if func in FREEZES:
            raise ValueError(f"{args[0].path} is offloaded and read-only: it takes no gradient")
        refuse(next((one.path for one in _flat(args, kwargs) if isinstance(one, cls)), "an expert"))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        refuse("an expert")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse(self.path)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        refuse(self.path)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<{self.path}: {tuple(self.shape)} {self.dtype}, offloaded>"


def refuse(path: str) -> NoReturn:
    """Raise the ValueError for a use of an expert's values."""
    raise ValueError(f"{path} is offloaded: its values can be neither read nor changed; {REMEDY}")


def _first(args: Any, kwargs: dict[str, Any]) -> Any:
    """The argument of a setter; True where it is left out, as for `requires_grad_`."""
    return next(iter((*args[1:], *kwargs.values())), True)


def _is_own_copy(target: Tensor, source: Any) -> bool:
    """Whether a copy would change nothing: both are the same parameter."""
    ours, theirs = getattr(target, "origin", None), getattr(source, "origin", None)
    return ours is not None and ours is theirs


def _flat(args: Any, kwargs: Any) -> list[Any]:
    """The arguments, and what lists among them hold."""
    flat: list[Any] = []
    for one in (*args, *kwargs.values()):
        flat += one if isinstance(one, list | tuple) else [one]
    return flat


def _getters(*names: str) -> set[Any]:
    return {getattr(Tensor, name).__get__ for name in names if hasattr(Tensor, name)}


COPIES = {Tensor.detach, *_getters("data")}
"""Operations that give the parameter itself."""
FREEZES = {
    Tensor.requires_grad_,
    Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
    Tensor.grad.__set__,  # type: ignore[union-attr]
}
"""Operations that may only say what is so already: it takes no gradient."""
READABLE = {
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride),
    *(Tensor.element_size, Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex),
    *(Tensor.__len__, Tensor.__hash__, Tensor.get_device),
    *_getters("shape", "ndim", "dtype", "itemsize", "nbytes", "layout", "device", "names"),
    *_getters("requires_grad", "grad", "grad_fn", "is_leaf", "_backward_hooks", "_version"),
    *_getters("is_cpu", "is_cuda", "is_meta", "is_mps", "is_xpu"),
    *_getters("is_nested", "is_quantized", "is_sparse"),
}
"""What is known without the values."""
