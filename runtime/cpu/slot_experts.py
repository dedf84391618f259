"""A layer's experts out of the slots of an arena in memory, by the C kernels in torch's threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from routing.layers import MoELayer, Routes
from runtime.cpu.cores import ANY_CORE
from runtime.cpu.library import load_library
from runtime.cpu.service import CpuExperts, ExpertTable
from runtime.cpu.shape import ExpertShape, SumOrder, halving
from runtime.cpu.team import openmp_team
from runtime.weights.arena import Arena, Specs, expert_bytes
from runtime.weights.gated_experts import KernelLayout, gated_layout

MOST_TOKENS = 4
"""More tokens at once are faster in matrix products, which read a shared expert once."""
LEAST_BYTES = 1 << 20
"""Smaller experts take less time than a call does."""
LANES = 128
"""Of the sums: eight of the widest vectors, as many as hide the time of a multiply-add."""
SPIN = 5e-5
"""Seconds that threads of one's own spin, where torch's cannot be had."""

Waves = Callable[[list[int]], Iterator[tuple[list[int], list[int]]]]
"""Given distinct expert ids, yields some of them and their slots, all resident for the moment."""


def shape_of(layout: KernelLayout) -> ExpertShape:
    """The shape of plain experts, whose sums are in the order that suits a CPU."""
    order = SumOrder(columns=LANES, steps=halving(LANES))
    return ExpertShape.of(layout, order, order)


def common_shape(layers: Iterable[MoELayer], specs: Specs) -> ExpertShape | str:
    """The shape of the experts of some layers, or why the kernels do not run them.

    A rule, no trial by the clock: bits of an output must not depend on what else a machine does.
    """
    if expert_bytes(specs) < LEAST_BYTES:
        return f"experts of less than {LEAST_BYTES >> 20} MiB are faster without kernels"
    layouts = {gated_layout(layer, specs) for layer in layers}
    layout = layouts.pop()
    if layouts:
        return "layers have experts of several kinds"
    if isinstance(layout, str):
        return layout
    if layout.dtype != torch.bfloat16 or layout.transposed:
        turned = ", stored [in, out]" if layout.transposed else ""
        return f"the CPU kernels run no experts in {layout.dtype}{turned}"
    return shape_of(layout)


class SlotExperts:
    """The experts call of few tokens, out of an arena's slots.

    A token's output does not depend on slots, waves or other tokens: products are summed in one
    order, and experts in float32 in the order of the top-k.
    """

    def __init__(self, arena: Arena, shape: ExpertShape, top_k: int) -> None:
        """Raises ValueError where the kernels cannot be compiled."""
        library = load_library(shape)
        if isinstance(library, str):
            raise ValueError(library)
        tensors = arena.tensors
        parts = [
            tensors.get(name)
            for matrix in ("gate_up_proj", "down_proj")
            for name in (matrix, "", "", f"{matrix}_bias")
        ]
        addresses = [0 if part is None else part.data_ptr() for part in parts]
        strides = tuple(0 if part is None else part[0].nbytes for part in parts)
        table = ExpertTable(np.array([addresses], np.uint64), strides, arena.num_slots)
        self._team = openmp_team()
        own = 0 if self._team else torch.get_num_threads() - 1
        cores = [ANY_CORE] * own
        self._experts = CpuExperts(library, shape, table, top_k, cores=cores, spin=SPIN)

    def run(self, hidden: Tensor, routes: Routes, num_experts: int, waves: Waves) -> Tensor:
        """The experts call on hidden states [..., H], bfloat16; ids beyond the experts add 0."""
        rows_TH = hidden.flatten(0, -2).contiguous()
        ids_TK = routes.experts_TK.tolist()
        weights_TK1 = routes.weights_TK.float()[..., None]
        used = sorted({e for ids_K in ids_TK for e in ids_K if 0 <= e < num_experts})
        outputs_TKH: Tensor | None = None
        summed: list[Tensor] | None = None
        for experts, slots in waves(used):
            slot_of = dict(zip(experts, slots, strict=True))
            if all(expert in slot_of for ids_K in ids_TK for expert in ids_K):  # nothing to keep
                asked = ([slot_of[expert] for expert in ids_K] for ids_K in ids_TK)
                answers = (self._ask(*one) for one in zip(asked, rows_TH, strict=True))
                summed = _weighted(answers, weights_TK1)
                continue
            if outputs_TKH is None:
                outputs_TKH = _no_outputs(routes, rows_TH)
            for x_H, ids_K, output_KH in zip(rows_TH, ids_TK, outputs_TKH, strict=True):
                ranks = [k for k, expert in enumerate(ids_K) if expert in slot_of]
                if ranks:
                    output_KH[ranks] = self._ask([slot_of[ids_K[k]] for k in ranks], x_H)
        if summed is None:
            outputs = _no_outputs(routes, rows_TH) if outputs_TKH is None else outputs_TKH
            summed = _weighted(outputs, weights_TK1)
        return torch.stack(summed).to(hidden.dtype).view_as(hidden)

    def _ask(self, slots: list[int], x_H: Tensor) -> Tensor:
        helpers = torch.get_num_threads()
        return self._experts.ask(0, slots, x_H, helpers=helpers, team=self._team)

    def close(self) -> None:
        """Stop using the arena."""
        self._experts.close()


def _no_outputs(routes: Routes, rows_TH: Tensor) -> Tensor:
    return torch.zeros(*routes.experts_TK.shape, rows_TH.shape[1])


def _weighted(outputs_TKH: Iterable[Tensor], weights_TK1: Tensor) -> list[Tensor]:
    """The weighted sum of each token's outputs, before the next ones are asked for."""
    return [(o_KH * w_K1).sum(0) for o_KH, w_K1 in zip(outputs_TKH, weights_TK1, strict=True)]
