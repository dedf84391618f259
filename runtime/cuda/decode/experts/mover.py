"""The mover: it sends the experts ahead that coming layers will probably miss, in captured steps.

    main stream   plan l | gate_up: fetch what l misses | ...down, attention, router | plan l + 1
    side stream            pick                         | fetch, until plan l + 1 ends it

`prefetch` says what is chosen, `transfer` how it is brought. One window lies before the first
layer, and one after the last, for the next token, where something is known of it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor, nn

from runtime.cuda.decode.device_cache import DeviceCache
from runtime.cuda.kernels import prefetch as prefetch_kernels
from runtime.cuda.kernels import transfer as transfer_kernels
from runtime.cuda.kernels.plan import CYCLE
from runtime.cuda.memory.expert_block import CHUNK, ExpertBlock
from runtime.cuda.memory.pinned_experts import PinnedExperts

PREFETCHERS = 32
"""Programs that bring what is sent ahead."""
DEPTH = 4
"""Experts that are listed for a window, a power of 2."""
REACH: int | None = None
"""Layers ahead that are looked at; None: all until the same layer of the next step. With 1 here and
in `DEPTH` there is one guess a layer, for the next, which benchmarks compare with."""
THRESHOLD = 0.1
"""Least probability of use. The link would be idle, and a slot is only taken from an expert that is
worth less, so that a guess that is right once in ten still pays."""


class Mover:
    """Sends experts ahead beside the steps of one `ExpertsCall`.

    routers: for each layer, the weight [E, H] (and bias) of its router, to look one layer ahead;
    None where none was found. chances: float32 [2, L * E], the predictor's probabilities for the
    running step and the next, or None.
    """

    def __init__(
        self,
        hidden: int,
        top_k: int,
        block: ExpertBlock,
        units_SN: Tensor,
        host: PinnedExperts,
        cache: DeviceCache,
        routers: list[nn.Module | None] | None,
        chances: Tensor | None,
    ) -> None:
        device = cache.clock.device
        self._hidden, self._top_k, self._block = hidden, top_k, block
        self._units_SN, self._cache, self._chances = units_SN, cache, chances
        self._routers = routers or [None] * cache.num_layers
        addresses = [blocks_EN.data_ptr() for blocks_EN in host.layers]
        self._addresses = torch.tensor(addresses, device=device)
        shape = transfer_kernels.FIELDS, DEPTH
        self._moves = torch.full(shape, -1, dtype=torch.int32, device=device)
        self._cursor = torch.zeros(1, dtype=torch.int32, device=device)
        self._trust = torch.full((2,), 0.9, device=device)
        self._choices = torch.full((2,), -1, dtype=torch.int32, device=device)
        self._nobody = torch.zeros(2, dtype=torch.int32, device=device)
        self._reach = REACH or cache.num_layers
        self._spans_steps = self._reach > 1 and (chances is not None or cache.rule == CYCLE.value)
        self._side = torch.cuda.Stream(device)
        self._picked: torch.cuda.Event | None = None
        self._fetched: torch.cuda.Event | None = None

    @property
    def plan_inputs(self) -> tuple[Tensor, ...]:
        """The moves that a plan ends; first choices for it to judge, and the trust in them."""
        return self._moves, self._cursor, self._choices, self._trust

    @property
    def constants(self) -> dict[str, int]:
        """Compile-time constants of whatever ends moves."""
        return {"DEPTH": DEPTH, "NUM_CHUNKS": self._block.num_chunks}

    # ------------------------------------------------------------------ the order of a step

    def begin_step(self) -> None:
        """Choose and bring until the first layer is planned."""
        if self._spans_steps:
            self.choose(0, None, self._nobody, self._nobody)
            self.bring()

    def before_plan(self) -> None:
        """The plan is going to end the moves: wait until they have been chosen."""
        if self._picked is not None:
            torch.cuda.current_stream().wait_event(self._picked)
        self._picked = None

    def after_plan(self) -> None:
        """The moves are ended: wait until the last chunk is there."""
        if self._fetched is not None:
            torch.cuda.current_stream().wait_event(self._fetched)
        self._fetched = None

    def end_step(self, moved: Tensor) -> None:
        """End the moves that are left. moved: int32 [COLUMNS], a row of the ledger."""
        if self._picked is None:
            return
        cache = self._cache
        self.before_plan()
        transfer_kernels.halt[(1,)](
            self._moves, self._cursor, cache.slot_of_key, cache.key_of_slot, cache.rest, cache.sent,
            moved, **self.constants, num_warps=1,
        )  # fmt: skip
        self.after_plan()

    # ------------------------------------------------------------------ kernels

    def wants(self, layer: int) -> bool:
        """Whether anything may be known of `layer`, the next, and of those after it."""
        return layer < self._cache.num_layers or self._spans_steps

    def choose(self, layer: int, x: Tensor | None, slots_U: Tensor, counts: Tensor) -> None:
        """List the moves from now until `layer` is planned. x [B, H] of the layer before it, and
        its plan.
        """
        cache, chances = self._cache, self._chances
        router = self._routers[layer] if x is not None and layer < cache.num_layers else None
        given: Tensor = self._units_SN if router is None or x is None else x
        bias = None if router is None else router._parameters.get("bias")
        forecast, following = (given, given) if chances is None else chances
        num_slots = len(cache.key_of_slot)
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            prefetch_kernels.pick[(1,)](
                given, given if router is None else router.weight, given if bias is None else bias,
                forecast, following, self._trust, self._choices, self._moves, self._cursor, slots_U,
                counts, cache.slot_of_key, cache.key_of_slot, cache.rest, cache.sent, cache.values,
                cache.before, cache.after, THRESHOLD, layer, self._reach, len(given), num_slots,
                H=self._hidden, E=cache.num_experts, K=self._top_k, LAYERS=cache.num_layers,
                RULE=cache.rule, **self.constants, HAS_ROUTER=router is not None,
                HAS_BIAS=bias is not None, HAS_FORECAST=chances is not None,
                BLOCK_E=triton.next_power_of_2(cache.num_experts),
                BLOCK_N=triton.next_power_of_2(len(cache.slot_of_key)),
                BLOCK_S=triton.next_power_of_2(num_slots),
                BLOCK_H=min(128, triton.next_power_of_2(self._hidden)),
                num_warps=8 if len(cache.slot_of_key) <= 2048 else 16,
            )  # fmt: skip
        self._picked = self._side.record_event()

    def bring(self) -> None:
        """Bring the moves from here on, until they are ended."""
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            transfer_kernels.fetch[(PREFETCHERS,)](
                self._units_SN, self._addresses, self._moves, self._cursor,
                E=self._cache.num_experts, STORED=self._block.stored_units, CHUNK=CHUNK,
                DEPTH=DEPTH, num_warps=4,
            )  # fmt: skip
        self._fetched = self._side.record_event()


NO_MOVES: dict[str, Any] = {"DEPTH": 1, "NUM_CHUNKS": 1}
"""Constants of a plan beside which nothing is sent ahead."""
