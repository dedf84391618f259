"""runtime.plan: the plan is what loading takes, and no weights are read for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import runtime
from routing.layers import find_moe_layers
from runtime.engine.guards.placeholder import Placeholder
from runtime.kv import size
from runtime.kv.size import cache_bytes, tensor_bytes
from runtime.plan import PlanSettings, footprint, main, plan
from runtime.sizing.footprint import WIDTH, bars, total
from runtime.sizing.link import measure_link
from runtime.sizing.memory_plan import MemoryPlan, advice
from runtime.sizing.units import format_bytes
from runtime.weights.files import CheckpointFiles
from tests.helpers.architectures import architecture_model, is_known
from tests.helpers.tiny import KINDS, save_tiny

ODD = ["aria", "dbrx", "ernie4_5_vl_moe", "inkling2_text", "jetmoe", "llama4_text", "longcat_flash"]


def loaded_bytes(model: Any) -> int:
    """Bytes of an offloaded model's weights and slots."""
    others = (p for p in model.parameters() if not isinstance(p, Placeholder))
    weights = sum(p.numel() * p.element_size() for p in others)
    arenas = [pool.arena for pool in dict.fromkeys(model.expertflow._backend.pools)]
    return weights + sum(arena.num_slots * arena.slot_bytes for arena in arenas)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("memory", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("kind", [*KINDS, *ODD, "nllb-moe"])
def test_the_plan_is_what_loading_takes(kind: str, memory: float, tmp_path: Path) -> None:
    if not is_known(kind):
        pytest.skip(f"this version of transformers has no {kind}")
    architecture_model(kind).to(torch.bfloat16).save_pretrained(tmp_path)  # type: ignore[operator]
    planned = plan(tmp_path, memory)
    model: Any = runtime.load(tmp_path, memory=memory)
    assert sum(planned.slots) == model.expertflow.stats().num_slots
    assert planned.resident_bytes == pytest.approx(loaded_bytes(model), rel=0.05)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("olmoe"), "olmoe")


def test_a_budget_in_bytes_is_kept_and_the_least_one_works(saved: Path) -> None:
    least = plan(saved, 1.0).least_bytes
    model: Any = runtime.load(saved, memory=least)
    assert plan(saved, least).resident_bytes == loaded_bytes(model) <= least
    with pytest.raises(ValueError, match="a token needs 2 in one layer"):
        plan(saved, least - 3 * plan(saved).expert_bytes[0])


