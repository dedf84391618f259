"""Times of experts on the CPU, over numbers of threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.nn import functional as F

from benchmarks.cpu.blocks import RandomExperts
from benchmarks.cpu.settings import CpuSettings
from runtime.cpu import CpuExperts, Library, load_library
from runtime.cpu.team import openmp_team
from runtime.cuda.memory.cpu_blocks import cpu_table


class Timed(NamedTuple):
    """One measurement."""

    what: str
    kind: str
    threads: int
    at_once: int
    """Experts of a ring."""
    seconds: float
    """An expert."""
    num_bytes: int
    """An expert."""


def kernels(settings: CpuSettings, kind: str, cores: list[int]) -> Iterator[Timed]:
    """The C kernels: pinned threads that a doorbell wakes, and torch's own threads."""
    experts = RandomExperts(kind, settings.hidden, settings.width, settings.experts)
    library = load_library(experts.shape)
    if isinstance(library, str):
        raise ValueError(library)
    table = cpu_table(experts.block, [experts.blocks.data_ptr()], settings.experts)
    for threads in settings.threads:
        if threads > len(cores):
            continue
        with CpuExperts(
            library, experts.shape, table, settings.top_k, cores=cores[-threads:]
        ) as service:
            for at_once in sorted({1, 2, settings.top_k}):
                rings = settings.experts // at_once
                best = min(service.measure(at_once, rings) for _ in range(settings.repeats))
                yield Timed("doorbell", kind, threads, at_once, best, experts.num_bytes)
        yield _in_team(settings, experts, library, threads)
    yield _in_one_core(settings, experts, library)
    if kind == "plain":
        yield from _linear(settings, experts, cores)


def _in_team(
    settings: CpuSettings, experts: RandomExperts, library: Library, threads: int
) -> Timed:
    """The kernels in torch's threads, as without a GPU: the time of the whole call."""
    table = cpu_table(experts.block, [experts.blocks.data_ptr()], settings.experts)
    x_H = torch.randn(settings.hidden).bfloat16()
    with CpuExperts(library, experts.shape, table, settings.top_k) as service:

        def run(ids: list[int]) -> None:
            service.ask(0, ids, x_H, helpers=threads, team=openmp_team())

        return _timed(settings, "team", experts, threads, run)


def _in_one_core(settings: CpuSettings, experts: RandomExperts, library: Library) -> Timed:
    """The kernels in this thread, by its processor time, which does not count others' work."""
    table = cpu_table(experts.block, [experts.blocks.data_ptr()], settings.experts)
    x_H = torch.randn(settings.hidden).bfloat16()
    with CpuExperts(library, experts.shape, table, settings.top_k) as service:

        def run(ids: list[int]) -> None:
            service.ask(0, ids, x_H)

        return _timed(settings, "core", experts, 1, run, clock=time.thread_time)


def _linear(settings: CpuSettings, experts: RandomExperts, cores: list[int]) -> Iterator[Timed]:
    """What the generic path does: two products and the activation in torch."""
    views = experts.block.views(experts.blocks)
    x_1H = torch.randn(1, settings.hidden).bfloat16()

    def run(ids: list[int]) -> None:
        for expert in ids:
            gate, up = F.linear(x_1H, views["gate_up_proj"][expert]).chunk(2, -1)
            F.linear(F.silu(gate) * up, views["down_proj"][expert])

    for threads in settings.threads:
        if threads <= len(cores):
            yield _timed(settings, "torch", experts, threads, run)
            yield _timed(settings, "reading", experts, threads, lambda ids: _read(experts, ids))


def _read(experts: RandomExperts, ids: list[int]) -> None:
    for expert in ids:
        experts.blocks[expert].view(torch.float32).sum()


def _timed(
    settings: CpuSettings, what: str, experts: RandomExperts, threads: int,
    run: Callable[[list[int]], None], clock: Callable[[], float] = time.perf_counter,
) -> Timed:  # fmt: skip
    before, top_k = torch.get_num_threads(), settings.top_k
    torch.set_num_threads(threads)
    best = float("inf")
    for _ in range(settings.repeats + 1):
        start = clock()
        for first in range(0, settings.experts - top_k + 1, top_k):
            run(list(range(first, first + top_k)))
        best = min(best, clock() - start)
    torch.set_num_threads(before)
    seconds = best / (settings.experts // top_k * top_k)
    return Timed(what, experts.kind, threads, top_k, seconds, experts.num_bytes)
