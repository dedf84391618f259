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
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from runtime.cache.expert_cache import FREE, ExpertCache, Lookup
from runtime.cache.policy import Policy
from runtime.cache.stats import Stats
from runtime.cuda.memory.expert_block import ExpertBlock
from runtime.cuda.memory.kernel_layout import KernelLayout, as_model
from runtime.cuda.memory.pinned_experts import PinnedExperts
from runtime.cuda.prefill.slots import Landing, slots, workspace

PROBES = 16
"""Records that are sent to measure the link."""
GROUP_BYTES = 32 << 20
"""Of missing experts that run together: about what the link brings while the host launches the
products of the group before."""
MOST_GROUPED = 16


class Ahead(NamedTuple):
    """What the layer after the one that runs will want, as far as that is known."""

    layer: int
    wanted: Callable[[], np.ndarray]
    """int [E], for how many tokens. Waits until the device knows."""


class Group(NamedTuple):
    """Experts of a layer that can run together."""

    experts: list[int]
    slots: list[int]

    def parts(self, size: int) -> list[Group]:
        """The same in parts of at most `size` experts."""
        starts = range(0, len(self.slots), size)
        return [Group(self.experts[at : at + size], self.slots[at : at + size]) for at in starts]


def nothing_ahead() -> None:
    """Nothing is known of the next layer."""


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
        self.copies = torch.cuda.Stream(device)
        """The stream on which experts come."""
        self._slots = list(self.slots_SN)
        self._group = min(max(GROUP_BYTES // (2 * block.stored_units), 1), MOST_GROUPED)
        self._arrived: dict[int, torch.cuda.Event] = {}
        """When each slot's bytes have arrived, of those that may be on their way."""
        self._before: torch.cuda.Event | None = None
        """When the wave that runs began; None outside of one."""
        self._running = np.zeros(0, np.int64)
        """Keys of the experts of the layer that runs."""
        self._early: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def serve(
        self, layer: int, experts: list[int], ahead: Callable[[], Ahead | None] = nothing_ahead
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield each of the distinct `experts` (ascending) of `layer` with its parameters, as
        `waves` does.
        """
        wanted = ahead()
        for groups in self.waves(layer, np.array(experts, np.int64)):
            for number, group in enumerate(groups):
                self.wait_for(group.slots)
                for expert, slot in zip(group.experts, group.slots, strict=True):
                    parameters = {name: view[slot] for name, view in self._views.items()}
                    layout = self._layout
                    yield expert, parameters if layout is None else as_model(parameters, layout)
                if number == 0:
                    self.send_ahead(wanted)

    def waves(self, layer: int, needed: np.ndarray) -> Iterator[list[Group]]:
        """Yield the distinct experts `needed` (int64, ascending) of `layer` in groups.

        Residents first, then the missing, whose copies have begun, in the order of their arrival.
        One wave where all fit the slots; a wave is good until the next is asked for. After an error
        the cache starts empty.
        """
        self._running = layer * self.num_experts + needed
        try:
            self._judge(layer, needed)
            for lookup in self.cache.waves(layer, needed):
                self._stats.count(layer, lookup, self._host.link_bytes(layer))
                self._before = torch.cuda.current_stream(self.device).record_event()
                self._start_copies(layer, lookup)
                yield self._groups(lookup)
        except GeneratorExit:  # the caller stopped: whatever is resident has arrived, or will
            raise
        except BaseException:
            self.clear()
            raise

    def _groups(self, lookup: Lookup) -> list[Group]:
        expert_in = dict(zip(lookup.slots.tolist(), lookup.experts.tolist(), strict=True))
        for slot in [slot for slot, event in self._arrived.items() if event.query()]:
            del self._arrived[slot]
        coming = [slot for slot in self._arrived if slot in expert_in]
        there = [slot for slot in expert_in if slot not in self._arrived]
        here, arriving = (
            Group([expert_in[slot] for slot in some], some) for some in (there, coming)
        )
        return ([here] if there else []) + arriving.parts(self._group)

    def wait_for(self, slots: list[int]) -> None:
        """Make the current stream wait until what is on its way to some slots is there."""
        coming = [slot for slot in slots if slot in self._arrived]
        if coming:
            stream = torch.cuda.current_stream(self.device)
            for arrival in dict.fromkeys(self._arrived[slot] for slot in coming):
                stream.wait_event(arrival)
            for slot in coming:
                del self._arrived[slot]

    def send_ahead(self, ahead: Ahead | None) -> None:
        """Within a wave: start to bring the experts that the next layer wants most, behind those
        of this one. Those that a single token wants are too uncertain.
        """
        if ahead is None or len(self._running) >= self.num_slots:
            return
        layer, wanted_E = ahead.layer, ahead.wanted()
        likely = np.flatnonzero(wanted_E > 1)
        likely = likely[np.argsort(-wanted_E[likely], kind="stable")]
        experts = self._send(layer, likely, self._running)
        self._early = layer, experts
        self._stats.bytes_prefetched += len(experts) * self._host.link_bytes(layer)
        self._stats.prefetches += len(experts)

    @property
    def num_experts(self) -> int:
        """Of a layer."""
        return self.cache.num_experts

    def lacks(self, layer: int) -> bool:
        """Whether any expert of `layer` is missing."""
        first = layer * self.num_experts
        slots = self.cache.slot_of_key[first : first + self.num_experts]
        return bool((slots == FREE).any())

    @property
    def is_full(self) -> bool:
        """Whether every expert of the model has a slot and is in it, or on its way."""
        return self._stats.all_fit and self.cache.num_resident == self._stats.total_experts

    def fill(self) -> None:
        """Start to bring every expert that is missing, where all have a slot."""
        self._before = None
        for layer, blocks_EN in enumerate(self._host.layers):
            self._send(layer, np.arange(len(blocks_EN)), np.zeros(0, np.int64))

    def wait_for_layer(self, layer: int) -> None:
        """Make the current stream wait for what is on its way to `layer`, all of it resident."""
        if self._arrived:
            first = layer * self.num_experts
            self.wait_for(self.cache.slot_of_key[first : first + self.num_experts].tolist())

    def _send(self, layer: int, experts: np.ndarray, pinned: np.ndarray) -> np.ndarray:
        """Start to bring the missing of `experts`, beside the pinned keys: int64, those coming."""
        try:
            lookup = self.cache.admit(layer, experts, pinned)
            self._start_copies(layer, lookup)
        except BaseException:
            self.clear()
            raise
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
        """Send what is missing to its slots, once all that was enqueued before the wave has read
        what it needs from them.
        """
        missing = np.flatnonzero(lookup.missed)
        if not len(missing):
            return
        if self._before is None:
            self.copies.wait_stream(torch.cuda.current_stream(self.device))
        else:
            self.copies.wait_event(self._before)
        with self._stats.timer("load"), torch.cuda.stream(self.copies):
            experts, slots = (x[missing].tolist() for x in (lookup.experts, lookup.slots))
            for start in range(0, len(experts), self._group):
                some = slice(start, start + self._group)
                for expert, slot in zip(experts[some], slots[some], strict=True):
                    self._bring(layer, expert, self._slots[slot])
                self._arrived |= dict.fromkeys(slots[some], self.copies.record_event())

    def _bring(self, layer: int, expert: int, slot_N: Tensor) -> None:
        """Bring an expert into a slot, on the current stream."""
        if self._landing is None:
            self._host.send(layer, expert, slot_N)
        else:
            self._host.send(layer, expert, self._landing.stored_N)
            self._landing.decode(slot_N)

    def send(self, layer: int, first: int, end: int, into_GN: Tensor) -> None:
        """Bring experts `first` to `end` of a layer in one copy, on the current stream."""
        into_GN.copy_(self._host.layers[layer][first:end], non_blocking=True)

    def link_bytes(self, layer: int) -> int:
        """Bytes that an expert of `layer` takes on the link."""
        return self._host.link_bytes(layer)

    def count_sent(self, layer: int, num_experts: int, *, in_vain: bool = False) -> None:
        """Count experts that were sent before any token asked for them."""
        num_bytes = num_experts * self._host.link_bytes(layer)
        self._stats.bytes_loaded += num_bytes
        self._stats.bytes_wasted += num_bytes if in_vain else 0

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
        torch.cuda.current_stream(self.device).wait_stream(self.copies)
        self._arrived.clear()

    def close(self) -> None:
        """Give the device memory back, whoever still holds this pool."""
        self.slots_SN, self._slots = torch.empty(0, dtype=torch.int16), []
        self._views, self.workspace_RN, self._landing = {}, None, None
        self._arrived.clear()

    def clear(self) -> None:
        """Start with an empty cache, after something went wrong."""
        self.wait_for_copies()
        self.cache.clear()
