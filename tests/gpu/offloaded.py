"""What the tests on a GPU share: models, prompts, and what transformers generates on the CPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import runtime
from runtime.cuda.decode.graph_step import CapturedStep
from tests.helpers.logits_recorder import with_logits
from tests.helpers.tiny import PAD, tiny_model

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: make test-gpu"
)

ROOT = Path(__file__).parents[2]
MOE_8X32 = ROOT / "exports/moe-8x32"
PREDICTOR = ROOT / "exports/predictors/moe-8x32.onnx"
NEW = 16
CONTEXT = 64
NEVER = 1 << 20
"""An end token that no model here can choose: None would be the model's own."""


@contextmanager
def offloaded(model: Any, **options: Any) -> Iterator[Any]:
    """The model offloaded to the GPU, and given back."""
    settings: dict[str, Any] = {
        "device": "cuda",
        "memory": 0.25,
        "context": CONTEXT,
        "batch": 5,
        "cpu_share": False,
    } | options
    model = runtime.load(model, **settings)
    try:
        yield model
    finally:
        model.expertflow.detach()


def minimum(top_k: int, num_experts: int) -> float:
    """The fraction of `num_experts` experts that one token needs."""
    return top_k / num_experts


def prompts(batch: int, length: int = 12, seed: int = 1) -> dict[str, Tensor]:
    """Random token ids and mask, on the CPU; each row but the first padded at the left."""
    ids_BT = torch.randint(2, 256, (batch, length), generator=torch.Generator().manual_seed(seed))
    padding_B1 = (torch.arange(batch) * 2 % (length - 2))[:, None]
    mask_BT = (torch.arange(length) >= padding_B1).long()
    return {"input_ids": ids_BT.masked_fill(mask_BT == 0, PAD), "attention_mask": mask_BT}


def generate(model: Any, batch: int = 1, seed: int = 1, **options: Any) -> Any:
    """Greedy tokens by default, [B, T] on the CPU."""
    inputs = {name: tensor.to(model.device) for name, tensor in prompts(batch, seed=seed).items()}
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD} | options
    output = model.generate(**inputs, **settings)
    return output.cpu() if isinstance(output, Tensor) else output


@cache
def stock_tokens(kind: str, batch: int, **options: Any) -> Tensor:
    """What the tiny model generates in transformers' own way, in float32 on the CPU."""
    tokens: Tensor = generate(tiny_model(kind), batch, **options)
    return tokens


def generate_with_logits(model: Any, batch: int = 1, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens [B, T], and the logits [B, N, V] in float32 of every new one."""
    return with_logits(generate, model, batch, **options)


def check_slots(model: Any) -> None:
    """Assert that the books are whole, and that every slot holds its owner's bits."""
    engine = model.expertflow
    engine.check_integrity()
    pool, host = engine._backend.decoder._pool, engine._backend.decoder._host
    for slot, key in enumerate(pool.cache.key_of_slot.tolist()):
        if key >= 0:
            layer, expert = divmod(key, pool.cache.num_experts)
            stored_N = host.layers[layer][expert]
            assert torch.equal(pool.slots_SN[slot].cpu(), stored_N), (layer, expert)


def forbid_waiting(patch: pytest.MonkeyPatch) -> list[CapturedStep]:
    """From now on a step that is replayed raises if it waits for the device; those that were."""
    run, watched = CapturedStep.__call__, list[CapturedStep]()

    def watch(step: CapturedStep) -> None:
        if step._graph is None:
            run(step)
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        watched.append(step)

    patch.setattr(CapturedStep, "__call__", watch)
    return watched


def allocated() -> int:
    """Bytes on the device after everything that can go has gone; libraries' workspaces too."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()
