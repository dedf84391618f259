"""Many steps, many rounds, a budget of bytes."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

pytest.importorskip("triton")

from runtime.cache.policies import POLICIES
from runtime.cache.policy import Policy
from runtime.cuda.decode.experts import mover
from tests.gpu.offloaded import (
    NEVER,
    allocated,
    check_slots,
    generate,
    needs_gpu,
    offloaded,
    stock_tokens,
)
from tests.helpers.tiny import tiny_model

pytestmark = needs_gpu

STEPS = int(os.environ.get("EXPERTFLOW_GPU_STEPS", "10000"))
"""Decode steps of the endurance test."""
ROUNDS = int(os.environ.get("EXPERTFLOW_GPU_ROUNDS", "100"))
"""Times that a model is offloaded and given back."""
SEQUENCE = min(250, STEPS)
"""Tokens generated at a time."""


class Random(Policy):
    """Evicts anybody."""

    name = "random"

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._random = np.random.default_rng(0)

    def touch(self, layer: int, experts: np.ndarray) -> None:
        self.values = self._random.random(len(self.values))

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        before, after = self._random.random((2, len(self.values)))
        return before, after


class Checking(BaseStreamer):
    """Looks at every slot after each 500 tokens, in the midst of a generation too."""

    def __init__(self, model: Any) -> None:
        self._model, self._seen = model, 0
        self.checks = 0

    def put(self, _: Any) -> None:
        self._seen += 1
        if self._seen % 500 == 0:
            check_slots(self._model)
            self.checks += 1

    def end(self) -> None: ...


def run(model: Any, streamer: BaseStreamer | None = None) -> Tensor:
    """Sampled tokens of STEPS steps, one sequence after the other: [sequences, tokens]."""
    rows = []
    for seed in range(-(-STEPS // SEQUENCE)):
        torch.manual_seed(seed)
        options: dict[str, Any] = {
            "max_new_tokens": SEQUENCE + 1,
            "eos_token_id": NEVER,
            "do_sample": True,
        }
        rows.append(generate(model, streamer=streamer, **options))
        assert model.expertflow.decode_path == "graph"
    return torch.cat(rows)


def tiny_packed_model() -> Any:
    """Its experts are packed, and of enough chunks that a prefetch may stop half way."""
    return tiny_model("olmoe", hidden_size=128, intermediate_size=256).bfloat16()


def test_thousands_of_steps_under_random_evictions_and_prefetches_do_not_diverge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with offloaded(tiny_packed_model(), memory=1.0, context=300, batch=1) as model:
        expected = run(model)
    monkeypatch.setitem(POLICIES, "random", Random)
    monkeypatch.setattr(mover, "THRESHOLD", 0.05)  # many wrong guesses among the prefetches
    options: dict[str, Any] = {
        "memory": 0.15,
        "policy": "random",
        "prefetch": True,
        "context": 300,
        "batch": 1,
    }
    with offloaded(tiny_packed_model(), **options) as model:
        checking = Checking(model)
        tokens = run(model, checking)
        stats = model.expertflow.stats()
    assert torch.equal(tokens, expected)
    assert checking.checks >= STEPS // 500
    assert stats.misses > STEPS
    assert 0 < stats.prefetches_used < stats.prefetches


def test_rounds_of_loading_and_giving_back_leave_memory_and_weights_as_they_were() -> None:
    model: Any = tiny_model("olmoe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = stock_tokens("olmoe", 1)[:, :15]
    level = 0
    for number in range(ROUNDS + 1):
        with offloaded(model, batch=1, prefetch=number % 2 == 0):
            assert torch.equal(generate(model, max_new_tokens=3), expected)
        if number == 0:  # the first brought the libraries' own memory
            level = allocated()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert allocated() <= level


def test_bfloat16_weights_come_back_bit_for_bit_though_they_were_packed() -> None:
    model: Any = tiny_model("gpt_oss").bfloat16()
    with torch.no_grad():  # what does not fit the window of exponents, and is no number
        weight = model.model.layers[2].mlp.experts.down_proj
        weight.view(-1)[:4] = torch.tensor([-0.0, 1e-39, 3e38, float("inf")]).bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with offloaded(model):
        assert model.expertflow._backend.decoder._host.packed
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.int16), before[name].view(torch.int16)), name


BUDGET = 176 << 20


@pytest.mark.parametrize("prefetch", [False, True, "auto"])
def test_a_budget_of_bytes_is_kept(prefetch: bool | str) -> None:
    """Through long prompts, batches, captures and steps, the libraries' workspaces included."""
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_experts": 32}
    model: Any = tiny_model("olmoe", num_hidden_layers=6, max_position_embeddings=1024, **sizes)
    model.bfloat16()
    level = allocated()
    torch.cuda.reset_peak_memory_stats()
    options: dict[str, Any] = {"memory": BUDGET, "context": 640, "batch": 4, "prefetch": prefetch}
    with offloaded(model, **options):
        num_slots = model.expertflow.stats().num_slots
        assert 64 < num_slots < 6 * 32, "the budget should bind"
        for batch, length in ((1, 600), (4, 150), (2, 12)):
            ids = torch.randint(2, 256, (batch, length), device="cuda")
            model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=NEVER)
            assert model.expertflow.decode_path == "graph"
        peak = torch.cuda.max_memory_allocated() - level
        del ids
    assert peak <= BUDGET, f"{peak / 2**20:.1f} MiB of {BUDGET / 2**20:.0f}"
    assert allocated() <= level
