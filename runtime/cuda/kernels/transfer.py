"""Kernels that bring experts over the link, reading pinned host memory themselves.

An expert block crosses in chunks. Every user of the link calls `bring` for one chunk: the experts
kernel for what a layer misses, `fetch` for the *moves*, experts that were chosen to be sent ahead.

The moves are a list in the order of their worth, int32 [FIELDS, DEPTH]:

    KEY       layer * E + expert, -1 for none
    SLOT      its slot, which it has from its choice on
    FIRST     the first chunk to bring: 0 for a new one, more for one that was stopped before
    EVICTED   the key that had the slot, -1 where it was free
    ITS_REST, ITS_SENT    what `rest` and `sent` said of that key

The programs of `fetch` draw chunks from one counter, the cursor, over all moves. The next plan ends
them by raising it (`settle`), and learns from it how many chunks are under way or there; before the
layer's experts run, `fetch` has ended, and they are there. So each slot has two counts:

    rest    chunks that are still to come; 0 where the expert is whole
    sent    chunks that came ahead of a use that has not been yet
"""

from __future__ import annotations

import triton
import triton.language as tl

FREE = tl.constexpr(-1)
KEY, SLOT, FIRST, EVICTED, ITS_REST, ITS_SENT = (tl.constexpr(field) for field in range(6))
FIELDS = 6
ENDED = tl.constexpr(1 << 30)
"""The cursor of moves that have to end."""
USED, LATE, LACKED, BROUGHT, BEGUN, OVERWRITTEN, EVICTED_UNUSED = (
    tl.constexpr(column) for column in range(7)
)
"""Columns of the ledger's row: experts sent ahead that were used, whole and in part; chunks that
these lacked; chunks brought; experts begun; chunks that were given up for other moves, and for what
a layer missed."""
COLUMNS = 8
"""Width of the row."""


@triton.jit
def bring(slots, slot, blocks, expert, chunk, STORED: tl.constexpr, CHUNK: tl.constexpr):
    """One chunk of `expert` into `slot`. slots, blocks: int16 [*, STORED]."""
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    tl.store(slots + slot * STORED + at, tl.load(blocks + expert * STORED + at))


