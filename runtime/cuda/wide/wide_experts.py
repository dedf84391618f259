"""A layer's experts for very many tokens, group by group in the order in which they stream past.

    sort | wait, gate_up, down | wait, gate_up, down | ...

The host waits for nothing and decides nothing by what tokens want, so all of it can be captured.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from runtime.cuda.prefill.products import Products, Work, sort
from runtime.cuda.prefill.streaming_pool import StreamingPool
from runtime.cuda.prefill.tiling import Tiling, most_tiles
from runtime.cuda.wide.expert_stream import ExpertStream
from runtime.cuda.wide.schedule import Schedule

GROUP_BYTES = 64 << 20
"""Of experts that run together: enough to fill a GPU, and about a millisecond of the link."""


class WideExperts:
    """Streamed experts calls over the slots of `pool`.

    unpacked: makes the blocks in some slots (int32) plain, where they are not stored so. most:
    experts for which it has room.
    """

    def __init__(
        self,
        pool: StreamingPool,
        num_layers: int,
        stored: Products,
        unpacked: Callable[[Tensor], Products],
        most: int,
    ) -> None:
        together = max(1, min(GROUP_BYTES // (2 * pool.expert_block.stored_units), most))
        self.schedule = Schedule(num_layers, pool.num_experts, pool.num_slots, together)
        self.stream = ExpertStream(pool, self.schedule)
        self._stored, self._unpacked = stored, unpacked
        self._num_experts = pool.num_experts
        parts = [self._tables(layer) for layer in range(num_layers)]
        self._slots, self._places, self._firsts = (
            [torch.tensor(one, dtype=torch.int32, device=pool.device) for one in many]
            for many in zip(*parts, strict=True)
        )
        """Of each layer: the slot of each expert, its place in its group, and the first expert of
        each group, with the end."""

    def _tables(self, layer: int) -> tuple[list[int], list[int], list[int]]:
        groups = [self.schedule.groups[index] for index in self.schedule.layers[layer]]
        slots = [group.slot + place for group in groups for place in range(group.size)]
        places = [place for group in groups for place in range(group.size)]
        return slots, places, [*(group.first for group in groups), groups[-1].end]

    def run(
        self, layer: int, x_TH: Tensor, experts_TK: Tensor, tiling: Tiling, work: Work,
        counts_E: Tensor,
    ) -> None:  # fmt: skip
        """The products of a layer; counts_E: int32, for how many tokens each expert has run."""
        num_pairs, top_k = experts_TK.numel(), experts_TK.shape[1]
        height, slots_E = tiling.tiles.rows, self._slots[layer]
        places_E = self._places[layer] if tiling.unpacks else slots_E
        sort(experts_TK, work, counts_E, places_E, 1, height)
        work = work._replace(starts_G=work.starts_G.index_select(0, self._firsts[layer]))
        for number, index in enumerate(self.schedule.layers[layer]):
            group = self.schedule.groups[index]
            self.stream.wait_for(index)
            products = self._stored
            if tiling.unpacks:
                products = self._unpacked(slots_E[group.first : group.end])
            most = most_tiles(num_pairs, group.size, height)
            products.run(x_TH, top_k, work, tiling.tiles, number, most)
            self.stream.has_run(index)
