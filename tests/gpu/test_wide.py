"""Streamed passes and captured steps of many rows on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import runtime
from runtime.serving.request import Request
from tests.gpu.offloaded import needs_gpu
from tests.helpers.architectures import architecture_model
from tests.helpers.wide_steps import watch_wide_steps

pytestmark = needs_gpu
ROWS, NEW = 96, 24


def requests() -> list[Request]:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 60, 3 * ROWS)
    return [
        Request(id=str(i), prompt=random.integers(2, 250, n).tolist(), max_tokens=NEW,
                ignore_eos=True)
        for i, n in enumerate(lengths)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["olmoe", "qwen3_moe", "gpt_oss", "mixtral", "qwen3_next"])
@pytest.mark.parametrize("memory", [0.4, 1.0])
def test_tokens_of_many_rows_are_those_of_each_request_alone(
    kind: str, memory: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = watch_wide_steps(monkeypatch)
    stock: Any = architecture_model(kind, max_position_embeddings=256).cuda()
    model: Any = runtime.load(
        architecture_model(kind, max_position_embeddings=256), memory=memory, device="cuda",
        batch=ROWS, context=96, cpu_share=False,
    )  # fmt: skip
    asked = requests()
    with model.expertflow as engine:
        served = {
            result.id: result.token_ids
            for result in engine.serve(asked, batch=ROWS, rows=ROWS, context=96)
        }
        engine.check_integrity()
    assert launched
    assert max(launched) > 64
    ids = torch.Generator().manual_seed(0)
    for index in torch.randperm(len(asked), generator=ids)[:12].tolist():
        prompt = torch.tensor([asked[index].prompt], device="cuda")
        alone = stock.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert served[str(index)] == tuple(alone[0, prompt.shape[1] :].tolist())
