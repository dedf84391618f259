"""The table of pages: which of them each row has, on the host and for the kernels.

Every page is free or has one owner. The device's copy is brought up to date before a step runs, so
captured steps find the pages that their rows have by then.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from runtime.kv.pages.places import Paged


class PageTable:
    """The pages of `num_rows` rows of up to `context` positions.

    allocate: memory for the device's copy, of a tensor's shape and kind.
    """

    def __init__(
        self, num_rows: int, context: int, num_pages: int, page: int,
        allocate: Callable[[Tensor], Tensor],
    ) -> None:  # fmt: skip
        self.num_pages, self.page = num_pages, page
        self._allocate = allocate
        self._shape = num_rows, self.count(context)
        self._free = list(range(num_pages - 1, -1, -1))
        self._pages: list[list[int]] = [[] for _ in range(num_rows)]
        self._host_RN = torch.zeros(self._shape, dtype=torch.int32)
        self._places: Paged | None = None
        self._has_changed = True
        self._sent: torch.cuda.Event | None = None
        """Complete when the last copy to the device is."""

    def count(self, num_tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-num_tokens // self.page)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def of(self, row: int, num_tokens: int | None = None) -> list[int]:
        """The pages of a row, in order; of its first tokens alone, where their number is given."""
        return self._pages[row][: None if num_tokens is None else self.count(num_tokens)]

    def grow(self, row: int, num_tokens: int) -> bool:
        """Whether a row has room for so many tokens now; if pages are lacking, it gets none."""
        held = self._pages[row]
        missing = self.count(num_tokens) - len(held)
        if missing > len(self._free):
            return False
        if missing > 0:
            self._wait()
            new = [self._free.pop() for _ in range(missing)]
            self._host_RN[row, len(held) : len(held) + missing] = torch.tensor(new)
            held += new
            self._has_changed = True
        return True

    def cut(self, row: int, num_tokens: int = 0) -> None:
        """Give back the pages of a row beyond so many tokens."""
        kept = self.count(num_tokens)
        given, self._pages[row] = self._pages[row][kept:], self._pages[row][:kept]
        self._free += reversed(given)

    def renew(self) -> None:
        """Others may have written to the device's copy."""
        self._has_changed = True

    def sent_to(self, device: torch.device) -> Paged:
        """The places of all rows, up to date on the device for what is enqueued next."""
        if self._places is None:
            if device.type == "cuda":
                self._host_RN = self._host_RN.pin_memory()
            like = torch.empty(0, self._shape[1], dtype=torch.int32, device=device)
            self._places = Paged(self._allocate(like), self.page)
        if self._has_changed:
            self._places.table_RN.copy_(self._host_RN, non_blocking=True)
            if device.type == "cuda":
                self._sent = torch.cuda.current_stream(device).record_event()
            self._has_changed = False
        return self._places

    def _wait(self) -> None:
        """Until nobody reads the host's copy any more."""
        if self._sent is not None:
            self._sent.synchronize()
            self._sent = None
