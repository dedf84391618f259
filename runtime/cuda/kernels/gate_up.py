"""The gate and up projections of a layer's experts, run out of slots.

`gate_up` computes act(x W_gate^T) * (x W_up^T) of the plan's experts for every token of the batch;
`down.down` sums its products with W_down over the experts of each token. An expert that several
tokens want is read once for all.

`gate_up` runs twice. Its first programs in the first run fetch the missing experts from pinned host
memory into their slots, as many as keep the link busy; the others run the residents in their
shadow. The second run is for the experts that were fetched. Where every expert of the model has a
slot, one run does all, and of a single token it plans as well (`gate_up_of_one`). What was resident
changes neither a weight's bits nor the order of any sum: outputs are bit-identical.

Shapes: x [B, H], gate_up [2W, H] (gate rows, then up rows; or alternating).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from runtime.cuda.kernels.coded.products import coded_gate_and_up, coded_rows_of
from runtime.cuda.kernels.packed import packed_rows_of
from runtime.cuda.kernels.plan import touch
from runtime.cuda.kernels.transfer import fetch_missing
from runtime.cuda.kernels.unpacked import record_elements, rows_of

SILU, GELU, GELU_TANH, RELU, CLAMPED_SWIGLU, RELU2, BOUNDED_SILU, SOFTCAPPED_SILU = map(
    tl.constexpr, range(8)
)
SWIGLU_ALPHA, SWIGLU_LIMIT = tl.constexpr(1.702), tl.constexpr(7.0)


class Activation(NamedTuple):
    """What comes between the products; a compile-time constant of kernels."""

    kind: int
    gate: float = 0.0
    """Bound of the gate, where the kind has any."""
    up: float = 0.0


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)) in float32, in operations that a CPU has too: `runtime.cpu` does the same
    ones, and the bits agree.

    exp(t) is 2^n times a polynomial in r = t - n ln 2 (the coefficients of Cephes' expf).
    """
    t = tl.minimum(tl.maximum(-z, -87.0), 88.0)
    n = tl.fma(t, 1.44269504, 12582912.0) - 12582912.0  # rounded to an integer
    r = tl.fma(n, 2.12194440e-4, tl.fma(n, -0.693359375, t))
    p = tl.fma(r, 1.9875691500e-4, 1.3981999507e-3)
    p = tl.fma(p, r, 8.3334519073e-3)
    p = tl.fma(p, r, 4.1665795894e-2)
    p = tl.fma(p, r, 1.6666665459e-1)
    p = tl.fma(p, r, 5.0000001201e-1)
    p = tl.fma(p, r * r, r) + 1.0
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(z == z, tl.div_rn(1.0, 1.0 + p * power), z)


@triton.jit
def softcapped(x, CAP: tl.constexpr):
    """CAP tanh(x / CAP) in float32 (for small numbers the coefficients of Cephes' tanhf)."""
    y = tl.div_rn(x, CAP)
    z = y * y
    p = tl.fma(z, -5.70498872745e-3, 2.06390887954e-2)
    p = tl.fma(p, z, -5.37397155531e-2)
    p = tl.fma(p, z, 1.33314422036e-1)
    p = tl.fma(p, z, -3.33332819422e-1)
    small = tl.fma(p * z, y, y)
    return CAP * tl.where(tl.abs(y) < 0.625, small, tl.fma(sigmoid(2.0 * y), 2.0, -1.0))


@triton.jit
def activate(gate, up, ACT: tl.constexpr):
    """The gated activation, in float32."""
    if ACT.kind == BOUNDED_SILU:
        gate = tl.minimum(gate, ACT.gate)
        up = tl.minimum(tl.maximum(up, -ACT.up), ACT.up)
        return gate * sigmoid(gate) * up
    if ACT.kind == SOFTCAPPED_SILU:
        return softcapped(gate, ACT.gate) * sigmoid(gate) * softcapped(up, ACT.up)
    if ACT.kind == CLAMPED_SWIGLU:
        gate = tl.minimum(gate, SWIGLU_LIMIT)
        up = tl.minimum(tl.maximum(up, -SWIGLU_LIMIT), SWIGLU_LIMIT) + 1.0
        return gate * sigmoid(gate * SWIGLU_ALPHA) * up
    if ACT.kind == SILU:
        return gate * sigmoid(gate) * up
    if ACT.kind == GELU:
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    if ACT.kind == GELU_TANH:
        inner = 1.5957691216057308 * tl.fma(0.044715 * gate * gate, gate, gate)
        return gate * sigmoid(inner) * up
    if ACT.kind == RELU2:
        return tl.maximum(gate, 0.0) * tl.maximum(gate, 0.0)
    return tl.maximum(gate, 0.0) * up


