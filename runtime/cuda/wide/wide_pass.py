"""The passes of a pool that is not full: which of them are streamed."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from runtime.cuda.prefill.products import Work
from runtime.cuda.prefill.streaming_pool import StreamingPool
from runtime.cuda.prefill.tiling import Tiling
from runtime.cuda.wide.regime import Regime
from runtime.cuda.wide.wide_experts import WideExperts


class RunningPass(NamedTuple):
    """The state of a pass that has begun."""

    num_tokens: int
    expected: int | None
    """The layer that is streamed next; None: no further one is."""


class WidePasses:
    """Streams passes whose like has used nearly every expert, by `experts`."""

    def __init__(self, pool: StreamingPool, experts: WideExperts) -> None:
        self._cache, self._experts, self._stream = pool.cache, experts, experts.stream
        self.staying = experts.schedule.staying
        """Experts of each layer that stay in slots while passes are streamed: its first ones."""
        self._regime = Regime()
        self._version = -1
        """Of the slot table, after the last pass."""
        self._pass: RunningPass | None = None

    def run(
        self, layer: int, x_TH: Tensor, experts_TK: Tensor, tiling: Tiling, work: Work,
        counts_E: Tensor,
    ) -> bool:  # fmt: skip
        """The products of a layer, if it is to be streamed; False if not."""
        if self._pass is None:
            streams = layer == 0 and self.expects_all(len(x_TH))
            self._pass = RunningPass(len(x_TH), 0 if streams else None)
            if streams:
                self._stream.begin_pass()
        if self._pass.expected != layer:
            self._pass = self._pass._replace(expected=None)
            return False
        self._experts.run(layer, x_TH, experts_TK, tiling, work, counts_E)
        self._pass = self._pass._replace(expected=layer + 1)
        return True

    def end_pass(self, used: float) -> None:
        """A pass has ended that used this share of all experts."""
        if self._pass is None:
            return
        if self._pass.expected == len(self.staying):
            self._stream.end_pass()
        self._saw(self._pass.num_tokens, used)
        self._pass = None

    def expects_all(self, num_tokens: int) -> bool:
        """Whether a pass of so many tokens will probably use nearly all experts."""
        if self._version != self._cache.version:  # something else has filled the slots since
            self._regime.broke_off()
        return self._regime.expects_all(num_tokens)

    def _saw(self, num_tokens: int, used: float) -> None:
        self._regime.saw(num_tokens, used)
        self._version = self._cache.version

    # ------------------------------------------------------------------ captured passes

    def prepare(self) -> None:
        """Before a captured pass, on the host: make the current stream wait for what is needed."""
        self._stream.begin_pass()
        self._stream.settle()

    def begin_captured(self) -> None:
        """Within it, before its first layer."""
        self._stream.begin_captured()

    def end_captured(self) -> None:
        """Within it, after all else: the first groups of the next pass are there."""
        self._stream.settle()

    def run_captured(
        self, layer: int, x_TH: Tensor, experts_TK: Tensor, tiling: Tiling, work: Work,
        counts_E: Tensor,
    ) -> None:  # fmt: skip
        """The products of a layer."""
        self._experts.run(layer, x_TH, experts_TK, tiling, work, counts_E)

    def ran_captured(self, num_tokens: int, used: float) -> None:
        """After it, on the host."""
        self._stream.is_whole = True
        self._saw(num_tokens, used)
