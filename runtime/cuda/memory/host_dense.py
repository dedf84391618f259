"""Token embedding and output head in host memory, where a budget is too small for them.

An embedding reads one row a token: from host memory that costs microseconds. The head reads all of
its weight once a step; it leaves the device only when the experts' slots would not fit otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from runtime.cuda.kernels.unpacked import rows_of
from runtime.cuda.memory.pinned import PinnedMemory

MOST_ROWS = 32
"""Tokens that one launch of the head serves."""


@triton.jit
def gather(table, ids, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows `ids` of `table` [V, WIDTH]. Grid (ids, blocks of WIDTH)."""
    row = tl.load(ids + tl.program_id(0))
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(table + row * WIDTH + column, mask=column < WIDTH)
    tl.store(out + tl.program_id(0).to(tl.int64) * WIDTH + column, values, mask=column < WIDTH)


@triton.jit(do_not_specialize=["num_tokens"])
def project(
    x, weight, bias, y, num_tokens, V, H: tl.constexpr, HAS_BIAS: tl.constexpr,
    M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Y [B, V] = x [B, H] weight^T, every row of the weight read once. Grid (blocks of V,)."""
    row_N = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_N = row_N < V
    y_MN = rows_of(x, weight, row_N, mask_N, num_tokens, H, M, BLOCK_N, BLOCK_H)
    if HAS_BIAS:
        y_MN += tl.load(bias + row_N, mask=mask_N, other=0.0).to(tl.float32)[None, :]
    token_M = tl.arange(0, M)
    mask_MN = (token_M < num_tokens)[:, None] & mask_N[None, :]
    tl.store(y + token_M[:, None] * V + row_N[None, :], y_MN.to(y.dtype.element_ty), mask=mask_MN)


class HostDense:
    """The embedding (and head) of `model` that stay in host memory until `restore`.

    missing: bytes that the device is short of. As few modules as possible leave it.
    """

    def __init__(self, model: Any, missing: int) -> None:
        self._memory = PinnedMemory()
        self._moved: list[tuple[nn.Module, nn.Parameter]] = []
        self._hooks: list[RemovableHandle] = []
        self.num_bytes = 0
        for modules in _candidates(model):
            if self.num_bytes >= missing:
                break
            self._move(modules)

    def _move(self, modules: list[nn.Module]) -> None:
        """Take one weight, which `modules` share, off the device."""
        parameter: Any = modules[0].weight
        parameter.data = parameter.data.to("cpu").contiguous()
        self._memory.register(parameter.data)
        self.num_bytes += parameter.nbytes
        for module in modules:
            self._moved.append((module, parameter))
            module._parameters.pop("weight")
            module.__dict__["weight"] = parameter.data
            run = embed if isinstance(module, nn.Embedding) else head
            module.forward = partial(run, module)
            self._hooks.append(module._register_state_dict_hook(_list_weight))
            self._hooks.append(module.register_load_state_dict_pre_hook(_load_weight))

    def restore(self) -> None:
        """Give the modules their parameters back, in ordinary host memory."""
        self._memory.close()
        while self._hooks:
            self._hooks.pop().remove()
        while self._moved:
            module, parameter = self._moved.pop()
            module.__dict__.pop("forward", None)
            module.__dict__.pop("weight", None)
            module._parameters["weight"] = parameter


def _list_weight(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Put the weight into a state dict, which it would be missing from."""
    state_dict[f"{prefix}weight"] = module.weight


def _load_weight(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take the weight out of a state dict, in which it would be an unexpected key."""
    weight = state_dict.pop(f"{prefix}weight", None)
    if weight is not None:
        module.weight.copy_(weight)


def _candidates(model: Any) -> Iterator[list[nn.Module]]:
    """Plain embeddings and heads, those that share a weight together, cheapest to move first.

    A module whose forward was replaced stays on the device.
    """
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    is_plain = type(embedding) is nn.Embedding and embedding.max_norm is None
    is_tied = output is not None and is_plain and output.weight is embedding.weight
    together = [embedding, output] if is_tied else [embedding]
    if is_plain and not any("forward" in module.__dict__ for module in together):
        yield together
    if type(output) is nn.Linear and not is_tied and "forward" not in output.__dict__:
        yield [output]


def movable_bytes(model: Any) -> int:
    """Bytes that `HostDense` can keep off the device."""
    weights: list[Any] = [modules[0].weight for modules in _candidates(model)]
    return sum(weight.nbytes for weight in weights)


def embed(module: Any, ids: Tensor) -> Tensor:
    """The embedding's forward, its table in host memory."""
    width = module.weight.shape[1]
    out = torch.empty(*ids.shape, width, dtype=module.weight.dtype, device=ids.device)
    block = min(1024, triton.next_power_of_2(width))
    gather[(ids.numel(), triton.cdiv(width, block))](
        module.weight, ids.contiguous(), out, WIDTH=width, BLOCK=block
    )
    return out


def head(module: Any, x: Tensor) -> Tensor:
    """The linear head's forward, its weight in host memory."""
    vocabulary, hidden = module.weight.shape
    x_TH = x.reshape(-1, hidden).contiguous()
    y_TV = torch.empty(len(x_TH), vocabulary, dtype=x.dtype, device=x.device)
    for start in range(0, len(x_TH), MOST_ROWS):
        rows_BH = x_TH[start : start + MOST_ROWS]
        padded = 1 if len(rows_BH) == 1 else max(16, triton.next_power_of_2(len(rows_BH)))
        columns = min(512 if padded == 1 else 128, triton.next_power_of_2(hidden))
        project[(triton.cdiv(vocabulary, 16),)](
            rows_BH, module.weight, module.weight if module.bias is None else module.bias,
            y_TV[start:], len(rows_BH), vocabulary, H=hidden, HAS_BIAS=module.bias is not None,
            M=padded, BLOCK_N=16, BLOCK_H=max(16, columns),
        )  # fmt: skip
    return y_TV.view(*x.shape[:-1], vocabulary)