@triton.jit
def packed_gate_and_up(
    x, block, first, gate_row_I, up_row_I, mask_I, num_tokens, UP: tl.constexpr,
    MATRICES: tl.constexpr, PATCHES: tl.constexpr, CHUNK: tl.constexpr, H: tl.constexpr,
    W: tl.constexpr, ALTERNATING: tl.constexpr, M: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """X times BLOCK_I rows each of the gate and the up projection, from `first` on: [M, I]."""
    SPAN: tl.constexpr = 2 * BLOCK_I if ALTERNATING else BLOCK_I
    UP_SPAN: tl.constexpr = SPAN if ALTERNATING or W % BLOCK_I == 0 else SPAN + 1
    first_gate = 2 * first if ALTERNATING else first
    first_up = 2 * first if ALTERNATING else W + first
    gate_MI = packed_rows_of(
        x, block, first_gate, gate_row_I, mask_I, num_tokens, UP, H, MATRICES, CHUNK, PATCHES,
        SPAN, M, BLOCK_I, BLOCK_H,
    )  # fmt: skip
    up_MI = packed_rows_of(
        x, block, first_up, up_row_I, mask_I, num_tokens, UP, H, MATRICES, CHUNK, PATCHES,
        UP_SPAN, M, BLOCK_I, BLOCK_H,
    )  # fmt: skip
    return gate_MI, up_MI


@triton.jit
def rows_of_matrix(
    x, block, stored, first, row_I, mask_I, num_tokens, UP: tl.constexpr, MATRICES: tl.constexpr,
    PATCHES: tl.constexpr, CODE: tl.constexpr, CHUNK: tl.constexpr, H: tl.constexpr,
    M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """X times BLOCK_I rows of a matrix without a gate, from `first` on: [M, I]."""
    if PATCHES > 0:
        return packed_rows_of(
            x, stored, first, row_I, mask_I, num_tokens, UP, H, MATRICES, CHUNK, PATCHES, BLOCK_I,
            M, BLOCK_I, BLOCK_H,
        )  # fmt: skip
    if CODE is not None:
        return coded_rows_of(x, stored, row_I, mask_I, num_tokens, H, CODE, M, BLOCK_I, BLOCK_H)
    return rows_of(x, block + UP, row_I, mask_I, num_tokens, H, M, BLOCK_I, BLOCK_H)


@triton.jit
def run_tile(
    x, h, slots, units, at, slot, first, num_tokens, STORED: tl.constexpr, UP: tl.constexpr,
    UP_BIAS: tl.constexpr, MATRICES: tl.constexpr, PATCHES: tl.constexpr, CODE: tl.constexpr,
    CHUNK: tl.constexpr, H: tl.constexpr, W: tl.constexpr, ACT: tl.constexpr,
    ALTERNATING: tl.constexpr, HAS_BIAS: tl.constexpr, M: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """H [at, B, I] of the expert in `slot`, BLOCK_I columns from `first` on."""
    block = slots + slot * record_elements(slots, STORED)
    row_I = first + tl.arange(0, BLOCK_I)
    mask_I = row_I < W
    gate_row_I = 2 * row_I if ALTERNATING else row_I
    up_row_I = 2 * row_I + 1 if ALTERNATING else W + row_I
    if ACT.kind == RELU2:  # no gate: the first product is the only one
        gate_MI = rows_of_matrix(
            x, block, units + slot * STORED, first, row_I, mask_I, num_tokens, UP, MATRICES,
            PATCHES, CODE, CHUNK, H, M, BLOCK_I, BLOCK_H,
        )  # fmt: skip
        up_MI = gate_MI
    elif PATCHES > 0:
        gate_MI, up_MI = packed_gate_and_up(
            x, units + slot * STORED, first, gate_row_I, up_row_I, mask_I, num_tokens, UP, MATRICES,
            PATCHES, CHUNK, H, W, ALTERNATING, M, BLOCK_I, BLOCK_H,
        )  # fmt: skip
    elif CODE is not None:
        gate_MI, up_MI = coded_gate_and_up(
            x, units + slot * STORED, first, num_tokens, H, W, CODE, ALTERNATING, M, BLOCK_I,
            BLOCK_H,
        )  # fmt: skip
    else:
        gate_MI = rows_of(x, block + UP, gate_row_I, mask_I, num_tokens, H, M, BLOCK_I, BLOCK_H)
        up_MI = rows_of(x, block + UP, up_row_I, mask_I, num_tokens, H, M, BLOCK_I, BLOCK_H)
    if HAS_BIAS:
        gate_bias = tl.load(block + UP_BIAS + gate_row_I, mask=mask_I, other=0.0)
        up_bias = tl.load(block + UP_BIAS + up_row_I, mask=mask_I, other=0.0)
        gate_MI += gate_bias.to(tl.float32)[None, :]
        up_MI += up_bias.to(tl.float32)[None, :]
    token_M = tl.arange(0, M)
    to_MI = (at * num_tokens + token_M)[:, None] * W + row_I[None, :]
    h_MI = activate(gate_MI, up_MI, ACT).to(h.dtype.element_ty)
    tl.store(h + to_MI, h_MI, mask=(token_M < num_tokens)[:, None] & mask_I[None, :])


@triton.jit(
    do_not_specialize=["num_tokens"],
    do_not_specialize_on_alignment=["experts_U", "slots_U", "order_U", "first_U", "counts"],
)
def gate_up(
    x, h, slots, units, blocks, experts_U, slots_U, order_U, first_U, counts,
    num_tokens, STORED: tl.constexpr, UP: tl.constexpr, UP_BIAS: tl.constexpr,
    MATRICES: tl.constexpr, PATCHES: tl.constexpr, CODE: tl.constexpr, CHUNK: tl.constexpr,
    FETCHERS: tl.constexpr, PREFETCH: tl.constexpr, RESIDENT: tl.constexpr, SHARE: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, ACT: tl.constexpr, ALTERNATING: tl.constexpr,
    HAS_BIAS: tl.constexpr, M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """H [U, B, W] of the residents while the missing are fetched; FETCHERS = 0: of the fetched.

    slots: the arena in the experts' dtype, units: the same memory as int16; both [S, *], expert
    blocks of STORED int16 each, with the projections at elements UP (of the unpacked block) and
    UP_BIAS. PATCHES: 0 where blocks are not packed. CODE: of a matrix in codes, or None.
    PREFETCH: slots may hold experts of which a part has come. RESIDENT: nothing can be missing.
    SHARE: the last experts of the order are the CPU's.
    Grid (FETCHERS + blocks of W * most distinct experts,).
    """
    program = tl.program_id(0)
    if program < FETCHERS:
        fetch_missing(
            units, blocks, experts_U, slots_U, order_U, first_U, counts, program, STORED, CHUNK,
            FETCHERS, PREFETCH,
        )  # fmt: skip
        return
    num_blocks: tl.constexpr = (W + BLOCK_I - 1) // BLOCK_I
    turn = (program - FETCHERS) // num_blocks
    num_used = tl.load(counts)
    num_missed = tl.load(counts + 1)
    if SHARE:
        num_used -= tl.load(counts + 2)
    if FETCHERS > 0 or RESIDENT:
        turn += num_missed
        if turn >= num_used:
            return
    else:
        if turn >= num_missed:
            return
    at = tl.load(order_U + turn)
    slot = tl.load(slots_U + at).to(tl.int64)
    first = (program - FETCHERS) % num_blocks * BLOCK_I
    run_tile(
        x, h, slots, units, at, slot, first, num_tokens, STORED, UP, UP_BIAS, MATRICES, PATCHES,
        CODE, CHUNK, H, W, ACT, ALTERNATING, HAS_BIAS, M, BLOCK_I, BLOCK_H,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["layer"],
    do_not_specialize_on_alignment=["experts_U", "slots_U", "counts", "routes"],
)
def gate_up_of_one(
    x, h, slots, units, ids, experts_U, slots_U, counts, slot_of_key, values, before, after, clock,
    routes, layer, STORED: tl.constexpr, UP: tl.constexpr, UP_BIAS: tl.constexpr,
    MATRICES: tl.constexpr, PATCHES: tl.constexpr, CODE: tl.constexpr, CHUNK: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, RULE: tl.constexpr, BLOCK_K: tl.constexpr, H: tl.constexpr,
    W: tl.constexpr, ACT: tl.constexpr, ALTERNATING: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Plan and `gate_up` of a single token, every expert of the model being resident.

    Each program finds its expert and slot by itself; the first leaves them for `down`, and counts
    as `plan.plan` does. Grid (blocks of W * K,).
    """
    program = tl.program_id(0)
    num_blocks: tl.constexpr = (W + BLOCK_I - 1) // BLOCK_I
    turn = program // num_blocks
    k_K = tl.arange(0, BLOCK_K)
    ids_K = tl.load(ids + k_K, mask=k_K < K, other=-1).to(tl.int32)
    again_KK = (ids_K[:, None] == ids_K[None, :]) & (k_K[None, :] < k_K[:, None])
    is_first_K = tl.max(again_KK.to(tl.int32), axis=1) == 0
    used_K = (ids_K >= 0) & (ids_K < E) & is_first_K
    below_KK = (ids_K[None, :] < ids_K[:, None]) & used_K[None, :]
    rank_K = tl.sum(below_KK.to(tl.int32), axis=1)
    num_used = tl.sum(used_K.to(tl.int32), 0)
    if program == 0:
        slots_K = tl.load(slot_of_key + layer * E + ids_K, mask=used_K, other=0)
        tl.store(routes + k_K, ids_K, mask=k_K < K)
        tl.store(experts_U + rank_K, ids_K, mask=used_K)
        tl.store(slots_U + rank_K, slots_K, mask=used_K)
        tl.store(counts, num_used)
        tl.store(counts + 1, 0)
        touch(ids_K, used_K, rank_K, num_used, values, before, after, clock, layer, E, RULE)
    if turn >= num_used:
        return
    expert = tl.sum(tl.where(used_K & (rank_K == turn), ids_K, 0), 0)
    slot = tl.load(slot_of_key + layer * E + expert).to(tl.int64)
    run_tile(
        x, h, slots, units, turn, slot, program % num_blocks * BLOCK_I, 1, STORED, UP, UP_BIAS,
        MATRICES, PATCHES, CODE, CHUNK, H, W, ACT, ALTERNATING, HAS_BIAS, 1, BLOCK_I, BLOCK_H,
    )  # fmt: skip
