"""Experts streamed into slots: the host gives the order, the copy engine and the compute overlap.

Runs every forward pass that is not a captured step: prefill, and all steps of models, layouts and
generation modes that have no kernels. The needed experts of a layer cross the link once, residents
are computed first, and each missing one as soon as it has arrived. While a long prompt's layer
computes, the experts that the next layer's router will want are already on their way.

    copy engine     | missing of layer l | likely of layer l + 1 |
    compute stream  | residents of l | arrived of l ... | attention of l + 1 | ...

Experts in codes stay so in their slots where kernels run them. For all others they cross the link
in codes too, and are decoded into their slots on arrival, by the stream that copied them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from runtime.cache.expert_cache import FREE, ExpertCache, Lookup
from runtime.cache.policy import Policy
from runtime.cache.stats import Stats
from runtime.cuda.memory.expert_block import ExpertBlock
from runtime.cuda.memory.kernel_layout import KernelLayout, as_model
from runtime.cuda.memory.pinned_experts import PinnedExperts, decode_blocks
from runtime.sizing.units import format_bytes

WORKSPACE_BYTES = 80 << 20
"""For records that are unpacked or decoded together, at least one."""
WORKSPACE_RECORDS = 16
"""Most of them."""
PROBES = 16
"""Records that are sent to measure the link."""
GROUP = 4
"""Missing experts that run together: enough for one launch to pay, few enough not to wait."""


class Ahead(NamedTuple):
    """What the layer after the one that runs will want, as far as that is known."""

    layer: int
    wanted_E: Tensor
    """int64 [E], for how many tokens."""


class StreamingPool:
    """Slots for records on a GPU, filled on a stream of their own.

    block: of the host tier. layout: how the records are oriented, where the kernels can run the
    experts; else None, and slots hold plain weights.
    """

    def __init__(
        self,
        block: ExpertBlock,
        num_slots: int,
        device: torch.device,
        host: PinnedExperts,
        policy: Policy,
        stats: Stats,
        layout: KernelLayout | None = None,
    ) -> None:
        self.cache = ExpertCache(stats.num_layers, stats.num_experts, num_slots, policy)
        decodes = bool(block.coding) and layout is None
        self.expert_block, self.num_slots, self.device = block, num_slots, device
        """Of the slots."""
        self._landing: Landing | None = None
        if decodes:
            self.expert_block, self._landing = block.plain, Landing(block, device)
        self.slots_SN = slots(num_slots, self.expert_block, device)
        is_plain = self.expert_block.is_plain
        self._views = self.expert_block.views(self.slots_SN) if is_plain else {}
        self.workspace_RN = None if is_plain else workspace(block, device)
        """Where records are unpacked or decoded for many tokens, int16 [R, units]."""
        self._host, self._stats, self._layout = host, stats, layout
        self._copies = torch.cuda.Stream(device)
        self._arrived: dict[int, torch.cuda.Event] = {}
        self._early: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def serve(
        self, layer: int, experts: list[int], ahead: Ahead | None = None
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield each of the distinct `experts` (ascending) of `layer` with its parameters, as
        `serve_groups` does.
        """
        for group in self.serve_groups(layer, experts, ahead):
            for expert, slot in group:
                parameters = {name: view[slot] for name, view in self._views.items()}
                layout = self._layout
                yield expert, parameters if layout is None else as_model(parameters, layout)

    def serve_groups(
        self, layer: int, experts: list[int], ahead: Ahead | None = None
    ) -> Iterator[list[tuple[int, int]]]:
        """Yield the distinct `experts` (ascending) of `layer` in groups of (expert, slot).

        Residents first, then the missing in the order of their arrival; the current stream waits
        for them. A group is good until the next is asked for. Behind the missing, the most wanted
        of `ahead` start to come; those of a single token are too uncertain. After an error the
        cache starts empty.
        """
        needed = np.array(experts, np.int64)
        try:
            self._judge(layer, needed)
            for lookup in self.cache.waves(layer, needed):
                self._stats.count(layer, lookup, self._host.link_bytes(layer))
                self._start_copies(layer, lookup)
                if ahead is not None and len(needed) < self.num_slots:
                    self._prefetch(ahead, layer * self.num_experts + needed)
                yield from self._arrivals(lookup)
        except GeneratorExit:  # the caller stopped: whatever is resident has arrived, or will
            raise
        except BaseException:
            self.clear()
            raise

    def _arrivals(self, lookup: Lookup) -> Iterator[list[tuple[int, int]]]:
        expert_in = dict(zip(lookup.slots.tolist(), lookup.experts.tolist(), strict=True))
        coming = [slot for slot in self._arrived if slot in expert_in]
        there = [(expert, slot) for slot, expert in expert_in.items() if slot not in self._arrived]
        if there:
            yield there
        for start in range(0, len(coming), GROUP):
            group = coming[start : start + GROUP]
            stream = torch.cuda.current_stream(self.device)
            for slot in group:
                stream.wait_event(self._arrived.pop(slot))
            yield [(expert_in[slot], slot) for slot in group]

    @property
    def num_experts(self) -> int:
        """Of a layer."""
        return self.cache.num_experts

    def lacks(self, layer: int) -> bool:
        """Whether any expert of `layer` is missing."""
        first = layer * self.num_experts
        slots = self.cache.slot_of_key[first : first + self.num_experts]
        return bool((slots == FREE).any())

    def fill(self) -> None:
        """Start to bring every expert that is missing, where all have a slot."""
        for layer, blocks_EN in enumerate(self._host.layers):
            self._send_ahead(layer, np.arange(len(blocks_EN)), np.zeros(0, np.int64))

    def _prefetch(self, ahead: Ahead, pinned: np.ndarray) -> None:
        layer, wanted_E = ahead.layer, ahead.wanted_E.cpu().numpy()
        likely = np.flatnonzero(wanted_E > 1)
        likely = likely[np.argsort(-wanted_E[likely], kind="stable")]
        experts = self._send_ahead(layer, likely, pinned)
        self._early = layer, experts
        self._stats.bytes_prefetched += len(experts) * self._host.link_bytes(layer)
        self._stats.prefetches += len(experts)

    def _send_ahead(self, layer: int, experts: np.ndarray, pinned: np.ndarray) -> np.ndarray:
        """Start to bring the missing of `experts`, beside the pinned keys: int64, those coming."""
        lookup = self.cache.admit(layer, experts, pinned)
        self._start_copies(layer, lookup)
        self._stats.bytes_loaded += len(lookup.experts) * self._host.link_bytes(layer)
        return lookup.experts

    def _judge(self, layer: int, needed: np.ndarray) -> None:
        """Book which of the experts that were sent ahead for `layer` it needs."""
        (early_layer, early), self._early = self._early, (-1, np.zeros(0, np.int64))
        if early_layer == layer:
            num_used = int(np.isin(early, needed).sum())
            self._stats.prefetches_used += num_used
            self._stats.bytes_wasted += (len(early) - num_used) * self._host.link_bytes(layer)

    def _start_copies(self, layer: int, lookup: Lookup) -> None:
        missing = np.flatnonzero(lookup.missed)
        if not len(missing):
            return
        self._copies.wait_stream(torch.cuda.current_stream(self.device))  # slots in use
        with self._stats.timer("load"), torch.cuda.stream(self._copies):
            experts, slots = (x[missing].tolist() for x in (lookup.experts, lookup.slots))
            for start in range(0, len(experts), GROUP):
                some = slice(start, start + GROUP)
                for expert, slot in zip(experts[some], slots[some], strict=True):
                    self._bring(layer, expert, self.slots_SN[slot])
                self._arrived |= dict.fromkeys(slots[some], self._copies.record_event())

    def _bring(self, layer: int, expert: int, slot_N: Tensor) -> None:
        """Bring an expert into a slot, on the current stream."""
        if self._landing is None:
            self._host.send(layer, expert, slot_N)
        else:
            self._host.send(layer, expert, self._landing.stored_N)
            self._landing.decode(slot_N)

    def seconds_per_load(self) -> float:
        """What one expert of layer 0 takes to cross the link, which nothing else may use now."""
        into = torch.empty_like(self.slots_SN[0])
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for probe in range(PROBES):
            self._bring(0, probe % self.cache.num_experts, into)
        torch.cuda.synchronize(self.device)
        return (time.perf_counter() - start) / PROBES

    def wait_for_copies(self) -> None:
        """Make the current stream wait for every copy under way."""
        torch.cuda.current_stream(self.device).wait_stream(self._copies)
        self._arrived.clear()

    def close(self) -> None:
        """Give the device memory back, whoever still holds this pool."""
        self.slots_SN = torch.empty(0, dtype=torch.int16)
        self._views, self.workspace_RN, self._landing = {}, None, None
        self._arrived.clear()

    def clear(self) -> None:
        """Start with an empty cache, after something went wrong."""
        self.wait_for_copies()
        self.cache.clear()


