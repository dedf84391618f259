"""One token's experts in the written-down order of sums, in numpy: what C must equal by bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.cpu.shape import PATCH_LANES, ExpertShape, Steps, SumOrder
from runtime.weights.encodings.encoding import CODES, SCALES
from runtime.weights.encodings.number_formats import unpack_e2m1

F = np.float32
Array = np.ndarray[Any, np.dtype[Any]]
BY_PAIRS = (0, 4, 1, 5, 2, 6, 3, 7)
BY_WORDS = (0, 2, 1, 3, 4, 6, 5, 7)
ORDERS = {"packed": BY_WORDS, "fp8-block": BY_WORDS, "int4-group": BY_PAIRS, "nvfp4": BY_PAIRS}


def quietly(function: Any) -> Any:
    """The function without numpy's warnings of overflows and NaN."""
    return np.errstate(all="ignore")(function)


@quietly
def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c rounded once to float32, for float32 a, b and c.

    The product is exact in float64; the sum is rounded there to odd, so that a second rounding
    takes nothing else for a tie.
    """
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    addend = np.asarray(c, np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    away = (error > 0) == (total > 0)
    odd = np.where(inexact, bits + np.where(away, 1, -1), bits)
    return odd.view(np.float64).astype(F)


def folded(lanes_NL: Array, steps: Steps) -> Array:
    """The sum over lanes, [N], step by step."""
    sums = {lane: lanes_NL[:, lane] for lane in range(lanes_NL.shape[1])}
    for step in steps:
        stride, count, stride2, count2 = step if len(step) == 4 else (*step, 0, 1)
        in_chain = [k * stride + k2 * stride2 for k2 in range(count2) for k in range(count)]
        for lane in [lane for lane in sums if not lane // stride % count]:
            if stride2 and lane // stride2 % count2:
                continue
            for k in in_chain[1:]:
                sums[lane] = sums[lane] + sums.pop(lane + k)
    assert list(sums) == [0]
    return sums[0]


@quietly
def row_sums(weights_NK: Array, x_K: Array, order: SumOrder, eight: tuple[int, ...]) -> Array:
    """Products of rows with a vector, [N]: lanes take one column, or some in the order `eight`."""
    each = len(eight)
    num_rows, width = weights_NK.shape
    tiles = -(-width // order.columns)
    pad = tiles * order.columns - width
    weights = np.pad(weights_NK, ((0, 0), (0, pad))).reshape(num_rows, tiles, -1, each)
    x = np.pad(x_K, (0, pad)).reshape(tiles, -1, each)
    lanes_NL = np.zeros((num_rows, order.columns // each), F)
    for tile in range(tiles):
        for element in eight:
            lanes_NL = fma(weights[:, tile, :, element], x[tile, :, element], lanes_NL)
    return folded(lanes_NL, order.steps)


@quietly
def mxfp4_sums(parts: Mapping[str, Tensor], x_K: Array, order: SumOrder) -> Array:
    """Products of rows of mxfp4: eight at a time are summed, and then multiplied by their scale."""
    codes_NK = unpack_e2m1(parts[CODES], torch.float32).numpy() * np.exp2(F(-126))
    exponents = parts[SCALES].int().numpy()
    halves = np.where(exponents == 0, F(2.0**-128), np.exp2((exponents - 128).astype(F)))
    num_rows, width = codes_NK.shape
    tiles = -(-width // order.columns)
    pad = tiles * order.columns - width
    codes = np.pad(codes_NK, ((0, 0), (0, pad))).reshape(num_rows, tiles, -1, 8)
    scales = np.pad(halves.repeat(4, 1), ((0, 0), (0, pad // 8))).reshape(num_rows, tiles, -1)
    x = np.pad(x_K * F(2.0**64), (0, pad)).reshape(tiles, -1, 8)
    lanes_NL = np.zeros((num_rows, order.columns // 8), F)
    for tile in range(tiles):
        products = np.zeros_like(lanes_NL)
        for element in BY_PAIRS:
            products = fma(codes[:, tile, :, element], x[tile, :, element], products)
        lanes_NL = fma(products * F(2.0**63), scales[:, tile], lanes_NL)
    return folded(lanes_NL, order.steps)


@quietly
def packed_sums(
    units_NK: Array, x_K: Array, order: SumOrder, base: int, is_patch_NK: Array, first_unit: int,
    programs: Array, chunk: int, patches: int,
) -> Array:  # fmt: skip
    """Products of rows of packed weights, bfloat16 as uint16.

    first_unit: of the matrix in its block; programs: the first row that the GPU's program of each
    row looks at.
    """
    weights_NK = np.where(is_patch_NK, F(0), floats(units_NK))
    scaled_NK = (weights_NK.astype(np.float64) * 2.0**-base).astype(F)
    x_scaled = x_K * F(2.0 ** (base - 64))
    sums_N = row_sums(scaled_NK, x_scaled, order, BY_WORDS)
    patched_N = np.zeros_like(sums_N)
    width = units_NK.shape[1]
    for row in np.flatnonzero(is_patch_NK.any(1)).tolist():
        first_entry = (first_unit + int(programs[row]) * width) // chunk * patches
        lanes: dict[int, Array] = {}
        for column in np.flatnonzero(is_patch_NK[row]).tolist():
            unit = row * width + column
            start = unit // chunk * chunk
            before = int(is_patch_NK.reshape(-1)[start:unit].sum())
            entry = (first_unit + start) // chunk * patches + 1 + before - first_entry
            of_tile = lanes.setdefault(entry // PATCH_LANES, np.zeros((1, PATCH_LANES), F))
            of_tile[0, entry % PATCH_LANES] = floats(units_NK[row, column]) * x_K[column]
        for tile in sorted(lanes):
            patched_N[row] += folded(lanes[tile], order.patch_steps)[0]
    return fma(sums_N, np.full_like(sums_N, 2.0**64), patched_N)


def floats(bits: Array) -> Array:
    """Bfloat16, given as uint16, in float32."""
    return (bits.astype(np.uint32) << 16).view(F)


@quietly
def to_bfloat16(x: Array) -> Array:
    """Rounded to the nearest bfloat16, ties to even, in float32."""
    return torch.from_numpy(x).bfloat16().float().numpy()


@quietly
def exponential(x: Array) -> Array:
    t = np.where(x < F(-87), F(-87), x)
    t = np.where(t > F(88), F(88), t)
    lift = np.full_like(t, 12582912.0)
    n = fma(t, np.full_like(t, F(1.44269504)), lift) - lift
    r = fma(n, np.full_like(t, F(-0.693359375)), t)
    r = fma(n, np.full_like(t, F(2.12194440e-4)), r)
    p = np.full_like(t, F(1.9875691500e-4))
    for constant in (
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    ):
        p = fma(p, r, np.full_like(t, F(constant)))
    p = fma(p, r * r, r) + F(1)
    power = (np.nan_to_num(n).astype(np.int32) + 127) << 23
    return np.where(np.isnan(x), x, p * power.view(F))


@quietly
def activated(
    gate: Array, up: Array, activation: str, bounds: tuple[float, float] | None = None
) -> Array:
    def sigmoid(z: Array) -> Array:
        return F(1) / (F(1) + exponential(-z))

    if activation == "clamped_swiglu":
        gate = np.fmin(gate, F(7))
        up = np.fmin(np.fmax(up, F(-7)), F(7)) + F(1)
        return (gate * sigmoid(gate * F(1.702))) * up
    if activation == "bounded_silu":
        assert bounds is not None
        gate = np.fmin(gate, F(bounds[0]))
        up = np.fmin(np.fmax(up, F(-bounds[1])), F(bounds[1]))
    if activation in ("silu", "bounded_silu"):
        return (gate * sigmoid(gate)) * up
    if activation == "gelu_tanh":
        inner = F(1.5957691216057308) * fma((F(0.044715) * gate) * gate, gate, gate)
        return (gate * sigmoid(inner)) * up
    return np.fmax(gate, F(0)) * up


def expert_output(shape: ExpertShape, gate_up: Any, down: Any, x_H: Tensor) -> Array:
    """One expert's output for one token, float32 [H].

    gate_up, down: functions of a vector, float32: a matrix's products with it and biases.
    """
    both = gate_up(x_H.float().numpy())
    gate, up = (both[::2], both[1::2]) if shape.alternating else np.split(both, 2)
    return down(to_bfloat16(activated(gate, up, shape.activation, shape.bounds)))
