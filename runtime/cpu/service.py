"""Threads that compute experts where they lie, asked through a doorbell."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from runtime.cpu.doorbell import LINE, Doorbell
from runtime.cpu.library import PARTS, Counts, DoorbellOffsets, Layout, Library
from runtime.cpu.shape import ExpertShape, Packing

SPIN = 1e-3
"""Seconds that threads spin after their last work, before they sleep."""
PATIENCE = 10.0
"""Seconds until an answer that does not come is an error."""


class MatrixParts(NamedTuple):
    """Bytes at which the parts of a matrix start in an expert's block; 0 for those it has not.

    Of packed weights: low bytes, codes, and the patches of the whole block.
    """

    codes: int
    scales: int = 0
    extra: int = 0
    bias: int = 0

    @staticmethod
    def packed(packing: Packing, first: int, bias: int = 0) -> MatrixParts:
        """Those of the packed matrix that starts at weight `first`."""
        matrices = packing.matrices
        return MatrixParts(first, matrices + first // 2, matrices + matrices // 2, bias)


@dataclass(frozen=True)
class ExpertTable:
    """Where the parts of each expert are: base + id * stride, for each of the 8 parts."""

    bases_LP: np.ndarray
    """uint64 [L, 8]: addresses of expert 0's parts: codes, scales, extra, bias of gate_up, then of
    down."""
    strides_P: tuple[int, ...]
    num_experts: int

    @staticmethod
    def of_blocks(
        addresses: Sequence[int], stride: int, gate_up: MatrixParts, down: MatrixParts, experts: int
    ) -> ExpertTable:
        """Blocks of `stride` bytes, one expert after the other, from each layer's address on."""
        starts = np.array([*gate_up, *down], np.uint64)
        bases_LP = np.array(addresses, np.uint64)[:, None] + starts
        return ExpertTable(bases_LP, (stride,) * PARTS, experts)


class CpuExperts:
    """A service that computes one token's experts, for whoever rings the doorbell.

    memory: uint8 [doorbell.num_bytes], 64-byte aligned, shared with who asks; made if not given.
    cores: the CPU of each thread, or ANY_CORE. Without threads, only `ask` has work done: by the
    threads that help and itself. Experts must stay where the table says until `close`.
    Not for use in a process forked later, which has no such threads.
    """

    def __init__(
        self,
        library: Library,
        shape: ExpertShape,
        table: ExpertTable,
        top_k: int,
        *,
        cores: Sequence[int] = (),
        memory: Tensor | None = None,
        spin: float = SPIN,
    ) -> None:
        self.doorbell = bell = Doorbell(top_k, shape.hidden)
        self.memory = doorbell_memory(bell) if memory is None else memory
        assert self.memory.data_ptr() % LINE == 0 and self.memory.numel() >= bell.num_bytes
        self._library, self._pid = library, os.getpid()
        self._num_experts = table.num_experts
        self._bases_LP = np.ascontiguousarray(table.bases_LP, np.uint64)
        self._ends = bell.bell, bell.done
        layout = Layout(
            DoorbellOffsets(bell.bell, bell.order, bell.x, bell.answer, bell.done),
            len(self._bases_LP), table.num_experts, top_k, table.strides_P,
        )  # fmt: skip
        self._service: int | None = library.service_open(
            ctypes.byref(layout), self.memory.data_ptr(), self._bases_LP.ctypes.data
        )
        if self._service is None:
            raise MemoryError("there is no memory for computing experts on the CPU")
        cpus = np.array(cores, np.int64)
        nanoseconds = int(spin * 1e9)
        self.num_threads: int = library.service_start(
            self._service, len(cpus), cpus.ctypes.data, nanoseconds
        )
        """Those that were started: the system may refuse some."""
        self.answer_KH = self._view(bell.answer, top_k * shape.hidden, torch.float32).view(
            top_k, -1
        )
        """Of the last ring; float32 [top_k, H]."""

    def _view(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        return self.memory[start : start + count * dtype.itemsize].view(dtype)

    def ask(
        self, layer: int, ids: Sequence[int], x_H: Tensor | None, *, helpers: int = 1,
        team: int | None = None, patience: float = PATIENCE,
    ) -> Tensor:  # fmt: skip
        """The outputs of some experts for one token, float32 [len(ids), H]: a view, good until the
        next call.

        x_H: bfloat16 [H], contiguous; None: what is in the doorbell. helpers: threads of a team
        (`team.openmp_team`) that work too; without a team, this thread does if it is not 0.
        Raises RuntimeError when no answer comes in `patience` seconds, or the order is refused.
        """
        assert self._service is not None, "the service is closed"
        assert len(ids) <= self.doorbell.top_k
        ids_K = (ctypes.c_int32 * len(ids))(*ids)
        x = None if x_H is None else x_H.data_ptr()
        refused = self.counts().refused
        answered = self._library.service_ask(
            self._service, layer, len(ids), ids_K, x, team, helpers, int(patience * 1e9)
        )
        if not answered or self.counts().refused != refused:
            reason = "refused the order" if answered else f"did not answer in {patience} s"
            raise RuntimeError(f"the threads that compute experts on the CPU {reason}")
        return self.answer_KH[: len(ids)]

    @property
    def is_waiting(self) -> bool:
        """Whether a ring has no answer yet."""
        bell, done = (int(self._view(at, 1, torch.int32)) for at in self._ends)
        return bell != done

    def wake(self, seconds: float) -> None:
        """Announce rings for so long: sleeping threads wake up, and stay awake without work. With
        0 they may sleep as soon as they have none; a bell that nobody announced waits for up to
        20 ms.
        """
        if self._service is not None:
            self._library.service_wake(self._service, int(seconds * 1e9))

    def help(self) -> None:
        """Take part in the rings that are under way, in this thread, wherever it runs."""
        if self._service is not None:
            self._library.service_help(self._service)

    def counts(self) -> Counts:
        """Rings answered, experts computed, nanoseconds from bell to answer, orders refused."""
        counts = Counts()
        if self._service is not None:
            self._library.service_counts(self._service, ctypes.byref(counts))
        return counts

    def measure(self, experts: int = 2, rings: int = 32, helpers: int = 0) -> float:
        """Seconds an expert takes, in rings for so many at once through all layers.

        Nobody else may ring meanwhile.
        """
        layers, most = len(self._bases_LP), self.doorbell.top_k
        experts = min(experts, most)
        x_H = torch.zeros(self.doorbell.hidden, dtype=torch.bfloat16)
        before = self.counts()
        for ring in range(rings):
            first = ring // layers * experts
            ids = [(first + i) % self._num_experts for i in range(experts)]
            self.ask(ring % layers, ids, x_H, helpers=helpers)
        after = self.counts()
        spent = after.nanoseconds - before.nanoseconds
        return spent / 1e9 / (after.experts - before.experts)

    def close(self) -> None:
        """Stop the threads; twice is as good as once. In a forked process there are none."""
        service, self._service = self._service, None
        if service is not None and os.getpid() == self._pid:
            self._library.service_close(service)

    def __enter__(self) -> CpuExperts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_service", None) is not None:
            self.close()


def doorbell_memory(bell: Doorbell) -> Tensor:
    """Memory for a doorbell, zeros, uint8, which starts at a cache line."""
    room = torch.zeros(bell.num_bytes + LINE, dtype=torch.uint8)
    start = -room.data_ptr() % LINE
    return room[start : start + bell.num_bytes]
