"""The CPU's share: of the experts that a step misses, some are computed where they lie.

The link brings the others meanwhile, and the GPU runs the residents. A single token's sums are the
same on both sides, bit for bit: that is tried on this machine before the first share, and how much
is left to the CPU is found out by the clock of whole steps.

    off --compiled in the background, the bits agree--> on trial --the fastest way--> on or off
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from runtime.cpu.cores import split_cores, usable_cores
from runtime.cpu.doorbell import Doorbell
from runtime.cpu.library import Library, load_library
from runtime.cpu.service import CpuExperts, ExpertTable
from runtime.cpu.shape import ExpertShape
from runtime.cuda.decode.experts.experts_call import ExpertsCall
from runtime.cuda.memory.cpu_blocks import cpu_table
from runtime.cuda.memory.kernel_layout import KernelLayout
from runtime.cuda.memory.pinned import PinnedMemory
from runtime.cuda.memory.pinned_experts import PinnedExperts
from runtime.cuda.share.order_to_cpu import OrderToCpu
from runtime.cuda.share.shape import shape_of
from runtime.cuda.share.share_trial import ShareTrial

SPARE_CORES, PREDICTOR_CORES = 2, 4
"""Cores that are left to the host thread and others, and to the predictor's session."""
COMPARED = 6
"""Experts whose bits are compared before the first share."""
AWAKE_S = 0.1
"""Seconds that the threads stay awake for a step that is enqueued."""
STUCK_S = 0.05
"""Seconds without an answer after which one more thread helps, wherever it may run."""


