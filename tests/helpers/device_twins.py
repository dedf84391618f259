"""The GPU engine's parts on the CPU: records and books in ordinary memory, kernels interpreted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.cache.expert_cache import ExpertCache
from runtime.cache.policy import Policy
from runtime.cuda.decode.device_cache import DeviceCache
from runtime.cuda.decode.experts.experts_call import ExpertsCall
from runtime.cuda.memory.expert_block import ExpertBlock
from runtime.cuda.memory.kernel_layout import KernelLayout, activate
from runtime.weights.arena import Spec, Specs
from runtime.weights.encodings.coded import CodedMatrix, Coding, part_name
from runtime.weights.encodings.encoding import CODES, SCALES, Encoding
from runtime.weights.packed.packing import PATCHES
from tests.helpers import interpreter

interpreter.mend()


class Twin:
    """Layers of random experts with slots, books and an experts call, all on the CPU."""

    def __init__(
        self,
        policy: Policy,
        *,
        num_layers: int = 2,
        num_experts: int = 12,
        top_k: int = 3,
        num_slots: int = 8,
        batch: int = 1,
        num_ranges: int = 1,
        packed: bool = False,
        encoding: Callable[[int, int], Encoding] | None = None,
        **layout: Any,
    ) -> None:
        given: dict[str, Any] = {"hidden": 40, "width": 24}
        given |= {"activation": "silu", "alternating": False}
        given |= {"transposed": False, "has_bias": False, "dtype": torch.float32}
        self.layout = KernelLayout(**(given | layout))
        self.packed = packed
        specs = specs_of(self.layout)
        coding = coding_of(specs, encoding) if encoding else None
        self.expert_block = ExpertBlock(specs, PATCHES[0] if packed else 0, coding)
        shape = num_layers, num_experts, self.expert_block.units
        self.expert_blocks = torch.zeros(shape, dtype=torch.int16)
        for view in self.expert_block.views(self.expert_blocks).values():
            view.copy_(torch.randn(view.shape) * 0.3)
        self.layers = [self._layer(expert_blocks) for expert_blocks in self.expert_blocks]
        self.cache = ExpertCache(num_layers, num_experts, num_slots, policy)
        self.device_cache = DeviceCache(self.cache, num_layers, torch.device("cpu"))
        self.device_cache.upload()
        self.slots_SN = torch.zeros(num_slots, self.expert_block.stored_units, dtype=torch.int16)
        host: Any = self
        self.call = ExpertsCall(
            batch, top_k, self.layout, self.expert_block, self.slots_SN, host, self.device_cache,
            num_ranges=num_ranges,
        )  # fmt: skip

    def _layer(self, records_EN: Tensor) -> Tensor:
        if self.expert_block.coding:
            return draw_coded(self.expert_block, records_EN)
        if not self.expert_block.patches:
            return records_EN
        stored = [self.expert_block.store(block_N) for block_N in records_EN]
        return torch.stack([one for one in stored if one is not None])

    def fetched(self) -> list[int]:
        """Experts that the last call of each layer had to fetch."""
        return self.call.read(self.call.ledger.numpy()).num_fetched_L.tolist()

    def expected(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The experts call, straight from the weights, in float32."""
        views = self.expert_block.views(self.expert_blocks[layer])
        parameters = {name: view.float() for name, view in views.items()}
        y = torch.zeros(x.shape, dtype=torch.float32)
        for token in range(len(x)):
            for expert, weight in zip(ids[token].tolist(), weights[token].float(), strict=True):
                if 0 <= expert < len(self.expert_blocks[layer]):
                    y[token] += weight * self._run(parameters, expert, x[token].float())
        return y

    def _run(self, parameters: dict[str, Tensor], expert: int, x_H: Tensor) -> Tensor:
        name, _ = self.layout.matrices
        h = parameters[name][expert] @ x_H
        if self.layout.has_bias:
            h = h + parameters[f"{name}_bias"][expert]
        h = activate(h, self.layout)
        y = parameters["down_proj"][expert] @ h
        return y + parameters["down_proj_bias"][expert] if self.layout.has_bias else y


def specs_of(layout: KernelLayout) -> dict[str, Spec]:
    """The parameters of one expert, as stored."""
    name, _ = layout.matrices
    rows = layout.width if name == "up_proj" else 2 * layout.width
    shapes: dict[str, tuple[int, ...]] = {name: (rows, layout.hidden)}
    shapes["down_proj"] = layout.hidden, layout.width
    if layout.has_bias:
        shapes |= {f"{name}_bias": (rows,), "down_proj_bias": (layout.hidden,)}
    return {name: Spec(size, layout.dtype) for name, size in shapes.items()}


def coding_of(specs: Specs, encoding: Callable[[int, int], Encoding]) -> Coding:
    """Both matrices in an encoding, given by the size [N, K] of one of those that are stacked."""
    coding = {}
    for name, stacked in (("gate_up_proj", 2), ("up_proj", 1), ("down_proj", 1)):
        if name not in specs:
            continue
        rows, columns = specs[name].shape
        coding[name] = CodedMatrix(encoding(rows // stacked, columns), (rows, columns), False)
    return coding


def draw_coded(block: ExpertBlock, blocks_EN: Tensor) -> Tensor:
    """Random blocks in codes, and what they decode to in plain ones, which are filled."""
    stored_EN = torch.zeros(len(blocks_EN), block.stored_units, dtype=torch.int16)
    decoded, stored = block.views(blocks_EN), block.stored_views(stored_EN)
    for name, view in decoded.items():
        if name not in block.coding:
            stored[name].copy_(view)
            continue
        matrix = block.coding[name]
        parts = {part: stored[part_name(name, part)] for part in matrix.parts}
        draw_parts(parts)
        for expert in range(len(blocks_EN)):
            one = {part: tensor[expert] for part, tensor in parts.items()}
            matrix.decode(one, view[expert])
    return stored_EN


def draw_parts(parts: Mapping[str, Tensor]) -> None:
    """Fill the parts of matrices so that weights are about 0.3."""
    for name, part in parts.items():
        if name == CODES and part.dtype == torch.uint8:
            part.random_(0, 256)
        elif name == CODES:
            part.copy_((torch.randn(part.shape) * 60).clamp(-448, 448))
        elif part.dtype == torch.uint8:
            part.random_(*((122, 126) if name == SCALES else (0, 16)))
        elif part.dtype == torch.float8_e4m3fn:
            part.copy_(torch.rand(part.shape) * 40 + 1)
        else:
            part.copy_(torch.rand(part.shape) * 6e-3 + 1e-3)


def routes(rng: np.random.Generator, batch: int, num_experts: int, top_k: int) -> Tensor:
    """Random routes, int64 [B, K], each token's experts distinct."""
    rows = [rng.permutation(num_experts)[:top_k] for _ in range(batch)]
    return torch.from_numpy(np.stack(rows))
