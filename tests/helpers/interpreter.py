"""Triton's interpreter, mended: it multiplies bfloat16 matrices by the bits, as if integers, cuts
numbers off to bfloat16 instead of rounding them, and prepares the language anew, which takes
milliseconds, for every call of a function within a kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from triton import language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

DOT: Any = InterpreterBuilder.create_dot
CAST: Any = InterpreterBuilder.cast_impl
LAUNCH: Any = interpreter.GridExecutor.__call__
PREPARED: set[Any] = set()
"""Functions that the language was prepared for in this launch."""


def _dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return DOT(self, _in_float32(a), _in_float32(b), *rest)


def _in_float32(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def _cast(self: Any, source: Any, to: Any) -> Any:
    if (source.dtype.scalar, to.scalar) == (tl.bfloat16, tl.float32):
        return _in_float32(source)
    if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
        return CAST(self, source, to)
    bits = source.data.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    nan = bits >> 16 | 0x40
    data = np.where(np.isnan(source.data), nan, rounded).astype(np.uint16)
    return TensorHandle(data, tl.bfloat16)


def _launch(self: Any, *args: Any, **kwargs: Any) -> None:
    PREPARED.clear()
    LAUNCH(self, *args, **kwargs)


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    if self.fn not in PREPARED:
        interpreter._patch_lang(self.fn)
        PREPARED.add(self.fn)
    return self.rewrite()(*args, **kwargs)


def mend() -> None:
    """From now on products and conversions are right, and calls fast."""
    interpreter.GridExecutor.__call__ = _launch
    interpreter.InterpretedFunction.__call__ = _call
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.cast_impl = _cast