class Landing:
    """Where blocks in codes arrive, one after the other, to be decoded into plain slots.

    All of it happens on the stream that copies: a block has been decoded before the next arrives.
    """

    def __init__(self, block: ExpertBlock, device: torch.device) -> None:
        self._block = block
        self._first = torch.zeros(1, dtype=torch.int32, device=device)
        self.stored_N = torch.zeros(block.stored_units, dtype=torch.int16, device=device)

    def decode(self, slot_N: Tensor) -> None:
        """Decode the block that arrived last into int16 [units]."""
        decode_blocks(self._block, self.stored_N[None], self._first, slot_N[None])


def slots(num_slots: int, block: ExpertBlock, device: torch.device) -> Tensor:
    """The slots, int16 [S, stored units]. Raises ValueError where the device has no room."""
    try:
        return torch.zeros(num_slots, block.stored_units, dtype=torch.int16, device=device)
    except torch.OutOfMemoryError as error:
        free, _ = torch.cuda.mem_get_info(device)
        raise ValueError(
            f"{num_slots} expert slots need {format_bytes(2 * num_slots * block.stored_units)} on "
            f"{device}, where {format_bytes(free)} are free; give a smaller memory="
        ) from error


def workspace(block: ExpertBlock, device: torch.device) -> Tensor:
    """Room for records that are unpacked or decoded together, int16 [R, units]."""
    count = workspace_bytes(2 * block.units) // (2 * block.units)
    return torch.empty(count, block.units, dtype=torch.int16, device=device)


def workspace_bytes(record_bytes: int) -> int:
    """Of a workspace for records of so many bytes."""
    return min(max(WORKSPACE_BYTES // record_bytes, 1), WORKSPACE_RECORDS) * record_bytes
