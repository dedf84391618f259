"""The table of pages: which of them each row has, on the host and for the kernels.

Every page is free or has one owner. The device's copy is brought up to date before a step runs, so
captured steps find the pages that their rows have by then.

Pages of host memory have the numbers behind those of the device. A row's first pages may be there:
`spill` sends the oldest one that is not, `bring_back` returns the newest one that is. What is to be
copied for it is kept in order, until `take_moves`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from runtime.kv.pages.places import Paged
from runtime.kv.pages.spill import Move


class PageTable:
    """The pages of `num_rows` rows of up to `context` positions.

    allocate: memory for the device's copy, of a tensor's shape and kind. num_host_pages: of host
    memory, beside the `num_pages` of the device.
    """

    def __init__(
        self, num_rows: int, context: int, num_pages: int, page: int,
        allocate: Callable[[Tensor], Tensor], num_host_pages: int = 0,
    ) -> None:  # fmt: skip
        self.num_pages, self.page, self.num_host_pages = num_pages, page, num_host_pages
        self._allocate = allocate
        self._shape = num_rows, self.count(context)
        self._free = list(range(num_pages - 1, -1, -1))
        self._free_on_host = list(range(num_pages + num_host_pages - 1, num_pages - 1, -1))
        self._pages: list[list[int]] = [[] for _ in range(num_rows)]
        self._num_spilled = [0] * num_rows
        """Of each row's pages, those that are in host memory: its first ones."""
        self._moves: list[Move] = []
        self.num_moved = 0
        """Pages that were sent to host memory and back."""
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
        """Of the device."""
        return len(self._free)

    @property
    def num_spilled(self) -> int:
        """Pages that are in host memory."""
        return self.num_host_pages - len(self._free_on_host)

    def of(self, row: int, num_tokens: int | None = None) -> list[int]:
        """The pages of a row, in order; of its first tokens alone, where their number is given."""
        return self._pages[row][: None if num_tokens is None else self.count(num_tokens)]

    def spilled_of(self, row: int, num_tokens: int | None = None) -> list[int]:
        """The places in host memory of those that are there, in order: a row's first ones."""
        spilled = self.of(row, num_tokens)[: self._num_spilled[row]]
        return [page - self.num_pages for page in spilled]

    def lacks(self, row: int, num_tokens: int) -> bool:
        """Whether so many tokens take more pages than a row has."""
        return num_tokens > self.page * len(self._pages[row])

    def grow(self, row: int, num_tokens: int) -> bool:
        """Whether a row has room for so many tokens now; if pages are lacking, it gets none."""
        held = self._pages[row]
        missing = self.count(num_tokens) - len(held)
        if missing > len(self._free):
            return False
        if missing > 0:
            new = [self._free.pop() for _ in range(missing)]
            self._set(row, len(held), new)
            held += new
        return True

    def cut(self, row: int, num_tokens: int = 0) -> int:
        """Give back the pages of a row beyond so many tokens. Returns those that it keeps: fewer
        where the next one would be written to a page in host memory.
        """
        if self._num_spilled[row] * self.page > num_tokens:
            num_tokens -= num_tokens % self.page
        kept = self.count(num_tokens)
        given, self._pages[row] = self._pages[row][kept:], self._pages[row][:kept]
        self._free += [page for page in reversed(given) if page < self.num_pages]
        away = [page for page in given if page >= self.num_pages]
        self._free_on_host += reversed(away)
        if away:  # they are the first: who reads behind a row's end, with others, finds a page
            self._set(row, kept, [0] * len(away))
        self._num_spilled[row] = min(self._num_spilled[row], kept)
        return num_tokens

    def spill(self, count: int, full: Mapping[int, int]) -> bool:
        """Send `count` pages to host memory, of the rows that have most on the device; none, where
        there are not so many. full: of each row, the first pages that may go: nothing is written to
        them any more.
        """
        left = {row: self._spillable(row, most) for row, most in full.items()}
        if count > len(self._free_on_host) or count > sum(left.values()):
            return False
        for _ in range(count):
            row = max(left, key=lambda one: left[one])
            left[row] -= 1
            at = self._num_spilled[row]
            self._free.append(self._exchange(row, at, self._free_on_host.pop()))
            self._num_spilled[row] += 1
        return True

    def _spillable(self, row: int, most: int) -> int:
        return max(0, min(most, len(self._pages[row])) - self._num_spilled[row])

    def bring_back(self, row: int) -> bool:
        """Whether the newest page of a row that was in host memory is on the device again."""
        if not self._free or not self._num_spilled[row]:
            return False
        self._num_spilled[row] -= 1
        at = self._num_spilled[row]
        self._free_on_host.append(self._exchange(row, at, self._free.pop()))
        return True

    def _exchange(self, row: int, at: int, page: int) -> int:
        """Let a row have another page of the same content; returns the one before."""
        before, self._pages[row][at] = self._pages[row][at], page
        self._set(row, at, [page])
        self._moves.append(Move(before, page))
        self.num_moved += 1
        return before

    def take_moves(self) -> list[Move]:
        """Copies to be made before anything else is read or written, in this order."""
        moves, self._moves = self._moves, []
        return moves

    def _set(self, row: int, at: int, pages: list[int]) -> None:
        self._wait()
        self._host_RN[row, at : at + len(pages)] = torch.tensor(pages)
        self._has_changed = True

    def renew(self) -> None:
        """Others may have written to the device's copy."""
        self._has_changed = True

    def sent_to(self, device: torch.device) -> Paged:
        """The places of all rows, up to date on the device for what is enqueued next."""
        if self._places is None:
            if device.type == "cuda":
                self._host_RN = self._host_RN.pin_memory()
            like = torch.empty(0, self._shape[1], dtype=torch.int32, device=device)
            self._places = Paged(self._allocate(like), self.page, self.spilled_of)
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
