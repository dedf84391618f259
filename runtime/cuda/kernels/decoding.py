"""Codes to weights in registers: device functions of the kernels.

Eight neighbours of a row are decoded together, from an int32 (codes of 4 bits) or an int64 (8 bits).
Bits of a code go where a float16 or a float32 has them, so that a weight costs a few instructions:

    e2m1, e4m3    sign and magnitude in a float16, which is the value times 2^-14 or 2^-8
    4-bit int     in the mantissa of a float32 at bit b: the value plus 2^(23 - b)

All of it is exact, as is every product with a power of two; what rounds is said where it does.
"""

from __future__ import annotations

import triton
import triton.language as tl

MXFP4, FP8, INT4, NVFP4 = (tl.constexpr(kind) for kind in range(4))
F32, BF16, F16, E8M0, E4M3 = (tl.constexpr(number) for number in range(5))
NOT_A_NUMBER = tl.constexpr(float("nan"))


@triton.jit
def pair(eight, number: tl.constexpr, KIND: tl.constexpr):
    """Two weights as float16 in an int32: `number` and the one behind it by 4 (by 2 for FP8)."""
    if KIND == FP8:
        half = (eight >> 32).to(tl.int32) if number >= 4 else eight.to(tl.int32)
        if number % 2 == 0:
            return ((half << 8) & -2147450880) | ((half << 7) & 0x3F803F80)
        return half & -2147450880 | ((half >> 1) & 0x3F803F80)
    magnitude = eight << (9 - 4 * number) if number < 3 else eight >> 3
    return ((eight << (12 - 4 * number)) & -2147450880) | (magnitude & 0x0E000E00)


@triton.jit
def float_code(eight, number: tl.constexpr, KIND: tl.constexpr):
    """Code `number` of eight, divided by `lift`, in float32."""
    SPAN: tl.constexpr = 2 if KIND == FP8 else 4
    FIRST: tl.constexpr = number // (2 * SPAN) * 2 * SPAN + number % SPAN
    word = pair(eight, FIRST, KIND)
    if number != FIRST:
        word = word >> 16
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def int_code(eight, number: tl.constexpr, zero):
    """Code `number` of eight of 4 bits, less `zero`, in float32."""
    BIT: tl.constexpr = 4 * number if number < 5 else 4 * number - 12
    word = eight if number < 5 else eight >> 12
    lifted = (word & (15 << BIT)) | ((150 - BIT) << 23)
    return lifted.to(tl.float32, bitcast=True) - (zero + 2.0 ** (23 - BIT))


@triton.jit
def e4m3(code):
    """An e4m3 number, int32, in float32."""
    bits = ((code << 8) & 0x8000) | ((code << 7) & 0x3F80)
    value = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((code & 0x7F) == 0x7F, NOT_A_NUMBER, value)


@triton.jit
def e8m0(code):
    """A power of two from its exponent, int32, in float32; 255 is infinite."""
    return tl.maximum(code << 23, 0x00400000).to(tl.float32, bitcast=True)


@triton.jit
def with_nan(scale, eight):
    """The scale of eight e4m3 codes; NaN if one of the codes is."""
    low, high = eight.to(tl.int32), (eight >> 32).to(tl.int32)
    full = ((low & 0x7F7F7F7F) + 0x01010101) | ((high & 0x7F7F7F7F) + 0x01010101)
    return tl.where((full & -2139062144) != 0, NOT_A_NUMBER, scale)


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """A float32 rounded to another format, in float32."""
    return value.to(DTYPE).to(tl.float32)


@triton.jit
def weight(
    eight, number: tl.constexpr, scale, zero, KIND: tl.constexpr, SCALE: tl.constexpr,
    DTYPE: tl.constexpr, LIFTED: tl.constexpr,
):  # fmt: skip
    """Weight `number` of eight, rounded as its encoding says and then to DTYPE, in float32.

    LIFTED: the scale was multiplied by `lift` before, and by `with_nan` where codes can be NaN; it
    must be less than 2^113.
    """
    if KIND == INT4:
        value = int_code(eight, number, zero) * scale
        if SCALE == BF16:
            value = rounded(value, tl.bfloat16)
        if SCALE == F16:
            value = rounded(value, tl.float16)
    else:
        value = float_code(eight, number, KIND)
        if not LIFTED:
            value *= lift(KIND)
            if KIND == FP8:
                value = tl.where(tl.abs(value) == 480.0, NOT_A_NUMBER, value)
        value *= scale
    return rounded(value, DTYPE)


@triton.constexpr_function
def lift(kind: int) -> float:
    """The factor that `float_code` leaves to its caller."""
    return 1.0 if kind == INT4 else 2.0**8 if kind == FP8 else 2.0**14
