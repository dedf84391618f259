"""Kernels that bring experts over the link, reading pinned host memory themselves.

An expert block crosses in chunks. Every user of the link calls `bring` for one chunk: the experts
kernel for what a layer misses, `fetch` for what a prefetch chose.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bring(slots, slot, blocks, expert, chunk, STORED: tl.constexpr, CHUNK: tl.constexpr):
    """One chunk of `expert` into `slot`. slots, blocks: int16 [*, STORED]."""
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    tl.store(slots + slot * STORED + at, tl.load(blocks + expert * STORED + at))


@triton.jit
def fetch_missing(
    slots, blocks, experts_U, slots_U, order_U, counts, prefetched, progress, program,
    STORED: tl.constexpr, CHUNK: tl.constexpr, FETCHERS: tl.constexpr, PREFETCHERS: tl.constexpr,
):  # fmt: skip
    """Program `program` of FETCHERS brings its share of the chunks that the plan misses."""
    num_chunks: tl.constexpr = STORED // CHUNK
    left = tl.load(counts + 1) * num_chunks
    at = program
    while at < left:
        index = tl.load(order_U + at // num_chunks)
        expert = tl.load(experts_U + index).to(tl.int64)
        slot = tl.load(slots_U + index).to(tl.int64)
        chunk = at % num_chunks
        wanted = True
        if PREFETCHERS > 0:
            arrived = chunk // PREFETCHERS < tl.load(progress + chunk % PREFETCHERS)
            wanted = (expert != tl.load(prefetched)) | (arrived == 0)
        if wanted:
            bring(slots, slot, blocks, expert, chunk, STORED, CHUNK)
        at += FETCHERS


@triton.jit
def stopped(stop):
    """The number of the step whose prefetch was stopped last, as memory has it now.

    An atomic operation, since one thread does it for the whole program: with a load, some warps
    would see the stop before others, and leave a chunk half copied that counts as done.
    """
    return tl.atomic_add(stop, 0, sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=["prefetched", "prefetched_slot", "stop"])
def fetch(
    slots, blocks, prefetched, prefetched_slot, stop, step, progress,
    STORED: tl.constexpr, CHUNK: tl.constexpr, PROGRAMS: tl.constexpr,
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
    while (chunk < STORED // CHUNK) & (stopped(stop) != now):
        bring(slots, slot, blocks, expert, chunk, STORED, CHUNK)
        done += 1
        chunk += PROGRAMS
    tl.store(progress + tl.program_id(0), done)
