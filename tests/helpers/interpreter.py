"""Triton's interpreter, mended: it multiplies bfloat16 matrices by the bits, as if integers."""

from __future__ import annotations

from typing import Any

import numpy as np
from triton import language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

DOT: Any = InterpreterBuilder.create_dot


def _dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return DOT(self, _in_float32(a), _in_float32(b), *rest)


def _in_float32(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def mend() -> None:
    """From now on the products are right."""
    InterpreterBuilder.create_dot = _dot
