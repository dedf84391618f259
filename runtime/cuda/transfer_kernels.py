"""Kernels that bring experts over the link, reading pinned host memory themselves.

A record comes in chunks, packed (see `packing`) or as it is. `bring` is what every user of the link
calls for one chunk: the experts kernel for what a layer misses, `fetch` for what a prefetch chose,
`land` for records that the copy engine brought into device memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

LANDINGS = 4
"""Most records that `land` takes."""


@triton.jit
def weights(low, code, base):
    """bfloat16 bits from sign and mantissa, and the code of the exponent."""
    low = low.to(tl.int32)
    bits = ((low & 0x80) << 8) | ((base + code) << 7) | (low & 0x7F)
    return tl.where(code > 0, bits, (low & 0x80) << 8).to(tl.int16)


@triton.jit
def bring(
    slots, slot, low, high, base, patch_starts, patch_units, patch_bits, expert, source, chunk,
    UNITS: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One chunk of `expert` into `slot`, from record number `source` of low (and high).

    slots: int16 [S, UNITS]. low: uint8 [*, UNITS], or int16 where not PACKED.
    """
    HALF: tl.constexpr = CHUNK // 2
    entry = tl.arange(0, HALF)
    to = slots + slot * UNITS + chunk * CHUNK
    start = low + source * UNITS + chunk * CHUNK
    first = tl.load(start + entry)
    second = tl.load(start + HALF + entry)
    if PACKED:
        codes = tl.load(high + source * (UNITS // 2) + chunk * HALF + entry).to(tl.int32)
        at = expert * (UNITS // CHUNK) + chunk
        window = tl.load(base + at)
        tl.store(to + entry, weights(first, codes & 15, window))
        tl.store(to + HALF + entry, weights(second, codes >> 4, window))
        patch = tl.load(patch_starts + at)
        end = tl.load(patch_starts + at + 1)
        if patch < end:
            tl.debug_barrier()  # patches overwrite what other threads just stored
            while patch < end:
                index = patch + tl.arange(0, 32)
                unit = tl.load(patch_units + index, mask=index < end, other=0)
                bits = tl.load(patch_bits + index, mask=index < end, other=0)
                tl.store(to + unit, bits, mask=index < end)
                patch += 32
    else:
        tl.store(to + entry, first)
        tl.store(to + HALF + entry, second)


@triton.jit(do_not_specialize_on_alignment=["prefetched", "prefetched_slot", "stop"])
def fetch(
    slots, low, high, base, patch_starts, patch_units, patch_bits,
    prefetched, prefetched_slot, stop, step, progress,
    UNITS: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Copy the chosen expert (int32 [1], -1 for none) until its layer is planned: stop == step.

    Program p copies chunks p, p + PROGRAMS, ... and leaves their number in progress[p].
    """
    expert = tl.load(prefetched).to(tl.int64)
    if expert < 0:
        return
    slot = tl.load(prefetched_slot).to(tl.int64)
    now = tl.load(step)
    chunk = tl.program_id(0)
    done = 0
    go_on = (chunk < UNITS // CHUNK) & (tl.load(stop, volatile=True) != now)
    while go_on:
        bring(
            slots, slot, low, high, base, patch_starts, patch_units, patch_bits, expert, expert,
            chunk, UNITS, PACKED, CHUNK,
        )  # fmt: skip
        done += 1
        chunk += PROGRAMS
        go_on = (chunk < UNITS // CHUNK) & (tl.load(stop, volatile=True) != now)
    tl.store(progress + tl.program_id(0), done)


@triton.jit(
    do_not_specialize=[
        "expert_0", "expert_1", "expert_2", "expert_3", "slot_0", "slot_1", "slot_2", "slot_3",
    ]
)  # fmt: skip
def land(
    slots, low, high, base, patch_starts, patch_units, patch_bits,
    expert_0, expert_1, expert_2, expert_3, slot_0, slot_1, slot_2, slot_3,
    UNITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Unpack the first records that lie at `low` and `high` on the device.

    Grid (chunks, records): the experts' numbers and slots are arguments, which need no copy.
    """
    source = tl.program_id(1)
    expert = tl.where(source < 2, tl.where(source == 0, expert_0, expert_1),
                      tl.where(source == 2, expert_2, expert_3))  # fmt: skip
    slot = tl.where(source < 2, tl.where(source == 0, slot_0, slot_1),
                    tl.where(source == 2, slot_2, slot_3))  # fmt: skip
    bring(
        slots, slot.to(tl.int64), low, high, base, patch_starts, patch_units, patch_bits,
        expert.to(tl.int64), source.to(tl.int64), tl.program_id(0), UNITS, True, CHUNK,
    )  # fmt: skip
