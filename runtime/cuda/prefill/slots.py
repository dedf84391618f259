"""Device memory of expert blocks: slots, the workspace that unpacks them, the landing of codes."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.cuda.memory.expert_block import ExpertBlock
from runtime.cuda.memory.unpacking import decode_blocks
from runtime.sizing.units import format_bytes

WORKSPACE_BYTES = 80 << 20
"""For records that are unpacked or decoded together, at least one."""
WORKSPACE_RECORDS = 16
"""Most of them."""


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
