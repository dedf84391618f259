"""A layer's experts for many tokens: in one go where all are resident, else as they arrive.

    all resident   sort | gate_up | down | combine              the host waits for nothing
    streamed       sort | gate_up, down | gate_up, down | ... | combine         nor here (`wide`)
    else           sort | (host: what is missing?) | residents: gate_up, down | arrived: gate_up,
                   down | ... | combine

All run the same kernels with the same tiles, so what is resident changes no bit. The counts of a
pass in which the host waited for nothing come when it has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from routing.layers import Routes
from runtime.cache.expert_cache import Lookup
from runtime.cache.stats import Stats
from runtime.cuda.memory.kernel_layout import KernelLayout
from runtime.cuda.memory.unpacking import unpack_blocks
from runtime.cuda.prefill.products import Products, Work, combined, sort
from runtime.cuda.prefill.streaming_pool import Ahead, Group, StreamingPool, nothing_ahead
from runtime.cuda.prefill.telling import on_device, told
from runtime.cuda.prefill.tiling import Tiling, most_tiles, table_of
from runtime.cuda.wide.wide_experts import WideExperts
from runtime.cuda.wide.wide_pass import WidePasses

LEAST_SLOTS = 2
"""Of a pool that passes are streamed through: one expert runs while another comes."""
Given = tuple[int, Tensor, Tensor, Tiling, Work]


class GroupedExperts:
    """The experts calls of forward passes over the slots of `pool`, all of one `layout`.

    num_experts: of each layer.
    """

    def __init__(
        self, pool: StreamingPool, layout: KernelLayout, stats: Stats, num_experts: list[int]
    ) -> None:
        self._pool, self._layout, self._stats = pool, layout, stats
        self.device, self._num_experts = pool.device, num_experts
        block, workspace_RN = pool.expert_block, pool.workspace_RN
        self._stored = Products(block, pool.slots_SN, layout)
        self._plain = None if workspace_RN is None else Products(block.plain, workspace_RN, layout)
        shape = len(num_experts), max(num_experts)
        self._counts_LE, self._slots_LE = torch.zeros(
            2, *shape, dtype=torch.int32, device=self.device
        )
        self._counts = _rows(self._counts_LE, num_experts)
        self._slots = _rows(self._slots_LE, num_experts)
        """The slot of each expert, of the layers of a full pool."""
        self._known_slots = np.zeros(0, np.int64)
        """What is in `_slots_LE`."""
        self._work: Work | None = None
        self._ran: list[int] = []
        """Layers of the running pass whose counts the host does not know yet."""
        self._used = 0
        """Experts that the running pass has used, as far as they are counted."""
        self._wide = self._wide_passes()

    def _wide_passes(self) -> WidePasses | None:
        """None where none need be streamed, or none can."""
        pool, (first, *others) = self._pool, self._num_experts
        if self._stats.all_fit or pool.num_slots < LEAST_SLOTS or set(others) - {first}:
            return None
        room = first if self._plain is None else self._room
        experts = WideExperts(pool, 1 + len(others), self._stored, self._unpacked, room)
        return WidePasses(pool, experts)

    def end_pass(self) -> None:
        """A forward pass has ended: count what ran, and free its memory.

        Where all experts have a slot, those that it did not bring begin to come.
        """
        self._work = None
        self._count()
        used = self._take_used()
        if self._wide is not None:
            self._wide.end_pass(used)
        if self._stats.all_fit and self._pool.cache.num_resident and not self._pool.is_full:
            self._pool.fill()

    def _take_used(self) -> float:
        """The share of all experts that the pass that has ended used; the next one begins at 0."""
        used, self._used = self._used, 0
        return used / self._stats.total_experts

    def _count(self) -> None:
        ran, self._ran = self._ran, []
        if not ran:
            return
        counts_LE = self._counts_LE.cpu().numpy()
        for layer in ran:
            self._count_layer(layer, np.flatnonzero(counts_LE[layer]))

    def _count_layer(self, layer: int, needed: np.ndarray) -> None:
        """Count a layer in which all was resident, or streamed, of which it used `needed`."""
        if not self._stats.all_fit:  # else nothing is ever evicted
            self._pool.cache.policy.touch(layer, needed)
        self._used += len(needed)
        came = np.zeros(len(needed), bool)
        if self._wide is not None:
            came = needed >= self._wide.staying[layer]
            in_vain = self._num_experts[layer] - self._wide.staying[layer] - int(came.sum())
            self._pool.count_sent(layer, in_vain, in_vain=True)
        lookup = Lookup(needed, needed, came, 0)
        self._stats.count(layer, lookup, self._pool.link_bytes(layer))

    # ------------------------------------------------------------------ an experts call

    def run(
        self, layer: int, hidden_TH: Tensor, routes: Routes,
        ahead: Callable[[], Ahead | None] = nothing_ahead,
    ) -> Tensor:  # fmt: skip
        """The experts call of `layer`: [T, H]. A token's results are summed in top-k order.

        ahead: asked where something may be missing; what is missing of it follows.
        """
        x_TH, num_pairs = hidden_TH.contiguous(), routes.experts_TK.numel()
        routes = Routes(routes.experts_TK.contiguous(), routes.weights_TK.contiguous())
        if not num_pairs:
            return torch.zeros_like(x_TH)
        if self._work is None or len(self._work.order_P) != num_pairs:
            self._work = self.work_of(num_pairs)
        work, given = self._work, self._given(layer, x_TH, routes.experts_TK, self._work)
        if layer in self._ran:  # a layer that runs twice in a pass
            self._count()
        if self._pool.is_full:
            self._follow_slots()
            self._pool.wait_for_layer(layer)
            self._run_full(*given)
            self._ran.append(layer)
        elif self._wide is not None and self._wide.run(*given, self._counts[layer]):
            self._ran.append(layer)
        else:
            self._run_arriving(*given, ahead)
        return combined(x_TH, routes, work, self._num_experts[layer])

    def work_of(self, num_pairs: int) -> Work:
        """Memory for calls of so many pairs."""
        return Work.of(num_pairs, max(self._num_experts), self._layout, self.device)

    def _given(self, layer: int, x_TH: Tensor, experts_TK: Tensor, work: Work) -> Given:
        """What the ways to run a layer take: x as the products read it, and the tiles."""
        tiling = Tiling.of(experts_TK.numel(), self._num_experts[layer], self._pool.expert_block)
        x_TH = x_TH if tiling.unpacks else self._stored.arranged(x_TH)
        return layer, x_TH, experts_TK, tiling, work

    # ------------------------------------------------------------------ captured passes

    def captures(self, num_tokens: int) -> bool:
        """Whether passes of so many tokens can be captured: the host need decide nothing."""
        if self._pool.is_full:
            return True
        return self._wide is not None and self._wide.expects_all(num_tokens)

    def prepare(self) -> None:
        """Before a captured pass, on the host."""
        if self._wide is not None:
            self._wide.prepare()
        else:
            self._follow_slots()
            self._pool.wait_for_copies()

    def begin_captured(self) -> None:
        """Within it, before its first layer."""
        if self._wide is not None:
            self._wide.begin_captured()

    def run_captured(self, layer: int, x_TH: Tensor, routes: Routes, work: Work) -> Tensor:
        """Within it: an experts call of `layer`."""
        given = self._given(layer, x_TH, routes.experts_TK, work)
        if self._wide is not None:
            self._wide.run_captured(*given, self._counts[layer])
        else:
            self._run_full(*given)
        return combined(x_TH, routes, work, self._num_experts[layer])

    def end_captured(self) -> None:
        """Within it, after all else."""
        if self._wide is not None:
            self._wide.end_captured()

    def count_captured(self, routes_LBK: np.ndarray) -> None:
        """After it, on the host: count what ran, with hits left for later where every expert has a
        slot. int [L, B, K], others than experts are none.
        """
        num_tokens = routes_LBK.shape[1]
        if self._wide is None:
            self._stats.steps += 1
            self._stats.tokens += num_tokens
            self._stats.count_hits_later(lambda: self._used_LE(routes_LBK).sum(1))
            return
        used_LE = self._used_LE(routes_LBK)
        streams_LE = np.arange(used_LE.shape[1]) >= np.array(self._wide.staying)[:, None]
        used_L, came_L = used_LE.sum(1), (used_LE & streams_LE).sum(1)
        self._used += int(used_L.sum())
        self._pool.cache.policy.touch_layers(used_LE)
        self._pool.count_sent(0, int((streams_LE & ~used_LE).sum()), in_vain=True)
        self._stats.count_step(used_L, came_L, self._pool.link_bytes(0), num_tokens)
        self._wide.ran_captured(num_tokens, self._take_used())

    def _used_LE(self, routes_LBK: np.ndarray) -> np.ndarray:
        """Bool [L, E]: the experts that each layer uses."""
        most = max(self._num_experts)
        used_LE = np.zeros((len(routes_LBK), most + 2), bool)  # of no expert: before and behind
        firsts_L = used_LE.shape[1] * np.arange(len(routes_LBK)) + 1
        numbers_LN = routes_LBK.reshape(len(routes_LBK), -1).clip(-1, most) + firsts_L[:, None]
        used_LE.reshape(-1)[numbers_LN.reshape(-1)] = True
        is_one_LE: np.ndarray = np.arange(most) < np.array(self._num_experts)[:, None]
        return used_LE[:, 1:-1] & is_one_LE

    # ------------------------------------------------------------------ the ways to run a layer

    def _run_full(
        self, layer: int, x_TH: Tensor, experts_TK: Tensor, tiling: Tiling, work: Work
    ) -> None:
        """Every expert has its slot: nobody has to know which are used."""
        slots_E, num_experts = self._slots[layer], self._num_experts[layer]
        places_E, together = slots_E, num_experts
        if tiling.unpacks:
            together = self._room
            places_E = (torch.arange(num_experts, device=self.device) % together).int()
        sort(experts_TK, work, self._counts[layer], places_E, together, tiling.tiles.rows)
        top_k, height = experts_TK.shape[1], tiling.tiles.rows
        for group, start in enumerate(range(0, num_experts, together)):
            picked_R = slots_E[start : start + together]
            products = self._unpacked(picked_R) if tiling.unpacks else self._stored
            most = most_tiles(experts_TK.numel(), len(picked_R), height)
            products.run(x_TH, top_k, work, tiling.tiles, group, most)

    def _follow_slots(self) -> None:
        slots = self._pool.cache.slot_of_key
        if not np.array_equal(slots, self._known_slots):
            self._known_slots = slots.copy()
            self._slots_LE.copy_(torch.from_numpy(self._known_slots).view(self._slots_LE.shape))

    def _run_arriving(
        self, layer: int, x_TH: Tensor, experts_TK: Tensor, tiling: Tiling, work: Work,
        ahead: Callable[[], Ahead | None],
    ) -> None:  # fmt: skip
        """The host waits once, for what the tokens want; meanwhile it asks what comes ahead."""
        num_experts, height = self._num_experts[layer], tiling.tiles.rows
        counts_E, top_k = self._counts[layer], experts_TK.shape[1]
        sort(experts_TK, work, counts_E, self._slots[layer], num_experts, height)
        wanted, likely = told(counts_E), ahead()
        counts = wanted().astype(np.int64)
        self._used += int(np.count_nonzero(counts))
        for groups in self._pool.waves(layer, np.flatnonzero(counts)):
            if tiling.unpacks:
                groups = [part for group in groups for part in group.parts(self._room)]
            work, picked, heights = self._tables(work, groups, counts, tiling)
            for number, group in enumerate(groups):
                self._pool.wait_for(group.slots)
                products = self._unpacked(picked[number]) if tiling.unpacks else self._stored
                products.run(x_TH, top_k, work, tiling.tiles, number, heights[number])
                if number == 0:
                    self._pool.send_ahead(likely)

    def _tables(
        self, work: Work, groups: list[Group], counts: np.ndarray, tiling: Tiling
    ) -> tuple[Work, list[Tensor], list[int]]:
        """For a wave's groups, in one copy: their tiles, the slots of each and its number of
        tiles.
        """
        places = [range(len(one.slots)) if tiling.unpacks else one.slots for one in groups]
        experts = [one.experts for one in groups]
        table = table_of(experts, places, counts, tiling.tiles.rows)
        slots = np.concatenate([one.slots for one in groups])
        parts = table.tiles_N3.reshape(-1), table.starts_G, slots
        tiles, starts_G, slots_N = on_device(np.concatenate(parts), self.device).split(
            [len(part) for part in parts]
        )
        picked = list(slots_N.split([len(one.slots) for one in groups])) if tiling.unpacks else []
        heights = [int(after - before) for before, after in pairwise(table.starts_G)]
        return work._replace(tiles_N3=tiles, starts_G=starts_G), picked, heights

    @property
    def _room(self) -> int:
        """Experts that the workspace holds."""
        assert self._pool.workspace_RN is not None
        return len(self._pool.workspace_RN)

    def _unpacked(self, slots_R: Tensor) -> Products:
        """The workspace, its first rows the blocks in some slots (int32), made plain."""
        pool = self._pool
        assert self._plain is not None and pool.workspace_RN is not None
        unpack_blocks(pool.expert_block, pool.slots_SN, slots_R, pool.workspace_RN)
        return self._plain


def _rows(numbers_LE: Tensor, num_experts: list[int]) -> list[Tensor]:
    return [row_E[:num] for row_E, num in zip(numbers_LE, num_experts, strict=True)]
