"""Test bench of the kernels over experts in codes: their results checked, then timed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.common.encodings import ENCODINGS
from benchmarks.kernels.bench import Bench
from benchmarks.kernels.candidates import coded_blocks, tiles
from benchmarks.kernels.random_parts import fill
from benchmarks.kernels.report import TimedKernel
from runtime.cuda.decode.experts.blocks import Blocks
from runtime.cuda.decode.experts.experts_call import FETCHERS, ExpertsCall
from runtime.cuda.memory.expert_block import ExpertBlock
from runtime.cuda.memory.kernel_layout import activate
from runtime.cuda.memory.unpacking import unpack_blocks
from runtime.cuda.prefill.products import Products, Work
from runtime.cuda.prefill.tiling import Tile, Tiling
from runtime.weights.arena import Specs
from runtime.weights.encodings.coded import CodedMatrix, part_name

GROUPED = "grouped_gate_up", "grouped_down"
TOLERANCE = 2e-2
"""Of results in bfloat16, relative to the length of the true ones."""


class CodedBench(Bench):
    """One layer's experts in an encoding, all resident."""

    def __init__(
        self, shape: str, encoding: str, device: torch.device, repeats: int, *, is_real: bool = True
    ) -> None:
        self._encoding, self._is_real = encoding, is_real
        super().__init__(shape, device, repeats)

    def _fill(self, specs: Specs) -> None:
        coding = {}
        for name, stacked in (("gate_up_proj", 2), ("down_proj", 1)):
            rows, columns = specs[name].shape
            encoding = ENCODINGS[self._encoding](rows // stacked, columns)
            coding[name] = CodedMatrix(encoding, (rows, columns), False)
        block = self._block = ExpertBlock(specs, coding=coding)
        sizes = (self._num_experts, block.stored_units), (self._num_experts, block.units)
        if not self._is_real:
            nothing = torch.zeros((), dtype=torch.int16)
            self._slots_SN, self._weights_EN = (nothing.expand(size) for size in sizes)
            return
        self._slots_SN, self._weights_EN = (
            torch.zeros(size, dtype=torch.int16, device=self._device) for size in sizes
        )
        stored = block.stored_views(self._slots_SN)
        decoded = block.views(self._weights_EN)
        for name, matrix in coding.items():
            parts = {part: stored[part_name(name, part)] for part in matrix.parts}
            fill(parts, divides=getattr(matrix.encoding, "divides", False))
            for expert in range(self._num_experts):
                one = {part: tensor[expert] for part, tensor in parts.items()}
                matrix.decode(one, decoded[name][expert])
        for name in decoded.keys() - coding.keys():
            stored[name].normal_(0, 0.02)
            decoded[name].copy_(stored[name])

    def _candidates(self, kernel: str, in_use: Blocks) -> list[Blocks]:
        return coded_blocks(kernel, in_use, self._layout)

    def _in_use(self, batch: int) -> Blocks:
        return Blocks.of(batch, self._layout, self._block)

    # ------------------------------------------------------------------ correctness

    def check(self, batch: int) -> None:
        """Raise AssertionError unless the kernels decode exactly and compute what float32 does."""
        picked = torch.arange(self._num_experts, dtype=torch.int32, device=self._device)
        decoded_EN = torch.full_like(self._weights_EN, 0x7FC1)
        unpack_blocks(self._block, self._slots_SN, picked, decoded_EN)
        found, known = self._block.views(decoded_EN), self._block.views(self._weights_EN)
        for name, known_E in known.items():
            bits = found[name].view(torch.int16) != known_E.view(torch.int16)
            assert not bits.any(), f"{int(bits.sum())} weights of {name} are decoded to others"
        call, x, ids, weights = self._planned(batch, 0)
        expected = self._expected(x, ids, weights)
        for kernel in ("gate_up", "down"):
            for blocks in self._candidates(kernel, self._in_use(batch)):
                call._blocks = blocks
                call._run_gate_up(0, x, FETCHERS)
                y = call._run_down(0, x, ids, weights)
                error = (y.float() - expected).norm() / expected.norm()
                assert error < TOLERANCE, f"{kernel} with {blocks}: wrong by {error:.2g}"

    def _expected(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The experts call by torch, in float32."""
        views, layout = self._block.views(self._weights_EN), self._layout
        y = torch.zeros(x.shape, device=x.device)
        for expert in ids.unique().tolist():
            token, place = (ids == expert).nonzero(as_tuple=True)
            one = {name: view[expert].float() for name, view in views.items()}
            h = x[token].float() @ one["gate_up_proj"].T + one.get("gate_up_proj_bias", 0.0)
            h = activate(h, layout)
            z = h @ one["down_proj"].T + one.get("down_proj_bias", 0.0)
            y.index_add_(0, token, z * weights[token, place][:, None].float())
        return y

    # ------------------------------------------------------------------ prefill

    def _torch_grouped(self, num_tokens: int, ends: list[int]) -> Iterator[TimedKernel]:
        return iter(())

    def _unpacking(self, num_tokens: int, num_used: int) -> Iterator[TimedKernel]:
        yield self._decoding(num_tokens, num_used)

    def _decoding(self, num_tokens: int, num_used: int) -> TimedKernel:
        """Decoding, which comes before the grouped products; its bytes are read and written."""
        picked = torch.arange(num_used, dtype=torch.int32, device=self._device)
        to_EN = torch.empty_like(self._weights_EN)
        launch = partial(unpack_blocks, self._block, self._slots_SN, picked, to_EN)
        num_bytes = 2 * num_used * (self._block.stored_units + self._block.units)
        seconds = self._seconds(launch)
        return TimedKernel("decode", num_tokens, "-", True, seconds, num_bytes, 0.0)

    # ------------------------------------------------------------------ compiling ahead

    def compile(self, kernel: str, batch: int, number: int) -> None:
        """Launch one candidate, where launches only compile. batch: or tokens of a prompt."""
        if kernel in GROUPED:
            self._compile_grouped(kernel, batch, number)
            return
        call: ExpertsCall = self._call(batch)
        call._blocks = self._candidates(kernel, self._in_use(batch))[number]
        x = torch.zeros(batch, self._layout.hidden, dtype=self._layout.dtype)
        if kernel == "gate_up":
            call._run_gate_up(0, x, FETCHERS)
        else:
            ids = torch.zeros(batch, self._top_k, dtype=torch.int64)
            call._run_down(0, x, ids, torch.rand(batch, self._top_k))

    def _compile_grouped(self, kernel: str, num_tokens: int, number: int) -> None:
        tile = self._grouped_tiles(kernel, num_tokens)[number]
        products = Products(self._block, self._slots_SN, self._layout)
        work = Work.of(self._top_k, self._num_experts, self._layout, self._device)
        x = torch.zeros(1, self._layout.hidden, dtype=self._layout.dtype)
        if kernel == GROUPED[0]:
            products.run_gate_up(x, self._top_k, work, tile, 0, 1)
        else:
            products.run_down(work, tile, 0, 1)

    def _grouped_tiles(self, kernel: str, num_tokens: int) -> list[Tile]:
        used = Tiling.of(num_tokens * self._top_k, self._num_experts, self._block).tiles
        in_use = used.gate_up if kernel == GROUPED[0] else used.down
        return tiles(used.rows, in_use, is_plain=False)

    def jobs(self, batches: list[int], prompts: list[int]) -> Iterator[tuple[str, int, int]]:
        """The arguments of every `compile`."""
        for prompt in prompts:
            for kernel in GROUPED:
                for number in range(len(self._grouped_tiles(kernel, prompt))):
                    yield kernel, prompt, number
        for batch in batches:
            in_use = self._in_use(batch)
            for kernel in ("gate_up", "down"):
                for number in range(len(self._candidates(kernel, in_use))):
                    yield kernel, batch, number
