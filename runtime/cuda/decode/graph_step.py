"""One decode step of the model as one CUDA graph.

The model's own forward runs between static tensors: token ids, positions, the keys that are padding
and the masks made of them. The graph also chooses the next token greedily, feeds it to itself, and
advances the position, so that the host only has to replay it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from runtime.cuda.decode.experts.experts_call import ExpertsCall
from runtime.cuda.decode.experts.ledger import Ledger
from runtime.cuda.single_tokens import PaddedTokens, UnknownAttention
from runtime.cuda.streams import CUDNN_ATTENTION
from runtime.kv.own_attention import OwnAttention
from runtime.kv.static_cache import SharedCache

WARM_UPS = 2
"""Eager runs before the capture: Triton compiles, cuBLAS takes its workspace."""


class StepExperts(Protocol):
    """What a step's expert layers call."""

    @property
    def prefetches(self) -> bool:
        """Whether experts are sent ahead."""

    @property
    def ledger(self) -> Tensor:
        """int32, what the host wants to know of a step."""

    def read(self, ledger: np.ndarray) -> Ledger:
        """The parts of a ledger that was copied to the host."""

    def begin_step(self) -> None:
        """Once a step, before its first layer."""

    def end_step(self) -> None:
        """Once a step, after all else."""

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Experts `ids` (int64 [B, K]) of x [B, H]: [B, H]."""


class CapturedStep(ABC):
    """A captured step. Subclasses hold the static tensors that a forward pass runs between.

    experts: what the model's expert layers call. stream: where it is captured.
    """

    def __init__(self, experts: StepExperts, stream: torch.cuda.Stream) -> None:
        self.experts, self._stream = experts, stream
        self.logits_BV: Tensor | None = None
        self.outcome: Tensor | None = None
        """int32: [B] best logits (the bits of float32), [B] their tokens, the ledger."""
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    @abstractmethod
    def batch(self) -> int:
        """B, tokens of a step."""

    @abstractmethod
    def save(self) -> list[Tensor]:
        """Copies of what a forward pass changes for good, to be restored after a warm-up."""

    @abstractmethod
    def restore(self, saved: list[Tensor]) -> None:
        """Put such copies back."""

    @abstractmethod
    def forward(self) -> Tensor:
        """Enqueue the model's forward pass: logits [B, V]."""

    @abstractmethod
    def advance(self, next_B: Tensor) -> None:
        """Enqueue the preparation of the next step; next_B is the greedy choice."""

    def __call__(self) -> None:
        """Run one step. Only enqueues; captures at the first call."""
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        self._graph.replay()

    def _capture(self) -> None:
        """Capture the step. Attention that is left to torch is not by cuDNN, whose bits differ from
        run to run.
        """
        CUDNN_ATTENTION.turn_off()
        try:
            self._warm_up_and_capture()
        finally:
            CUDNN_ATTENTION.turn_back()

    def _warm_up_and_capture(self) -> None:
        """The warm-up counts as real steps for the device cache only."""
        saved = self.save()
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(WARM_UPS):
                self._run()
                self.restore(saved)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
        with capture, torch.no_grad():
            self._run()
        self.restore(saved)
        self._graph = graph

    def _run(self) -> None:
        self.experts.begin_step()
        self.logits_BV = self.forward()
        best_B, next_B = self.logits_BV.float().max(-1)
        self.advance(next_B)
        self.experts.end_step()
        parts = best_B.view(torch.int32), next_B.to(torch.int32), self.experts.ledger
        self.outcome = torch.cat(parts)


class NextPositions:
    """The positions of the tokens that run next, as the model takes them: [B, 1], or [3 or 4, B, 1]
    of a model that counts rows and columns of images too. A static tensor.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.tensor = torch.zeros(batch, 1, dtype=torch.int64, device=device)

    def start(self, positions: Tensor) -> None:
        """Begin with `positions` [..., B]."""
        if self.tensor.shape[:-1] != positions.shape:
            self.tensor = torch.empty_like(positions[..., None])
        self.tensor.copy_(positions[..., None])


class DecodeStep(CapturedStep):
    """A captured decode step of `batch` sequences that go on together, each on its own tokens.

    forward: the forward of `model`, compiled or not.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        cache: SharedCache,
        experts: ExpertsCall,
        *,
        batch: int,
        context: int,
        device: torch.device,
        stream: torch.cuda.Stream,
    ) -> None:
        super().__init__(experts, stream)
        self._forward, self.cache = forward, cache
        self.ids_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._positions = NextPositions(batch, device)
        self._captured_positions: Tensor | None = None
        self._tokens = PaddedTokens(model, batch, context, device)
        self._attention: OwnAttention | None = OwnAttention(model, self._tokens.attend)
        """None: the model's own, with masks; it does what the kernels do not."""
        self._has_run = False

    @property
    def batch(self) -> int:
        return len(self.ids_B1)

    def save(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self._changed]

    def restore(self, saved: list[Tensor]) -> None:
        for tensor, before in zip(self._changed, saved, strict=True):
            tensor.copy_(before)

    @property
    def _changed(self) -> list[Tensor]:
        lengths_L = self.cache.lengths(self.ids_B1.device)
        counted = [self.ids_B1, self._positions.tensor, self._tokens.positions_B, lengths_L]
        return counted + self.cache.recurrent

    @property
    def has_own_attention(self) -> bool:
        """Whether the project's kernels do the attention, as far as is known yet."""
        return self._attention is not None

    def leave_attention(self) -> None:
        """Keep the model's own attention, as was found out in a step of the same kind."""
        self._attention = None

    def twin(self, experts: ExpertsCall) -> DecodeStep:
        """The same step with other kernels for its experts: either may run next."""
        twin = copy.copy(self)
        twin.experts, twin.logits_BV, twin.outcome, twin._graph = experts, None, None, None
        return twin

    def __call__(self) -> None:
        if self._captured_positions is not self._positions.tensor:
            self._captured_positions, self._graph = self._positions.tensor, None
        super().__call__()

    def start(self, length: int, positions: Tensor, real_BT: Tensor | None) -> None:
        """Take over after a prefill of `length` tokens a row; the next ones have `positions`
        [..., B]. real_BT is False for padding.
        """
        self._positions.start(positions)
        self._tokens.start(length, real_BT)
        self.cache.set_length(length)

    def forward(self) -> Tensor:
        if self._has_run:
            return self._logits()
        self._has_run = True
        recurrent = self.cache.recurrent
        before = [tensor.clone() for tensor in recurrent]
        try:
            return self._logits()
        except UnknownAttention:  # in the first of the runs that come before a capture
            self._attention = None
            for tensor, saved in zip(recurrent, before, strict=True):
                tensor.copy_(saved)
            self.experts.begin_step()
            return self._logits()

    def _logits(self) -> Tensor:
        masks = self._tokens.masks()
        own = nullcontext() if self._attention is None else self._attention.in_use()
        self.cache.step = self._tokens
        try:
            with own:
                output = self._forward(
                    input_ids=self.ids_B1,
                    position_ids=self._positions.tensor,
                    attention_mask=masks,
                    past_key_values=self.cache,
                    use_cache=True,
                    return_dict=True,
                )
        finally:
            self.cache.step = None
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    def advance(self, next_B: Tensor) -> None:
        self.ids_B1.copy_(next_B[:, None])
        self._positions.tensor.add_(1)
        self._tokens.positions_B.add_(1)
        self.cache.lengths(self.ids_B1.device).add_(1)
