"""Candidates compiled ahead, side by side: the timings then find them in Triton's cache."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from benchmarks.kernels.coded import CodedBench

CPU = torch.device("cpu")


class Absent:
    """Triton's driver for a GPU that nobody asks anything."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        """The architecture to compile for."""
        return self._target

    def get_current_device(self) -> int:
        """The first GPU."""
        return 0

    def get_current_stream(self, _device: int) -> int:
        """The default stream."""
        return 0


class Job(NamedTuple):
    """A candidate of a kernel."""

    shape: str
    encoding: str
    kernel: str
    batch: int
    number: int


def compile_ahead(
    shape: str, encodings: Iterable[str], batches: list[int], prompts: list[int], capability: int
) -> int:
    """Compile all candidates of an architecture in processes; returns their number."""
    jobs = [
        Job(shape, encoding, *job)
        for encoding in encodings
        for job in CodedBench(shape, encoding, CPU, 1, is_real=False).jobs(batches, prompts)
    ]
    with ProcessPoolExecutor(
        mp_context=get_context("spawn"), initializer=_only_compile, initargs=(capability,)
    ) as pool:
        return sum(pool.map(_compile, jobs))


def _only_compile(capability: int) -> None:
    """Let launches of this process compile."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    driver.set_active(Absent(capability))
    run: Any = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        run(kernel, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only


@cache
def _bench(shape: str, encoding: str) -> CodedBench:
    return CodedBench(shape, encoding, CPU, 1, is_real=False)


def _compile(job: Job) -> int:
    _bench(job.shape, job.encoding).compile(job.kernel, job.batch, job.number)
    return 1
