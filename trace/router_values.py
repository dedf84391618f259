"""Router logits and router inputs of every MoE block, recorded while the model runs.

Logits are those that transformers itself reports as `router_logits`: the output of the model's
router class that `_can_record_outputs` names. B sequences, T tokens, L MoE layers, M logits kept,
H hidden size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from routing.blocks import Block, find_blocks
from routing.layers import MoELayer
from routing.shards import experts_dtype
from routing.topology import Topology
from routing.trace_format.extras import Extras, RouterLogits

RECORDED = "router_logits"


class Router(NamedTuple):
    """A module that computes router logits."""

    module: nn.Module
    place: int
    """The logits' place in its output."""


class RouterValues:
    """Hooks on every MoE block of a model; `take` returns what was recorded since the last.

    Raises ValueError for architectures whose logits or router inputs cannot be read.
    """

    def __init__(self, model: nn.Module, extras: Extras) -> None:
        self.extras = extras
        self._blocks = find_blocks(model)
        self._routers = (
            {block.layer.name: _router(model, block) for block in self._blocks}
            if extras.router_logits
            else {}
        )
        self._running: set[str] = set()
        self._logits: dict[str, list[RouterLogits]] = defaultdict(list)
        self._hidden: dict[str, list[np.ndarray]] = defaultdict(list)

    def hooks(self) -> Iterator[RemovableHandle]:
        """Register the hooks, and yield their handles.

        They must be registered after those that run routers early: a router is read once for each
        call of its block.
        """
        for block in self._blocks:
            stack = [b.layer.name for b in self._blocks if b.layer.stack == block.layer.stack]
            keep = stack.index(block.layer.name) in self.extras.hidden
            enter = self._enter(block, keep)
            yield block.module.register_forward_pre_hook(enter, with_kwargs=True)
            router = self._routers.get(block.layer.name)
            if router is not None:
                yield router.module.register_forward_hook(self._read(block.layer, router.place))

    def _enter(self, block: Block, keep: bool) -> Any:
        name = block.layer.name

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._running.add(name)
            if keep:
                hidden = block.hidden(args, kwargs)
                rows_NH = hidden.reshape(-1, hidden.shape[-1]).half().cpu().numpy()
                self._hidden[name].append(_finite(rows_NH, self.extras.hidden_size, name))

        return enter

    def _read(self, layer: MoELayer, index: int) -> Any:
        count = self.extras.router_logits

        def read(_: nn.Module, __: Any, output: Any) -> None:
            if layer.name not in self._running:
                return
            self._running.discard(layer.name)
            logits = output[index] if isinstance(output, tuple | list) else output
            if logits.shape[-1] != layer.num_experts:
                raise ValueError(
                    f"{layer.name}: its router gives {logits.shape[-1]} logits for "
                    f"{layer.num_experts} experts: they cannot be recorded"
                )
            self._logits[layer.name].append(_highest(logits, count))

        return read

    def take(
        self, layers: Sequence[MoELayer], batch_size: int
    ) -> tuple[RouterLogits | None, dict[int, np.ndarray]]:
        """Logits [B, T, L, M], and router inputs [B, T, H] by layer, since the last `take`."""
        router = None
        if self.extras.router_logits:
            found = [_joined(self._logits.pop(layer.name, []), batch_size) for layer in layers]
            dtype = experts_dtype(max(layer.num_experts for layer in layers))
            router = RouterLogits(
                np.stack([one.experts_TLM for one in found], 2).astype(dtype),
                np.stack([one.logits_TLM for one in found], 2),
            )
        hidden = {
            index: _rows(self._hidden.pop(layers[index].name), batch_size)
            for index in self.extras.hidden
        }
        return router, hidden


def _finite(rows_NH: np.ndarray, hidden_size: int, name: str) -> np.ndarray:
    if rows_NH.shape[-1] != hidden_size:
        raise ValueError(
            f"{name} reads {rows_NH.shape[-1]} values a token, not the model's {hidden_size}: its "
            "router inputs cannot be recorded"
        )
    if not np.isfinite(rows_NH).all():
        raise ValueError(f"{name}: a router input is NaN or beyond float16, and cannot be recorded")
    return rows_NH


def _highest(logits: Tensor, count: int) -> RouterLogits:
    """The `count` highest of each row, [N, M]; expert 0 at -inf where there are fewer experts."""
    rows_NE = logits.reshape(-1, logits.shape[-1]).float()
    top = rows_NE.topk(min(count, rows_NE.shape[-1]), dim=-1)
    missing = (0, count - top.values.shape[-1])
    values_NM = nn.functional.pad(top.values, missing, value=-torch.inf)
    experts_NM = nn.functional.pad(top.indices, missing)
    return RouterLogits(experts_NM.to(torch.int32).cpu().numpy(), values_NM.half().cpu().numpy())


def _joined(calls: Sequence[RouterLogits], batch_size: int) -> RouterLogits:
    """Consecutive calls, [B x T', M] each, as [B, T, M]."""
    return RouterLogits(*(_rows(part, batch_size) for part in zip(*calls, strict=True)))


def _rows(calls: Sequence[np.ndarray], batch_size: int) -> np.ndarray:
    return np.concatenate([rows.reshape(batch_size, -1, rows.shape[-1]) for rows in calls], 1)


def _router(model: nn.Module, block: Block) -> Router:
    """The module whose output transformers reports as the logits of this block."""
    for wanted in _recorders(model):
        for module in block.module.modules():
            if isinstance(module, getattr(wanted, "target_class", wanted)):
                return Router(module, int(getattr(wanted, "index", 0)))
    raise ValueError(
        f"{type(model).__name__} does not say where its router logits are: record without "
        "--router-logits"
    )


def _recorders(model: nn.Module) -> list[Any]:
    """What the classes within the model declare: `OutputRecorder`s of router logits, or classes."""
    found: list[Any] = []
    for module in model.modules():
        recorded = (getattr(type(module), "_can_record_outputs", None) or {}).get(RECORDED)
        for one in recorded if isinstance(recorded, list) else [recorded]:
            is_one = isinstance(one, type) or hasattr(one, "target_class")
            if is_one and one not in found:
                found.append(one)
    return found


def extras_of(model: Any, topology: Topology, logits: int, hidden: Sequence[int]) -> Extras:
    """What a trace of this model holds beside the routes. Raises ValueError for what it cannot."""
    for stack in topology.stacks:
        if logits > stack.num_experts:
            raise ValueError(
                f"--router_logits {logits}: the {stack.name} has {stack.num_experts} experts"
            )
        wrong = [layer for layer in hidden if not 0 <= layer < stack.num_layers]
        if wrong:
            raise ValueError(
                f"--hidden {' '.join(map(str, wrong))}: the {stack.name} has MoE layers 0 to "
                f"{stack.num_layers - 1}"
            )
    size = model.config.get_text_config().hidden_size if hidden else 0
    return Extras(router_logits=logits, hidden=tuple(sorted(set(hidden))), hidden_size=size)
