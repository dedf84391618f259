"""The GPU's side of the CPU's share: how captured steps leave missed experts to the CPU."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from runtime.cpu.doorbell import Doorbell
from runtime.cuda.kernels import doorbell as doorbell_kernels

NO_ORDER: dict[str, Any] = {"SHARE": False, "ORDER": 0, "X": 0, "H": 0, "BLOCK_H": 0}
"""Constants of a plan that leaves nothing to the CPU."""
PATIENCE_NS = 30_000_000_000
"""Nanoseconds after which rows that never came are NaN, which ends generation with an error."""
WORD = 4
"""Bytes of the doorbell's unit on the device."""


class OrderToCpu:
    """The doorbell and what of it is on the device. memory: pinned, uint8 [doorbell.num_bytes]."""

    def __init__(self, doorbell: Doorbell, memory: Tensor, device: torch.device) -> None:
        self._doorbell, self._words = doorbell, memory.view(torch.int32)
        self._bell = torch.zeros(1, dtype=torch.int32, device=device)
        self._away_U = torch.zeros(doorbell.top_k, dtype=torch.int32, device=device)
        self.answers = torch.zeros(doorbell.top_k, doorbell.hidden, device=device)
        """Float32 [U, H], the CPU's rows in the places of their experts."""
        self._share = torch.zeros(doorbell.top_k + 1, dtype=torch.int32, device=device)

    def set_share(self, share_M: list[int]) -> None:
        """From the next step that is enqueued on, leave share_M[m] of m missed experts of a layer
        to the CPU.
        """
        assert all(0 <= count <= missed for missed, count in enumerate(share_M))
        self._share.copy_(torch.tensor(share_M, dtype=torch.int32), non_blocking=True)

    @property
    def plan_constants(self) -> dict[str, Any]:
        """Compile-time constants of the planning kernel."""
        doorbell = self._doorbell
        return {
            "SHARE": True, "ORDER": doorbell.order // WORD, "X": doorbell.x // WORD,
            "H": doorbell.hidden, "BLOCK_H": triton.next_power_of_2(doorbell.hidden),
        }  # fmt: skip

    def plan_inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the planning kernel needs to order experts for x [1, H]."""
        return x, self._words, self._bell, self._share, self._away_U

    def collect(self, counts: Tensor) -> None:
        """Wait for the answer, if a layer with these counts has asked."""
        doorbell = self._doorbell
        block = min(1024, triton.next_power_of_2(doorbell.hidden))
        doorbell_kernels.collect[(triton.cdiv(doorbell.hidden, block),)](
            self._words, self._bell, self.answers, self._away_U, counts,
            ANSWER=doorbell.answer // WORD, DONE=doorbell.done // WORD, H=doorbell.hidden,
            BLOCK=block, PATIENCE=PATIENCE_NS, num_warps=4,
        )  # fmt: skip