def test_planning_reads_no_weights(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError("weights were read")

    monkeypatch.setattr(CheckpointFiles, "get", refuse)
    monkeypatch.setattr(CheckpointFiles, "rows", refuse)
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert file.keys()
    assert plan(saved).total_expert_bytes == 4 * 8 * 3 * 32 * 24 * 4


@pytest.mark.parametrize("kind", ["olmoe", "mixtral", "deepseek_v3", "qwen3_next", "gpt_oss"])
def test_the_key_value_cache_is_as_large_as_a_real_one(kind: str) -> None:
    model: Any = architecture_model(kind)
    with torch.inference_mode():
        cache = model(torch.arange(2, 26)[None], use_cache=True).past_key_values
    if kind == "olmoe":
        assert tensor_bytes(cache) == 3 * 2 * 24 * 4 * 8 * 4, "layers, keys and values, tokens ..."
    meta = model.to("meta")
    assert cache_bytes(meta, find_moe_layers(meta), 24) == tensor_bytes(cache)


@pytest.mark.parametrize("kind", ["qwen3_next", "granitemoehybrid", "kimi_linear", "minimax"])
def test_the_cache_of_recurrent_layers_is_measured_at_short_lengths(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta: Any = architecture_model(kind).to("meta")
    layers = find_moe_layers(meta)
    whole = size._measured(meta, layers, 1024)
    forward, lengths = meta.forward, list[int]()

    def watched(*args: Any, **options: Any) -> Any:
        lengths.append(options["input_ids"].shape[1])
        return forward(*args, **options)

    monkeypatch.setattr(meta, "forward", watched)
    assert cache_bytes(meta, layers, 1024) == whole
    assert kind == "minimax" or max(lengths) == max(size.SHORT)


def test_a_cache_size_that_the_model_does_not_reveal_is_not_known() -> None:
    meta = architecture_model("jetmoe").to("meta")
    layers = find_moe_layers(meta)
    assert cache_bytes(meta, layers, 24) is None
    assert "forward" not in layers[0].module.__dict__


def test_on_a_gpu_bytes_pay_for_the_cache_too(saved: Path) -> None:
    on_cpu, on_gpu = (plan(saved, "600MiB", device=device) for device in ("cpu", "cuda"))
    assert on_gpu.slots <= on_cpu.slots
    with pytest.raises(ValueError, match="expert slots"):
        plan(saved, "600MiB", device="cuda", context=1 << 20, batch=16)


@pytest.mark.parametrize(("device", "is_mentioned"), [("cpu", False), ("cuda", True)])
def test_on_a_gpu_packing_is_mentioned(
    saved: Path, device: str, is_mentioned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ("packed" in printed(capsys, saved, device=device)) == is_mentioned


def test_the_bytes_of_a_token_are_the_misses_of_its_top_k(saved: Path) -> None:
    planned = plan(saved)
    assert planned.bytes_per_token(0.0) == 4 * 2 * planned.expert_bytes[0]
    assert planned.bytes_per_token(0.75) == 2 * planned.expert_bytes[0]


def test_a_model_is_planned_in_its_own_dtype(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "olmoe", hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_experts=4, num_experts_per_tok=2, vocab_size=64,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config)
    model.to(torch.float16).save_pretrained(tmp_path)
    assert plan(tmp_path).expert_bytes == [3 * 64 * 32 * 2]


# ---------------------------------------------------------------------- what is printed


def printed(capsys: pytest.CaptureFixture[str], model: Path, **options: Any) -> str:
    main(PlanSettings(model=str(model), **options))
    return capsys.readouterr().out


def test_the_command_prints_sizes_caches_and_traffic(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, saved, memory="0.5")
    assert "288 KiB of experts" in text and "(50.0% of the experts)" in text
    assert "16 of 32 experts of 9 KiB in 4 layers" in text
    assert "2,048 tokens: 1 MiB" in text and "90%: 7.2 KiB moved\n" in text


def test_the_parts_of_the_memory_are_shown_and_drawn(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "memory.png"
    text = printed(capsys, saved, memory="0.5", device="cpu", plot=picture)
    assert "slots for experts 144 KiB" in text and "experts without a slot 144 KiB" in text
    assert "keys and values 1 MiB" in text
    assert f"picture: {picture}" in text and picture.read_bytes().startswith(b"\x89PNG")


def test_on_a_gpu_the_parts_are_the_budget(saved: Path) -> None:
    budget = 600 << 20
    planned = plan(saved, budget, device="cuda", context=512, batch=2)
    fast = footprint(planned, budget, "cuda", 512, 2).fast
    assert total(fast) == budget
    sizes = dict(fast)
    assert sizes["slots for experts"] == planned.slot_bytes
    assert sizes["keys and values"] == 2 * 512 * 2 * 4 * 2 * 8 * 4, "tokens, keys and values, ..."
    assert sizes["workspaces"] > 64 << 20 and sizes["not used"] > 0


def test_fewer_cache_tokens_leave_more_of_a_gpus_budget(saved: Path) -> None:
    budget = 600 << 20
    planned = plan(saved, budget, device="cuda", context=512, batch=8, cache_tokens=1024)
    whole, paged = (
        dict(footprint(planned, budget, "cuda", 512, 8, tokens).fast) for tokens in (None, 1024)
    )
    assert 4 * paged["keys and values"] == whole["keys and values"]
    assert paged["workspaces"] < whole["workspaces"]
    assert sum(paged.values()) == sum(whole.values()) == budget


def test_the_parts_that_are_shown_are_those_of_the_cache_tokens(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes: dict[str, Any] = {"memory": "600MiB", "device": "cuda", "context": 512, "batch": 8}
    whole, paged = (printed(capsys, saved, **sizes, **one) for one in ({}, {"cache_tokens": 1024}))
    assert "keys and values 2 MiB" in whole and "keys and values 512 KiB" in paged


def test_pages_in_host_memory_are_counted_there(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 2048 more tokens 1536 can be used: there are eight sequences of 256."""
    sizes: dict[str, Any] = {
        "device": "cuda", "context": 256, "batch": 8, "cache_tokens": 512, "spill_tokens": 2048,
    }  # fmt: skip
    planned = plan(saved, 600 << 20, **sizes)
    parts = footprint(planned, 600 << 20, "cuda", 256, 8, 512)
    assert dict(parts.behind)["spilled keys and values"] == planned.spilled_bytes
    assert planned.spilled_bytes == 3 * dict(parts.fast)["keys and values"]
    assert planned.slots == plan(saved, 600 << 20, **sizes | {"spill_tokens": None}).slots
    size = format_bytes(planned.spilled_bytes)
    shown = printed(capsys, saved, memory="600MiB", **sizes)
    assert f"pinned host memory for spilled keys and values: {size}" in shown
    assert f"spilled keys and values {size}" in shown
    host = planned.total_stored_bytes + 1
    assert any("give fewer spill_tokens" in line for line in advice(planned, host))
    assert not any("spill_tokens" in line for line in advice(planned, host + (1 << 30)))


def test_spill_tokens_that_loading_refuses_cannot_be_planned(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"spill_tokens=64 without cache_tokens="):
        plan(saved, 0.5, device="cuda", spill_tokens=64)
    with pytest.raises(
        ValueError, match=r"spill_tokens=64 is room beyond a GPU's memory; on a CPU"
    ):
        plan(saved, 0.5, cache_tokens=4096, spill_tokens=64)


def test_cache_tokens_that_loading_refuses_cannot_be_planned(tmp_path: Path) -> None:
    latent: Any = architecture_model("deepseek_v2")
    latent.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cache_tokens=1024: .* lies in whole rows"):
        plan(tmp_path, 0.5, device="cuda", context=512, batch=8, cache_tokens=1024)


def test_bars_are_to_one_scale_and_show_every_part(saved: Path) -> None:
    planned = plan(saved, 0.25)
    parts = footprint(planned, 0.25, "cpu", 2048, 1)
    lines = bars(parts).plain.splitlines()
    filled = [line for line in lines if line and line[0] in "█▓▒░▚▞"]
    assert len(filled) == 2 and max(map(len, filled)) in range(WIDTH - 1, WIDTH + 4)
    for line, row in zip(filled, parts.rows.values(), strict=True):
        assert len(set(line)) == len(row)
        assert len(line) / max(map(len, filled)) == pytest.approx(
            total(row) / max(map(total, parts.rows.values())), abs=0.05
        )


def test_a_measured_link_gives_tokens_a_second(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "tokens/s over" in printed(capsys, saved, measure=True, device="cpu")


def test_the_measured_bandwidth_is_in_bytes_a_second() -> None:
    assert 1e8 < measure_link(torch.device("cpu"), 1 << 20) < 1e12


@pytest.fixture
def planned(saved: Path) -> Callable[[float], MemoryPlan]:
    return lambda memory: plan(saved, memory)


def test_advice_fits_the_budget(planned: Callable[[float], MemoryPlan]) -> None:
    assert advice(planned(1.0), 1 << 30)[0].startswith("Everything fits")
    assert advice(planned(0.1), 1 << 30)[0].startswith("Only 9% of the experts are resident")
    assert any("wait for the disk" in line for line in advice(planned(0.5), 1 << 10))
    assert [line for line in advice(planned(0.5), 1 << 30) if "least" not in line] == []


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", [*KINDS, "qwen3_next", "deepseek_v3"])
def test_a_configuration_alone_is_planned_as_its_model(kind: str, tmp_path: Path) -> None:
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    architecture_model(kind).to(torch.bfloat16).save_pretrained(whole)  # type: ignore[operator]
    alone.mkdir()
    (alone / "config.json").write_text((whole / "config.json").read_text())
    expected = plan(whole, 0.5)
    for path in (alone, alone / "config.json", whole / "config.json"):
        planned = plan(path, 0.5)
        assert planned.slots == expected.slots
        assert planned.resident_bytes == expected.resident_bytes
        assert planned.cache_bytes == expected.cache_bytes


def test_a_configuration_without_a_number_format_needs_one(saved: Path, tmp_path: Path) -> None:
    fields = json.loads((saved / "config.json").read_text()) | {"dtype": None}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="says no dtype: give dtype=, as 'bfloat16'"):
        plan(tmp_path)
    assert plan(tmp_path, dtype="bfloat16").expert_bytes == [3 * 32 * 24 * 2]


def test_the_plan_refuses_what_loading_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no model directory"):
        plan(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        plan(tmp_path)
