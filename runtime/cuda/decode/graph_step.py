"""One decode step of the model as one CUDA graph.

The model's own forward runs between static tensors: token ids, positions, the attention mask over
the whole cache. The graph also chooses the next token greedily, feeds it to itself, and advances
position and mask, so that the host only has to replay it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from runtime.cuda.decode.experts.experts_call import ExpertsCall
from runtime.cuda.streams import CUDNN_ATTENTION
from runtime.kv.attention_kinds import attention_types
from runtime.kv.static_cache import SharedCache

WARM_UPS = 2
"""Eager runs before the capture: Triton compiles, cuBLAS takes its workspace."""


class CapturedStep(ABC):
    """A captured step. Subclasses hold the static tensors that a forward pass runs between.

    experts: what the model's expert layers call. stream: where it is captured.
    """

    def __init__(self, experts: ExpertsCall, stream: torch.cuda.Stream) -> None:
        self.experts, self._stream = experts, stream
        self.logits_BV: Tensor | None = None
        self.outcome: Tensor | None = None
        """int32: [B] best logits (the bits of float32), [B] their tokens, the ledger."""
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    @abstractmethod
    def batch(self) -> int:
        """B, tokens of a step."""

    @property
    def state(self) -> tuple[Tensor, ...]:
        """Tensors that a forward pass changes, to be restored after a warm-up."""
        return ()

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
        """Capture the step, its attention not by cuDNN, whose bits differ from run to run."""
        CUDNN_ATTENTION.turn_off()
        try:
            self._warm_up_and_capture()
        finally:
            CUDNN_ATTENTION.turn_back()

    def _warm_up_and_capture(self) -> None:
        """The warm-up counts as real steps for the device cache only."""
        saved = [tensor.clone() for tensor in self.state]
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(WARM_UPS):
                self._run()
                self._restore(saved)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
        with capture, torch.no_grad():
            self._run()
        self._restore(saved)
        self._graph = graph

    def _restore(self, saved: list[Tensor]) -> None:
        for tensor, before in zip(self.state, saved, strict=True):
            tensor.copy_(before)

    def _run(self) -> None:
        self.experts.begin_step()
        self.logits_BV = self.forward()
        best_B, next_B = self.logits_BV.float().max(-1)
        self.advance(next_B)
        parts = best_B.view(torch.int32), next_B.to(torch.int32), self.experts.ledger
        self.outcome = torch.cat(parts)


class DecodeStep(CapturedStep):
    """A captured decode step of `batch` sequences that go on together, each on its own tokens.

    forward: the model's forward, compiled or not.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        config: Any,
        cache: SharedCache,
        experts: ExpertsCall,
        *,
        batch: int,
        context: int,
        dtype: torch.dtype,
        device: torch.device,
        stream: torch.cuda.Stream,
    ) -> None:
        super().__init__(experts, stream)
        self._forward, self._config = forward, config
        self.cache, self._dtype = cache, dtype
        self.ids_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._positions_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._length = torch.zeros(1, dtype=torch.int64, device=device)
        self._real_BC = torch.ones(batch, context, dtype=torch.bool, device=device)
        self._columns_C = torch.arange(context, device=device)

    @property
    def batch(self) -> int:
        return len(self.ids_B1)

    @property
    def state(self) -> tuple[Tensor, ...]:
        layers: list[Any] = self.cache.layers
        lengths = (layer.cumulative_length for layer in layers)
        return self.ids_B1, self._positions_B1, self._length, *lengths

    def twin(self, experts: ExpertsCall) -> DecodeStep:
        """The same step with other kernels for its experts: either may run next."""
        twin = copy.copy(self)
        twin.experts, twin.logits_BV, twin.outcome, twin._graph = experts, None, None, None
        return twin

    def start(self, length: int, positions_B: Tensor, real_BT: Tensor | None) -> None:
        """Take over after a prefill of `length` tokens a row; real_BT is False for padding."""
        self._length.fill_(length)
        self._positions_B1.copy_(positions_B[:, None])
        self._real_BC.fill_(True)
        if real_BT is not None:
            self._real_BC[:, : real_BT.shape[1]] = real_BT
        self.cache.set_length(length)

    def forward(self) -> Tensor:
        output = self._forward(
            input_ids=self.ids_B1,
            position_ids=self._positions_B1,
            attention_mask=self._masks(),
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    def advance(self, next_B: Tensor) -> None:
        self.ids_B1.copy_(next_B[:, None])
        self._positions_B1.add_(1)
        self._length.add_(1)

    def _masks(self) -> Tensor | dict[str, Tensor]:
        """The mask of each row's new token, in the form its attention implementation takes."""
        seen_BC = self._real_BC & (self._columns_C <= self._length)
        types = attention_types(self._config)
        if len(types) == 1:
            return self._as_mask(seen_BC, *types)
        return {kind: self._as_mask(seen_BC, kind) for kind in types}

    def _as_mask(self, seen_BC: Tensor, kind: str) -> Tensor:
        if kind == "sliding_attention":
            seen_BC = seen_BC & (self._columns_C > self._length - self._config.sliding_window)
        mask_B11C = seen_BC[:, None, None]
        if self._config._attn_implementation == "eager":
            lowest = torch.finfo(self._dtype).min
            return torch.zeros_like(mask_B11C, dtype=self._dtype).masked_fill(~mask_B11C, lowest)
        return mask_B11C
