"""Everything of the GPU engine for one model: which steps run captured, and what runs the others.

generate -> prefill (the model's forward, experts streamed) -> captured step, step, ...
"""

from __future__ import annotations

import copy
import time
import warnings
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers.generation.configuration_utils import GenerationMode

from routing.layers import MoELayer
from routing.topology import NO_EXPERT
from runtime.cuda.books import Books
from runtime.cuda.experts import ExpertsCall, Ledger
from runtime.cuda.host import HostTier
from runtime.cuda.kv import SharedCache, Storage, unsupported
from runtime.cuda.layout import Layout
from runtime.cuda.loop import Prompt, decode, takes_over
from runtime.cuda.op import PATHS
from runtime.cuda.oracle import Job, Oracle
from runtime.cuda.step import DecodeStep
from runtime.cuda.streamed import StreamedPool
from runtime.loader import Source
from runtime.policies import Policy
from runtime.stats import Stats

LARGEST_BATCH = 32
"""Sequences: beyond, decode kernels would compute more than they load."""


class Outcome(NamedTuple):
    """What a step gave."""

    tokens_B: list[int]
    """The greedy choice."""
    logits_BV: Tensor


class CapturedPath:
    """Captured decoding of `source`'s model.

    context: most tokens of a sequence. batch: most sequences at once. compile: fuse the model's
    own operations with torch.compile before capturing.
    """

    def __init__(
        self,
        source: Source,
        layout: Layout,
        pool: StreamedPool,
        host: HostTier,
        policy: Policy,
        stats: Stats,
        routers: list[nn.Module | None],
        *,
        context: int,
        batch: int,
        prefetch: bool,
        compile: bool,
    ) -> None:
        model: Any = source.model
        self._model = model
        self._config: Any = model.config.get_text_config(decoder=True)
        self._layout, self._pool, self._host = layout, pool, host
        self._policy, self._stats = policy, stats
        self._context, self._batch, self._prefetch = context, batch, prefetch
        self._top_k = max(layer.top_k for layer in source.layers)
        self.books = Books(pool.cache, len(source.layers), pool.device)
        self._routers = routers
        self._storage = Storage(batch, context)
        self._steps: dict[int, DecodeStep] = {}
        self._forward: Any = torch.compile(model.forward) if compile else model.forward
        self._running: ExpertsCall | None = None
        self.oracle: Oracle | None = None
        self.last_routes_LBK: np.ndarray | None = None
        self._outcome_host: Tensor | None = None
        self.why: str | None = "nothing has been generated yet"
        PATHS[id(self._model)] = self

    # ------------------------------------------------------------------ generate

    def generate(self, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """The model's `generate`, decoding captured where it can."""
        self.why = self._objection(generation_config, kwargs)
        if self.why is None:
            kwargs["custom_generate"] = partial(self._decode, streamer=kwargs.get("streamer"))
        else:
            self._complain()
        return type(self._model).generate(self._model, inputs, generation_config, **kwargs)

    def _objection(self, generation_config: Any, kwargs: dict[str, Any]) -> str | None:
        if (reason := unsupported(self._config)) is not None:
            return reason
        for name in ("past_key_values", "custom_generate", "inputs_embeds"):
            if kwargs.get(name) is not None:
                return f"{name} is given"
        config = copy.deepcopy(generation_config or self._model.generation_config)
        config.update(**kwargs)
        mode = config.get_generation_mode(kwargs.get("assistant_model"))
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            return f"{mode.value} is not captured"
        return takes_over(config)

    def _complain(self) -> None:
        warnings.warn(f"decoding runs outside of CUDA graphs: {self.why}", stacklevel=3)

    def _decode(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        num_rows, longest = len(input_ids), generation_config.max_length
        if num_rows > self._batch:
            self.why = f"{num_rows} sequences at once, load(..., batch={self._batch})"
        elif longest > self._context:
            self.why = f"up to {longest} tokens are asked for, load(..., context={self._context})"
        if self.why is not None:
            self._complain()
            return type(model)._sample(
                model, input_ids, logits_processor, stopping_criteria, generation_config,
                synced_gpus=synced_gpus, streamer=streamer, **model_kwargs,
            )  # fmt: skip
        prompt = Prompt(
            input_ids,
            model_kwargs,
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer,
        )
        step = self._step_for(num_rows)
        return decode(
            prompt, partial(self._prefill, prompt, step), partial(self._run, step, num_rows)
        )

    # ------------------------------------------------------------------ prefill

    def _prefill(self, prompt: Prompt, step: DecodeStep) -> Tensor:
        """Run the prompt; rows beyond the batch repeat its last sequence."""
        num_rows, bucket = len(prompt.input_ids_BT), len(step.ids_B1)
        rows = torch.arange(bucket, device=prompt.input_ids_BT.device).clamp_(max=num_rows - 1)
        kwargs = {name: _rows(value, rows, num_rows) for name, value in prompt.model_kwargs.items()}
        step.cache.reset()
        kwargs["past_key_values"] = step.cache
        inputs = self._model.prepare_inputs_for_generation(
            prompt.input_ids_BT[rows], is_first_iteration=True, **kwargs
        )
        logits_BV = self._model(**inputs, return_dict=True).logits[:, -1]
        length = prompt.input_ids_BT.shape[1]
        positions = kwargs.get("position_ids")
        next_B = rows * 0 + length if positions is None else positions[:, -1] + 1
        mask = kwargs.get("attention_mask")
        step.start(length, next_B, None if mask is None else mask.bool())
        self._positions_B = next_B[:num_rows].cpu().numpy()
        return logits_BV[:num_rows]

    # ------------------------------------------------------------------ steps

    def _step_for(self, num_rows: int) -> DecodeStep:
        bucket = next(size for size in _buckets(self._batch) if size >= num_rows)
        if bucket not in self._steps:
            self._steps[bucket] = self._build(bucket)
        return self._steps[bucket]

    def _build(self, bucket: int) -> DecodeStep:
        experts = ExpertsCall(
            bucket, self._top_k, self._layout, self._pool.record, self._pool.slots_SN, self._host,
            self.books, prefetch=self._prefetch, routers=self._routers,
            forecast=None if self.oracle is None else self.oracle.likely,
        )  # fmt: skip
        if experts.max_used > self._pool.num_slots:
            raise ValueError(
                f"{bucket} sequences can need {experts.max_used} experts of a layer at once, but "
                f"there are {self._pool.num_slots} slots; give more memory or fewer sequences"
            )
        return DecodeStep(
            self._forward, self._config, SharedCache(self._storage, self._config.num_hidden_layers),
            experts, batch=bucket, context=self._context, dtype=self._model.dtype,
            device=self._pool.device,
        )  # fmt: skip

    def _run(self, step: DecodeStep, num_rows: int, tokens_B: Tensor | None) -> Outcome:
        """Predict, schedule, run, account: one decode step."""
        start = time.perf_counter()
        if tokens_B is not None:
            self._tokens_B = tokens_B.cpu().numpy()
            padding = len(step.ids_B1) - num_rows
            step.ids_B1[:, 0] = torch.cat([tokens_B, tokens_B[-1:].expand(padding)])
        self._schedule()
        self._running = step.experts
        try:
            step()
        finally:
            self._running = None
        self._announce()
        outcome = self._account(step, num_rows)
        self._stats.add_time("step", time.perf_counter() - start)
        return outcome

    def _schedule(self) -> None:
        """Bring the values on the device up to the step that is about to run."""
        if not self.books.on_device:
            self._pool.settle()
            self.books.upload()
        if self.oracle is not None and self.oracle.failure is None:
            self.oracle.begin_step()
            return
        table = self._policy.table()
        if table is not None:
            self.books.write_table(*table)

    def _announce(self) -> None:
        """Tell the predictor what runs now. The step is on its way already."""
        if self.oracle is None:
            return
        job = Job(self._tokens_B[:, None], self._positions_B[:, None], self.last_routes_LBK, False)
        self.oracle.submit(job)
        self._positions_B = self._positions_B + 1

    def _account(self, step: DecodeStep, num_rows: int) -> Outcome:
        """Wait for the step, count what it did."""
        assert step.outcome is not None and step.logits_BV is not None
        bucket = len(step.ids_B1)
        outcome = self._to_host(step.outcome)
        best_B = outcome[:num_rows].view(np.float32)
        if np.isnan(best_B).any():
            raise FloatingPointError(
                "the model's logits are NaN: a weight or an activation is not finite"
            )
        tokens_B = outcome[bucket : bucket + num_rows]
        ledger = step.experts.read(outcome[2 * bucket :])
        self._count(ledger, num_rows)
        self._tokens_B = tokens_B.astype(np.int64)
        self.last_routes_LBK = np.where(
            ledger.routes_LBK < self.books.num_experts, ledger.routes_LBK, NO_EXPERT
        )[:, :num_rows].astype(np.int64)
        if self.oracle is None or self.oracle.failure is not None:
            self._touch(self.last_routes_LBK)
        return Outcome(tokens_B.tolist(), step.logits_BV[:num_rows])

    def _to_host(self, outcome: Tensor) -> np.ndarray:
        if self._outcome_host is None or len(self._outcome_host) != len(outcome):
            self._outcome_host = torch.empty_like(outcome, device="cpu").pin_memory()
        self._outcome_host.copy_(outcome, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return self._outcome_host.numpy().copy()

    def _touch(self, routes_LBK: np.ndarray) -> None:
        """Keep a table policy on the host up to date, where no predictor does."""
        if self._policy.table() is None:
            return
        for layer, routes_BK in enumerate(routes_LBK):
            used = np.unique(routes_BK)
            self._policy.touch(layer, used[used != NO_EXPERT])
        if self._policy.needs_forecast:
            self._policy.begin_step(None)

    def _count(self, ledger: Ledger, num_rows: int) -> None:
        was_early_L = (ledger.prefetched_L >= 0) & (ledger.used_L > 0)
        num_missed_L = ledger.num_fetched_L - was_early_L
        link_bytes = self._host.link_bytes(0)
        self._stats.count_step(ledger.num_used_L, num_missed_L, link_bytes, num_rows)
        if self._prefetch:
            share_L = ledger.chunks_L / self._pool.record.num_chunks
            chosen_L = ledger.prefetched_L >= 0
            self._stats.count_prefetch(share_L, was_early_L, chosen_L, link_bytes)

    def call(self, index: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The experts call of a layer inside a captured step, also while it is being compiled."""
        if torch.compiler.is_compiling():
            return torch.ops.expertflow.experts(x, ids, weights, id(self._model), index)
        return self.run_layer(index, x, ids, weights)

    def run_layer(self, index: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The kernels of an experts call: x [B, H], ids and weights [B, K]."""
        assert self._running is not None
        return self._running(index, x, ids, weights)

    @property
    def is_running(self) -> bool:
        """Whether the model's forward runs as (the capture of) a decode step right now."""
        return self._running is not None

    def close(self) -> None:
        """Give back graphs, buffers and the predictor's thread."""
        if self.oracle is not None:
            self.oracle.close()
        self._steps.clear()
        self._storage = Storage(self._batch, self._context)
        self._forward = None


def _buckets(batch: int) -> list[int]:
    """Powers of two up to `batch`, and `batch`."""
    return sorted({min(2**power, batch) for power in range(LARGEST_BATCH.bit_length())})


def _rows(value: Any, rows: Tensor, num_rows: int) -> Any:
    """Of tensors with one entry a sequence, the given rows; anything else as it is."""
    is_batched = isinstance(value, Tensor) and value.dim() > 0 and len(value) == num_rows
    return value[rows] if is_batched else value


def router_of(model: nn.Module, layer: MoELayer) -> nn.Module | None:
    """The router beside a layer's experts: the child whose weight is [E, *]."""
    block = model.get_submodule(layer.name.rpartition(".")[0])
    for child in block.children():
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) == layer.num_experts:
            return child
    return None