@triton.jit
def fetch_missing(
    slots, blocks, experts_U, slots_U, order_U, first_U, counts, program, STORED: tl.constexpr,
    CHUNK: tl.constexpr, FETCHERS: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """Program `program` of FETCHERS brings its share of the chunks that the plan misses.

    PREFETCH: of an expert, those from first_U on.
    """
    num_chunks: tl.constexpr = STORED // CHUNK
    num_fetched = tl.load(counts + 1)
    chunk = program
    turn = 0
    while turn < num_fetched:
        index = tl.load(order_U + turn)
        expert = tl.load(experts_U + index).to(tl.int64)
        slot = tl.load(slots_U + index).to(tl.int64)
        if PREFETCH:
            chunk += tl.load(first_U + index)
        while chunk < num_chunks:
            bring(slots, slot, blocks, expert, chunk, STORED, CHUNK)
            chunk += FETCHERS
        chunk -= num_chunks
        turn += 1


@triton.jit
def next_turn(cursor):
    """The number of the chunk that this program brings next; ENDED or more: none.

    An atomic operation, which one thread does for the whole program: its warps never disagree, and
    a chunk that was drawn is brought.
    """
    return tl.atomic_add(cursor, 1, sem="relaxed")


@triton.jit
def fetch(
    slots, addresses, moves, cursor, E: tl.constexpr, STORED: tl.constexpr, CHUNK: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Bring the moves, chunk by chunk, until they are all there or `settle` ends them.

    addresses: int64 [L], where each layer's blocks are in pinned memory.
    """
    num_chunks: tl.constexpr = STORED // CHUNK
    turn = next_turn(cursor)
    begin = 0
    move = 0
    while move < DEPTH:
        key = tl.load(moves + KEY * DEPTH + move)
        if key >= 0:
            slot = tl.load(moves + SLOT * DEPTH + move).to(tl.int64)
            first = tl.load(moves + FIRST * DEPTH + move)
            address = tl.multiple_of(tl.load(addresses + key // E), 16)
            blocks = tl.multiple_of(address.to(tl.pointer_type(tl.int16)), 16)
            end = begin + num_chunks - first
            while turn < end:
                expert = (key % E).to(tl.int64)
                bring(slots, slot, blocks, expert, first + turn - begin, STORED, CHUNK)
                turn = next_turn(cursor)
            begin = end
        move += 1


@triton.jit
def settle(
    moves, cursor, slot_of_key, key_of_slot, rest, sent, moved, DEPTH: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
):  # fmt: skip
    """End the moves, and enter what they bring. What has not begun is undone: nothing was written
    over, so that the slot's last owner has it again. moved: int32 [COLUMNS].
    """
    handed = tl.atomic_xchg(cursor, ENDED, sem="relaxed")
    move_D = tl.arange(0, DEPTH)
    key_D, slot_D = tl.load(moves + move_D), tl.load(moves + SLOT * DEPTH + move_D)
    first_D = tl.load(moves + FIRST * DEPTH + move_D)
    evicted_D = tl.load(moves + EVICTED * DEPTH + move_D)
    its_rest_D = tl.load(moves + ITS_REST * DEPTH + move_D)
    its_sent_D = tl.load(moves + ITS_SENT * DEPTH + move_D)
    tl.debug_barrier()  # all threads have read them
    is_move_D = key_D >= 0
    lacks_D = tl.where(is_move_D, NUM_CHUNKS - first_D, 0)
    before_DD = tl.where(move_D[None, :] < move_D[:, None], lacks_D[None, :], 0)
    brought_D = tl.minimum(tl.maximum(handed - tl.sum(before_DD, axis=1), 0), lacks_D)
    has_D = first_D + brought_D
    is_undone_D = is_move_D & (has_D == 0)
    tl.store(rest + slot_D, tl.where(is_undone_D, its_rest_D, NUM_CHUNKS - has_D), mask=is_move_D)
    tl.store(sent + slot_D, tl.where(is_undone_D, its_sent_D, has_D), mask=is_move_D)
    tl.store(slot_of_key + key_D, FREE, mask=is_undone_D)
    tl.store(slot_of_key + evicted_D, slot_D, mask=is_undone_D & (evicted_D >= 0))
    tl.store(key_of_slot + slot_D, evicted_D, mask=is_undone_D)
    tl.store(moves + move_D, FREE)
    is_begun_D = is_move_D & (first_D == 0) & (brought_D > 0)
    tl.store(moved + BROUGHT, tl.sum(brought_D, 0))
    tl.store(moved + BEGUN, tl.sum(is_begun_D.to(tl.int32), 0))
    tl.store(moved + OVERWRITTEN, tl.sum(tl.where(is_begun_D, its_sent_D, 0), 0))
    tl.debug_barrier()  # other threads read the tables


@triton.jit(do_not_specialize_on_alignment=["moved"])
def halt(
    moves, cursor, slot_of_key, key_of_slot, rest, sent, moved, DEPTH: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
):  # fmt: skip
    """`settle` where no plan follows: at the end of a step."""
    settle(moves, cursor, slot_of_key, key_of_slot, rest, sent, moved, DEPTH, NUM_CHUNKS)


@triton.jit
def take_parts(used_E, slots_E, rest, sent, moved):
    """The layer uses what was sent ahead: its slots are ordinary ones from here on.

    Returns the chunks that each expert still lacks.
    """
    held_E = used_E & (slots_E != FREE)
    rest_E = tl.load(rest + slots_E, mask=held_E, other=0)
    sent_E = tl.load(sent + slots_E, mask=held_E, other=0)
    tl.debug_barrier()  # all threads have read them
    tl.store(rest + slots_E, 0, mask=held_E)
    tl.store(sent + slots_E, 0, mask=held_E)
    is_late_E = rest_E > 0
    tl.store(moved + USED, tl.sum(((sent_E > 0) & (rest_E == 0)).to(tl.int32), 0))
    tl.store(moved + LATE, tl.sum(is_late_E.to(tl.int32), 0))
    tl.store(moved + LACKED, tl.sum(rest_E, 0))
    return rest_E


@triton.jit
def give_up_parts(taken_S, index_S, rest, sent, moved):
    """Others get these slots: what was sent ahead to them was in vain."""
    wasted = tl.sum(tl.load(sent + index_S, mask=taken_S, other=0), 0)
    tl.debug_barrier()  # all threads have read them
    tl.store(rest + index_S, 0, mask=taken_S)
    tl.store(sent + index_S, 0, mask=taken_S)
    tl.store(moved + EVICTED_UNUSED, wasted)
