"""Experts streamed into slots: the host gives the order, the copy engine and the compute overlap.

Runs every forward pass that is not a captured step: prefill, and all steps of models, layouts and
generation modes that have no kernels. The needed experts of a layer cross the link once, residents
are computed first, and each missing one as soon as it has arrived. While a long prompt's layer
computes, the experts that the next layer's router will want are already on their way.

    copy stream     | missing of layer l | likely of layer l + 1 |
    compute stream  | residents of l | arrived of l ... | attention of l + 1 | ...
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from runtime.cache import ExpertCache, Lookup
from runtime.cuda.host import HostTier
from runtime.cuda.layout import Layout, as_model
from runtime.cuda.record import Record
from runtime.policies import Policy
from runtime.stats import Stats


class StreamedPool:
    """Slots for records on a GPU, filled on a stream of their own.

    layout: how the records are oriented, where the kernels can run the experts; else None.
    """

    def __init__(
        self,
        record: Record,
        num_slots: int,
        device: torch.device,
        host: HostTier,
        policy: Policy,
        stats: Stats,
        layout: Layout | None = None,
    ) -> None:
        self.cache = ExpertCache(stats.num_layers, stats.num_experts, num_slots, policy)
        self.record, self.num_slots, self.device = record, num_slots, device
        self.slots_SN = torch.zeros(num_slots, record.units, dtype=torch.int16, device=device)
        self._views = record.views(self.slots_SN)
        self._host, self._stats, self._layout = host, stats, layout
        self._copies = torch.cuda.Stream(device)
        self._arrived: dict[int, torch.cuda.Event] = {}
        self._ahead: tuple[int, Tensor] | None = None
        self._early: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def serve(self, layer: int, experts: list[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield each of the distinct `experts` (ascending) of `layer` with its parameters: residents first,
        then the missing in the order of their arrival; the current stream waits for them. After an
        error the cache starts empty.
        """
        needed = np.array(experts, np.int64)
        ahead, self._ahead = self._ahead, None
        wanted = None if ahead is None else ahead[1].cpu().numpy()
        try:
            self._judge(layer, needed)
            for lookup in self.cache.waves(layer, needed):
                self._stats.count(layer, lookup, self._host.link_bytes(layer))
                self._start_copies(layer, lookup)
                if ahead is not None and wanted is not None and len(needed) < self.num_slots:
                    self._prefetch(ahead[0], wanted, layer * self.cache.num_experts + needed)
                for i in np.argsort(lookup.missed, kind="stable"):
                    yield int(lookup.experts[i]), self._arrive(int(lookup.slots[i]))
        except GeneratorExit:  # the caller stopped: whatever is resident has arrived, or will
            raise
        except BaseException:
            self.clear()
            raise

    def plan_ahead(self, layer: int, wanted_E: Tensor) -> None:
        """With the next `serve`, start copying experts of `layer` too.

        wanted_E: int [E], for how many tokens; the most wanted come first, those of a single token
        are too uncertain.
        """
        self._ahead = layer, wanted_E

    def _prefetch(self, layer: int, wanted_E: np.ndarray, pinned: np.ndarray) -> None:
        likely = np.flatnonzero(wanted_E > 1)
        likely = likely[np.argsort(-wanted_E[likely], kind="stable")]
        lookup = self.cache.admit(layer, likely, pinned)
        self._start_copies(layer, lookup)
        self._early = layer, lookup.experts
        num_bytes = len(lookup.experts) * self._host.link_bytes(layer)
        self._stats.bytes_loaded += num_bytes
        self._stats.bytes_prefetched += num_bytes
        self._stats.prefetches += len(lookup.experts)

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
        self._copies.wait_stream(torch.cuda.current_stream(self.device))  # slots may be in use
        with torch.cuda.stream(self._copies), self._stats.timer("load"):
            for i in missing:
                slot = int(lookup.slots[i])
                self._host.read_record(layer, int(lookup.experts[i]), self.slots_SN, slot)
                self._arrived[slot] = self._copies.record_event()

    def _arrive(self, slot: int) -> dict[str, Tensor]:
        event = self._arrived.pop(slot, None)
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        parameters = {name: view[slot] for name, view in self._views.items()}
        return parameters if self._layout is None else as_model(parameters, self._layout)

    def settle(self) -> None:
        """Make the current stream wait for every copy under way."""
        torch.cuda.current_stream(self.device).wait_stream(self._copies)
        self._arrived.clear()

    def clear(self) -> None:
        """Start with an empty cache, after something went wrong."""
        self.settle()
        self.cache.clear()
