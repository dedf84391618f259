"""Experts out of slots by the C kernels: right to rounding, the same bits whatever is resident."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from routing.layers import MoELayer, Routes
from runtime.cpu import slot_experts
from runtime.cpu.slot_experts import SlotExperts
from runtime.cpu.team import openmp_team
from runtime.engine.experts import run_experts
from tests.helpers.offloading import check, offload
from tests.helpers.tiny import tiny_model

KIND = "olmoe"


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_experts, "LEAST_BYTES", 0)


def model() -> Any:
    return tiny_model(KIND).to(torch.bfloat16)


@torch.inference_mode()
def steps(model: Any, rows: int = 1, count: int = 12) -> Tensor:
    """Logits of single tokens, of which `rows` sequences run side by side."""
    token_ids = torch.randint(2, 250, (4, count), generator=torch.Generator().manual_seed(3))[:rows]
    past, seen = None, []
    for at in range(count):
        output = model(token_ids[:, at : at + 1], past_key_values=past, use_cache=True)
        past = output.past_key_values
        seen.append(output.logits[:, -1])
    return torch.stack(seen, 1)


def kernels(offloaded: Any) -> list[SlotExperts]:
    return list(offloaded.expertflow._backend._kernels.values())


def a_call(offloaded: Any, tokens: int) -> tuple[MoELayer, Tensor, Routes]:
    """The first layer, hidden states and routes."""
    layer = offloaded.expertflow._layers[0]
    torch.manual_seed(0)
    hidden_TH = torch.randn(tokens, offloaded.config.hidden_size).bfloat16()
    ids_TK = [torch.randperm(layer.num_experts)[: layer.top_k] for _ in range(tokens)]
    return layer, hidden_TH, Routes(torch.stack(ids_TK), torch.rand(tokens, layer.top_k).bfloat16())


def test_single_tokens_run_in_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    offloaded = offload(model(), 1.0)
    assert len(kernels(offloaded)) == 1
    calls: list[Any] = []
    ask = SlotExperts._ask

    def counted(self: SlotExperts, slots: Any, x_H: Any) -> Any:
        calls.append(slots)
        return ask(self, slots, x_H)

    monkeypatch.setattr(SlotExperts, "_ask", counted)
    steps(offloaded)
    assert len(calls) == 12 * len(offloaded.expertflow.stats().layers)
    check(offloaded)


def test_outputs_are_those_of_the_generic_path_to_rounding() -> None:
    offloaded = offload(model(), 1.0)
    backend = offloaded.expertflow._backend
    layer, hidden_TH, routes = a_call(offloaded, 3)
    expected = run_experts(layer, hidden_TH, routes, partial(backend.pools[0].serve, 0))
    output = backend.run_layer(layer, 0, hidden_TH, routes)
    assert output.dtype == torch.bfloat16
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def test_bits_are_the_same_whatever_the_cache() -> None:
    seen = [steps(offload(model(), size)) for size in (1.0, 0.25, None)]
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_bits_of_an_experts_call_are_the_same_whoever_shares_it() -> None:
    """With the fewest slots: four tokens take several waves."""
    offloaded = offload(model(), None)
    run = offloaded.expertflow._backend.run_layer
    layer, hidden_TH, routes = a_call(offloaded, 4)
    together_TH = run(layer, 0, hidden_TH, routes)
    for row in range(4):
        own = Routes(*(part[row : row + 1] for part in routes))
        alone_TH = run(layer, 0, hidden_TH[row : row + 1], own)
        assert torch.equal(alone_TH, together_TH[row : row + 1])
    check(offloaded)


def test_prompts_run_in_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    offloaded = offload(model(), 1.0)
    monkeypatch.setattr(SlotExperts, "run", lambda *_: pytest.fail("ran in the kernels"))
    with torch.inference_mode():
        offloaded(torch.arange(2, 2 + slot_experts.MOST_TOKENS + 1)[None])


def test_tokens_without_an_expert_get_nothing() -> None:
    offloaded = offload(model(), 1.0)
    layer, hidden_TH, routes = a_call(offloaded, 2)
    routes.experts_TK[0] = -1
    routes.experts_TK[1, 1:] = layer.num_experts
    output_TH = offloaded.expertflow._backend.run_layer(layer, 0, hidden_TH, routes)
    assert (output_TH[0] == 0).all()
    assert (output_TH[1] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_number_formats_run_as_ever(dtype: torch.dtype) -> None:
    assert kernels(offload(tiny_model(KIND).to(dtype), 1.0)) == []


def test_small_experts_run_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert kernels(offload(model(), 1.0)) == []


def test_it_runs_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(slot_experts, "load_library", lambda _: "there is no C compiler")
    offloaded = offload(model(), 1.0)
    assert kernels(offloaded) == []
    assert "there is no C compiler" in caplog.text
    assert torch.equal(steps(offloaded), steps(model()))


def test_it_runs_where_no_memory_is_left_for_the_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError("no memory is left")

    monkeypatch.setattr(slot_experts, "CpuExperts", no_memory)
    offloaded = offload(model(), 1.0)
    assert kernels(offloaded) == []
    assert "no memory is left" in caplog.text
    assert torch.equal(steps(offloaded), steps(model()))


def test_threads_of_its_own_where_torchs_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = steps(offload(model(), 0.25))
    monkeypatch.setattr(slot_experts, "openmp_team", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    offloaded = offload(model(), 0.25)
    assert kernels(offloaded)[0]._experts.num_threads == 2
    assert torch.equal(steps(offloaded), expected)


def test_closed_with_the_model() -> None:
    offloaded = offload(model(), 1.0)
    (used,) = kernels(offloaded)
    offloaded.expertflow.close()
    assert used._experts._service is None


def test_the_team_is_that_of_torchs_library(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text("7f00-7f01 r-xp 00000000 00:00 0   /lib/x86_64-linux-gnu/libc.so.6\n")
    assert openmp_team(maps) is None
    maps.write_text("7f00-7f01 r-xp 0 00:00 0   /nowhere/libgomp.so.1\n")
    assert openmp_team(maps) is None
