"""Codes to weights in registers: device functions of the kernels.

Eight neighbours of a row, a *word*, are decoded together, two at a time: those of `first_code` and
the ones behind them. A word is an int32 (codes of 4 bits) or an int64 (8 bits). Bits of a code go
where a number format has them, so that a weight costs a few instructions:

    e2m1        sign and magnitude in a bfloat16: the value times 2^-126
    e4m3        sign and magnitude in a float16: the value times 2^-8
    4-bit int   in the mantissa of a float32 at bit b: the value plus 2^(23 - b)

All of it is exact, as is every product with a power of two; what rounds is said where it does.
"""

from __future__ import annotations

import triton
import triton.language as tl

MXFP4, FP8, INT4, NVFP4 = (tl.constexpr(kind) for kind in range(4))
F32, BF16, F16, E8M0, E4M3 = (tl.constexpr(number) for number in range(5))
BFLOAT16, FLOAT16 = tl.constexpr(tl.bfloat16), tl.constexpr(tl.float16)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.constexpr_function
def behind(kind: int) -> int:
    """How far the second code of a pair is behind the first."""
    return 2 if kind == FP8.value else 4


@triton.constexpr_function
def first_code(pair: int, kind: int) -> int:
    """The first code of pair 0 to 3."""
    return pair if kind != FP8.value or pair < 2 else pair + 2


@triton.jit
def spread_e2m1(word, pair: tl.constexpr):
    """A pair in two bfloat16, both times 2^-126."""
    halves = (word >> 8 if pair >= 2 else word) & (0x000F000F if pair % 2 == 0 else 0x00F000F0)
    spread = halves * (0x1040 if pair % 2 == 0 else 0x0104)  # the sign and the rest to their places
    return spread & -2118024768  # 0x81C081C0


@triton.jit
def e2m1_pair(word, pair: tl.constexpr):
    """A pair in float32, both times 2^-126."""
    both = spread_e2m1(word, pair)
    return (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_pair(word, pair: tl.constexpr):
    """A pair in float32, both times 2^-8."""
    half = (word >> 32).to(tl.int32) if pair >= 2 else word.to(tl.int32)
    sign = (half << 8 if pair % 2 == 0 else half) & -2147450880
    both = sign | ((half << 7 if pair % 2 == 0 else half >> 1) & 0x3F803F80)
    first = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    second = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return first, second


@triton.jit
def int_code(word, number: tl.constexpr, zero):
    """Code `number` of a word of 4-bit integers, less `zero`, in float32."""
    BIT: tl.constexpr = 4 * number if number < 5 else 4 * number - 12
    lifted = ((word if number < 5 else word >> 12) & (15 << BIT)) | ((150 - BIT) << 23)
    return lifted.to(tl.float32, bitcast=True) - (zero + 2.0 ** (23 - BIT))


@triton.jit
def e4m3(code):
    """An e4m3 number, int32, in float32."""
    bits = ((code << 8) & 0x8000) | ((code << 7) & 0x3F80)
    value = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def e8m0(code):
    """A power of two from its exponent, int32, in float32; 255 is infinite."""
    return tl.maximum(code << 23, 0x00400000).to(tl.float32, bitcast=True)


@triton.jit
def half_e8m0(code):
    """Half a power of two from its exponent, int32, in float32: finite for 255 as well."""
    return tl.maximum((code - 1) << 23, 0x00200000 << tl.minimum(code, 1)).to(
        tl.float32, bitcast=True
    )


@triton.jit
def divided(x, by):
    """A correctly rounded quotient, for divisors of 2^-100 to 2^100.

    These are the steps of a GPU's own division, whose check for others would be a call a scale.
    """
    if INTERPRETED:
        quotient = tl.div_rn(x, by)
    else:
        inverse = 1.0 / by
        inverse = tl.fma(inverse, tl.fma(-by, inverse, 1.0), inverse)
        quotient = x * inverse
        quotient = tl.fma(inverse, tl.fma(-by, quotient, x), quotient)
        quotient = tl.fma(inverse, tl.fma(-by, quotient, x), quotient)
    return quotient


@triton.jit
def with_nan(scale, word):
    """The scale of eight e4m3 codes; NaN if one of the codes is."""
    low, high = word.to(tl.int32), (word >> 32).to(tl.int32)
    full = ((low & 0x7F7F7F7F) + 0x01010101) | ((high & 0x7F7F7F7F) + 0x01010101)
    return tl.where((full & -2139062144) != 0, float("nan"), scale)


@triton.jit
def rounded(first, second, DTYPE: tl.constexpr):
    """Two float32 rounded to another format, in float32."""
    if not INTERPRETED and DTYPE == BFLOAT16:
        both = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [first, second], tl.int32, True, 1
        )
        first = (both << 16).to(tl.float32, bitcast=True)
        second = (both & -65536).to(tl.float32, bitcast=True)
    else:
        first, second = first.to(DTYPE).to(tl.float32), second.to(DTYPE).to(tl.float32)
    return first, second


@triton.jit
def codes_of(word, pair: tl.constexpr, zero, KIND: tl.constexpr):
    """The codes of a pair, in float32: less the zero; e2m1 times 2^-126, e4m3 times 2^-8."""
    if KIND == INT4:
        first, second = int_code(word, pair, zero), int_code(word, pair + 4, zero)
    elif KIND == FP8:
        first, second = e4m3_pair(word, pair)
    else:
        first, second = e2m1_pair(word, pair)
    return first, second


@triton.jit
def weights_of(
    word, pair: tl.constexpr, scale, zero, KIND: tl.constexpr, PRODUCT: tl.constexpr,
    DTYPE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The weights of a pair, in float32: rounded to the number format PRODUCT, then to DTYPE.

    scale, zero: of `coded.scales_of`. EXACT: e4m3 codes may be NaN, and their scales beyond 2^119;
    otherwise scales come from `for_products`.
    """
    first, second = codes_of(word, pair, zero, KIND)
    if KIND == NVFP4:
        first, second = first * 2.0**126, second * 2.0**126
    if KIND == MXFP4:  # half of whose scales are given
        first, second = first * 2.0**127, second * 2.0**127
    if KIND == FP8 and EXACT:
        first, second = nan_at_480(first * 256.0), nan_at_480(second * 256.0)
    first, second = first * scale, second * scale
    if PRODUCT == BF16 and DTYPE != BFLOAT16:
        first, second = rounded(first, second, tl.bfloat16)
    if PRODUCT == F16 and DTYPE != FLOAT16:
        first, second = rounded(first, second, tl.float16)
    return rounded(first, second, DTYPE)


@triton.jit
def nan_at_480(value):
    """A number in e4m3, where 480 has no place: its code is NaN."""
    return tl.where(tl.abs(value) == 480.0, float("nan"), value)


@triton.jit
def for_products(scale, word, KIND: tl.constexpr):
    """The scale of words for products: of e4m3 codes, NaN if one of the word is."""
    if KIND == FP8:
        scale = with_nan(scale * 256.0, word)
    return scale
