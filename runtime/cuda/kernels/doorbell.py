"""The CPU's share of a layer, from inside a captured step: an order, a bell, and the answer.

The plan writes its order into pinned memory and rings; the CPU's threads (`runtime.cpu`) compute
meanwhile; `collect` waits for their answer in front of the down projection. Nothing waits on the
host thread.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def publish(word, value):
    """Store an int32 where the host sees it, after all that this program stored before."""
    if INTERPRETED:
        tl.store(word, value)
    else:
        tl.debug_barrier()
        tl.inline_asm_elementwise(
            "fence.acq_rel.sys; st.relaxed.sys.global.s32 [$1], $2; mov.s32 $0, $2;", "=r,l,r",
            [word, value], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def observe(word):
    """An int32 as the host stored it last; what it stored before is seen from here on."""
    if INTERPRETED:
        value = tl.load(word)
    else:
        value = tl.inline_asm_elementwise(
            "ld.acquire.sys.global.s32 $0, [$1];", "=r,l", [word], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip
    return value


@triton.jit
def nanoseconds():
    """The device's clock."""
    now = tl.zeros([], tl.int64)
    if not INTERPRETED:
        now = tl.extra.cuda.globaltimer()
    return now


@triton.jit
def ring(
    doorbell, bell, x, layer, experts_E, away_E, num_away, ORDER: tl.constexpr, X: tl.constexpr,
    H: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Order the experts of `away_E` for x [H] and ring.

    doorbell: int32 in pinned memory, the bell first, the order at ORDER and x at X. bell: int32 [1]
    on the device, the value that was rung last.
    """
    at_H = tl.arange(0, BLOCK_H)
    to = (doorbell + X).to(tl.pointer_type(x.dtype.element_ty), bitcast=True)
    tl.store(to + at_H, tl.load(x + at_H, mask=at_H < H), mask=at_H < H)
    rank_E = tl.cumsum(away_E.to(tl.int32), 0) - 1
    tl.store(doorbell + ORDER, layer)
    tl.store(doorbell + ORDER + 1, num_away)
    tl.store(doorbell + ORDER + 2 + rank_E, experts_E, mask=away_E)
    value = tl.load(bell) + 1
    tl.store(bell, value)
    publish(doorbell, value)


@triton.jit
def least_worth(candidates_E, worth_E, count, experts_E):
    """The `count` candidates of least value."""
    chosen_E = experts_E < 0
    i = 0
    while i < count:
        left_E = tl.where(candidates_E & (chosen_E == 0), worth_E, float("inf"))
        chosen_E = chosen_E | (experts_E == tl.argmin(left_E, axis=0))
        i += 1
    return chosen_E


@triton.jit
def leave_to_cpu(
    missed_E, num_away, next_E, rank_E, experts_E, x, doorbell, bell, away_U, layer,
    ORDER: tl.constexpr, X: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Order some of the missed experts from the CPU; their places (of `rank_E`) go to `away_U`."""
    away_E = least_worth(missed_E, next_E, num_away, experts_E)
    if num_away > 0:
        ring(doorbell, bell, x, layer, experts_E, away_E, num_away, ORDER, X, H, BLOCK_H)
    tl.store(away_U + tl.cumsum(away_E.to(tl.int32), 0) - 1, rank_E, mask=away_E)
    return away_E


@triton.jit(do_not_specialize_on_alignment=["away_U", "counts"])
def collect(
    doorbell, bell, answers, away_U, counts, ANSWER: tl.constexpr, DONE: tl.constexpr,
    H: tl.constexpr, BLOCK: tl.constexpr, PATIENCE: tl.constexpr,
):  # fmt: skip
    """Wait for the CPU's rows, and bring them to their experts' places in `answers` [U, H].

    They are NaN where none has come after PATIENCE nanoseconds. Grid (blocks of H,).
    """
    num_away = tl.load(counts + 2)
    if num_away == 0:
        return
    value = tl.load(bell)
    begin = nanoseconds()
    done = observe(doorbell + DONE)
    while (done != value) & (nanoseconds() - begin < PATIENCE):
        done = observe(doorbell + DONE)
        if INTERPRETED:
            begin -= PATIENCE // 4_000  # so many looks
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = (doorbell + ANSWER).to(tl.pointer_type(tl.float32), bitcast=True)
    i = 0
    while i < num_away:
        row = tl.load(rows + i * H + column, mask=column < H, other=0.0, volatile=True)
        row = tl.where(done == value, row, float("nan"))
        tl.store(answers + tl.load(away_U + i) * H + column, row, mask=column < H)
        i += 1