class CpuShare:
    """Decides, step by step, how many of a layer's missed experts the CPU computes.

    asked: True or "auto". seconds_per_load: measures what an expert takes over the link.
    """

    def __init__(
        self,
        layout: KernelLayout,
        host: PinnedExperts,
        top_k: int,
        device: torch.device,
        seconds_per_load: Callable[[], float],
        *,
        asked: bool | str,
        has_predictor: bool = False,
    ) -> None:
        self._layout, self._host, self._device, self._asked = layout, host, device, asked
        self._spare = SPARE_CORES + (PREDICTOR_CORES if has_predictor else 0)
        self._seconds_per_load = seconds_per_load
        self._top_k = top_k
        doorbell = Doorbell(top_k, layout.hidden)
        self._memory = PinnedMemory()
        self.order: OrderToCpu | None = None
        """None where there is no memory for a doorbell: steps are captured without one."""
        self._why: str | None = None
        """Why there is no share."""
        try:
            self._bytes = self._memory.empty((doorbell.num_bytes,), torch.uint8)
            self.order = OrderToCpu(doorbell, self._bytes, device)
        except (MemoryError, torch.OutOfMemoryError) as error:
            self._refuse(str(error))
        self._service: CpuExperts | None = None
        self._trial: ShareTrial | None = None
        self._builder: threading.Thread | None = None
        self._watcher: threading.Thread | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        """Held while threads are started or ended: a compiler may outlast the model."""

    # ------------------------------------------------------------------ steps

    def begin_step(self, call: ExpertsCall) -> None:
        """Set the share of the step that is enqueued next, whose kernels have been captured."""
        if self._why is not None:
            return
        if self._builder is None:
            if not call.compiled:
                return  # captured by the coming step
            compiled = dict(call.compiled)
            self._builder = threading.Thread(
                target=self._build, args=(compiled,), name="expertflow-share", daemon=True
            )
            self._builder.start()
        if self._trial is None and not self._builder.is_alive() and self._service is not None:
            self._try(call)
        if self._trial is not None:
            share_M = self._trial.next_share()
            if share_M is not None and self.order is not None:
                self.order.set_share(share_M)
            if self._service is not None and self._trial.is_on:
                self._service.wake(AWAKE_S)

    def count_step(self, seconds: float) -> None:
        """Note how long a step took."""
        if self._trial is not None:
            self._trial.count(seconds)

    def rest(self) -> None:
        """Other work comes, for which the cores are needed."""
        if self._service is not None:
            self._service.wake(0)

    def forget(self) -> None:
        """Steps in flight were dropped."""
        if self._trial is not None:
            self._trial.forget()

    # ------------------------------------------------------------------ getting ready

    def _build(self, compiled: dict[str, Any]) -> None:
        """Compile and start the CPU's side, in a thread of its own."""
        try:
            shape = shape_of(self._layout, self._host.expert_blocks[0], compiled)
            library = load_library(shape)
            if isinstance(library, str):
                self._refuse(library)
                return
            cores, _ = split_cores(usable_cores(), self._spare)
            if len(cores) < 2:
                self._refuse("there are too few cores")
                return
            with self._lock:
                if not self._closing.is_set():  # the memory is still there
                    self._service = self._started(library, shape, cores)
        except (ValueError, MemoryError) as error:
            self._refuse(str(error))
        except Exception as error:
            self._refuse(f"{type(error).__name__}: {error!s:.200}")

    def _started(self, library: Library, shape: ExpertShape, cores: list[int]) -> CpuExperts:
        service = CpuExperts(
            library, shape, self._table, self._top_k, cores=cores, memory=self._bytes
        )
        if service.num_threads == 0:
            service.close()
            raise MemoryError("the system starts no threads for them")
        return service

    @property
    def _table(self) -> ExpertTable:
        layers = self._host.layers
        addresses = [blocks_EN.data_ptr() for blocks_EN in layers]
        return cpu_table(self._host.expert_blocks[0], addresses, min(map(len, layers)))

    def _try(self, call: ExpertsCall) -> None:
        """Compare bits; then begin the trial."""
        assert self._service is not None
        try:
            if not all(self._agree(call)):
                self._give_up("its sums differ from the GPU's in the last bits")
                return
            per_expert = self._service.measure()
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {error!s:.200}")
            return
        self._watcher = threading.Thread(
            target=self._watch, name="expertflow-share-watch", daemon=True
        )
        self._watcher.start()
        always = self._asked is True
        self._trial = ShareTrial(self._top_k, per_expert, self._seconds_per_load(), always=always)

    def _agree(self, call: ExpertsCall) -> Iterator[bool]:
        """Whether both sides give the same bits, for some experts and vectors."""
        assert self._service is not None
        random = np.random.default_rng(0)
        layers = self._host.layers
        for number in range(COMPARED):
            layer = int(random.integers(len(layers)))
            expert = int(random.integers(len(layers[layer])))
            x = random.standard_normal(self._layout.hidden) * 10.0 ** random.integers(-3, 3)
            x_1H = torch.from_numpy(x * (random.random(len(x)) > 0.1 * number))[None].bfloat16()
            stored_N = layers[layer][expert].to(self._device)
            gpu_H = call.one_expert(stored_N, x_1H.to(self._device)).cpu()
            cpu_H = self._service.ask(layer, [expert], x_1H[0])[0]
            yield torch.equal(gpu_H.view(torch.int32), cpu_H.view(torch.int32))

    def _give_up(self, why: str) -> None:
        self._trial = None
        if self.order is not None:
            self.order.set_share([0] * (self._top_k + 1))
        if self._service is not None:
            self._service.close()
            self._service = None
        self._refuse(why)

    def _refuse(self, why: str) -> None:
        """Leave nothing to the CPU from now on, and say so where it was asked for."""
        self._why = why
        if self._asked is True:
            warnings.warn(f"the CPU computes no experts: {why}", stacklevel=2)

    # ------------------------------------------------------------------ faults

    def _watch(self) -> None:
        """Help where an answer does not come: a core may have been taken away."""
        seen = -1
        while not self._closing.wait(STUCK_S):
            service = self._service
            if service is None:
                return
            rings = service.counts().rings
            if rings == seen and service.is_waiting:
                service.help()
                if self._trial is not None:
                    self._trial.stop("its threads did not answer in time")
            seen = rings

    @property
    def verdict(self) -> str:
        """A sentence for people."""
        if self._why is not None:
            return f"the CPU computes no experts: {self._why}"
        if self._trial is None:
            return "the CPU's share is being prepared"
        return self._trial.verdict

    def close(self) -> None:
        """End the threads; no step runs any more."""
        with self._lock:
            self._closing.set()
        if self._watcher is not None:
            self._watcher.join()
        if self._service is not None:
            self._service.close()
            self._service = None
        self._memory.close()
