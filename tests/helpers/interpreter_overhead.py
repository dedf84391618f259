"""What Triton's interpreter does again for every operation, done once: most of its time.

Types of blocks are interned, types of numpy looked up, operands that agree left alone, numbers kept
as the blocks that they become. The language stays prepared after the first launch. Checks of
overflow, whose outcome is dropped, are not computed. Results keep every bit.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
from triton import language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

core: Any = tl.core
INIT_BLOCK: Any = core.block_type.__init__
EQUAL: Any = core.dtype.__eq__
NUMPY: Any = interpreter._get_np_dtype
PATCH: Any = interpreter._patch_lang
CHECK: Any = TritonSemantic.binary_op_type_checking_impl
BROADCAST: Any = TritonSemantic.broadcast_impl_value
TO_TENSOR: Any = TritonSemantic.to_tensor
UNWRAP: Any = core._unwrap_if_constexpr

BLOCKS: dict[Any, Any] = {}
"""Types of blocks by element and shape."""
NUMPY_TYPES: dict[str, Any] = {}
NUMBERS: dict[Any, Any] = {}
"""By the tensor that a number meets: the scalar type that the tensor becomes, or None where it
stays, and the number's type and content."""
MOST_KEPT = 1 << 12
"""Elements of a number's content."""
BROADCASTS: dict[tuple[str, str], Any] = {}
"""By the types of both operands: the types that they become, None for one that stays."""
PREPARED: list[Any] = []
"""The scope in which the language is prepared, which never ends."""


def _block_type(cls: Any, element_ty: Any, shape: Any) -> Any:
    sizes = tuple(s.value if isinstance(s, core.constexpr) else s for s in shape)
    key = element_ty.name, getattr(element_ty, "address_space", 0), sizes
    if (made := BLOCKS.get(key)) is None:
        made = object.__new__(cls)
        INIT_BLOCK(made, element_ty, shape)
        BLOCKS[key] = made
    return made


def _tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    try:
        self.shape, self.numel = type.of_tensor
    except AttributeError:
        sizes = type.shape if type.is_block() else ()
        shape = core.tuple([core.constexpr(size) for size in sizes])
        type.of_tensor = self.shape, self.numel = shape, core.constexpr(prod(sizes))


def _equal(self: Any, other: Any) -> Any:
    return self is other or EQUAL(self, other)


def _numpy_type(type: Any) -> Any:
    if (found := NUMPY_TYPES.get(type.name)) is None:
        found = NUMPY_TYPES[type.name] = NUMPY(type)
    return found


def _check(self: Any, lhs: Any, rhs: Any, *options: bool) -> Any:
    """Both operands as tensors of the types that they are computed in."""
    if not isinstance(lhs, core.tensor):
        return CHECK(self, lhs, rhs, *options)
    if isinstance(rhs, core.tensor):
        is_same = lhs.type is rhs.type and len(options) < 4 and not lhs.dtype.is_ptr()
        return (lhs, rhs) if is_same else CHECK(self, lhs, rhs, *options)
    if type(rhs) not in (bool, int, float):
        return CHECK(self, lhs, rhs, *options)
    key = lhs.type.name, type(rhs), rhs, options
    if (known := NUMBERS.get(key)) is None:
        given, (lhs, rhs) = lhs, CHECK(self, lhs, rhs, *options)
        if rhs.handle.data.size <= MOST_KEPT:
            cast = None if lhs is given else lhs.type.scalar
            NUMBERS[key] = cast, rhs.type, rhs.handle.data
        return lhs, rhs
    cast, of_number, data = known
    number = core.tensor(TensorHandle(data, of_number.scalar), of_number)
    return lhs if cast is None else self.cast(lhs, cast), number


def _broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
    """Both operands in one shape."""
    if lhs.type is rhs.type:
        return lhs, rhs
    key = lhs.type.name, rhs.type.name
    if (known := BROADCASTS.get(key)) is None:
        both = BROADCAST(self, lhs, rhs)
        known = (
            None if new is old else new.type for new, old in zip(both, (lhs, rhs), strict=True)
        )
        BROADCASTS[key] = tuple(known)
        return both
    return _expanded(lhs, known[0]), _expanded(rhs, known[1])


def _expanded(given: Any, type: Any) -> Any:
    if type is None:
        return given
    data, dtype, sizes = given.handle.data, given.handle.dtype.scalar, tuple(type.shape.values)
    if given.type.is_block():
        data = np.broadcast_to(data, sizes)
    else:
        data = np.full(sizes, data, dtype=_numpy_type(dtype))
    return core.tensor(TensorHandle(data, dtype), type)


def _unwrap(value: Any) -> Any:
    kind = type(value)
    if kind is core.constexpr:
        return value.value
    return value if kind is core.tensor or kind is int else UNWRAP(value)


def _to_tensor(self: Any, value: Any, check_type: bool = True) -> Any:
    return value if type(value) is core.tensor else TO_TENSOR(self, value, check_type)


def _patch_lang(_: Any) -> Any:
    """Once for all launches: as if a kernel saw both of the language's modules."""
    if not PREPARED:
        scope = PATCH(SimpleNamespace(__globals__={"tl": tl, "core": core}))
        PREPARED.append(scope)
        for owner, name, _ in scope._changes:
            named = getattr(getattr(owner, name), "__kwdefaults__", None) or {}
            if builtin := named.get("member"):
                setattr(owner, name, _interpreted(getattr(builtin, "__wrapped__", builtin)))
    return SimpleNamespace(restore=lambda: None)


def _interpreted(builtin: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return builtin(*args, **kwargs)

    return call


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A function within a kernel."""
    return self.rewrite()(*args, **kwargs)


def spare() -> None:
    """From now on kernels are interpreted without repetition."""
    core.block_type.__new__ = staticmethod(_block_type)
    core.block_type.__init__ = lambda *_: None
    core.dtype.__eq__ = _equal
    core._unwrap_if_constexpr = _unwrap
    core.tensor.__init__ = _tensor
    interpreter._get_np_dtype = _numpy_type
    interpreter._patch_lang = _patch_lang
    interpreter.InterpretedFunction.__call__ = _call
    TritonSemantic.binary_op_type_checking_impl = _check
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None
    TritonSemantic.broadcast_impl_value = _broadcast
    TritonSemantic.to_tensor = _to_tensor
