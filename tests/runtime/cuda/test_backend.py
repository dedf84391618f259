"""The whole GPU engine on the CPU: interpreted kernels, streams that do nothing, no capture."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

pytest.importorskip("triton")

from routing.inspect_model import topology_of
from runtime.cuda import prefetching, trial
from runtime.cuda.decode.graph_step import CapturedStep, DecodeStep
from runtime.cuda.decode.predictor_thread import PredictorRequest
from runtime.cuda.prefill import look_ahead
from tests.helpers.fake_cuda import fake_cuda, load_fake
from tests.helpers.onnx_predictor import write_predictor
from tests.helpers.tiny import PAD, tiny_model

NEW = 3


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fake_cuda(monkeypatch):
        yield


@pytest.fixture
def model() -> Any:
    return tiny_model("olmoe")


def generate(model: Any, rows: int = 1, **options: Any) -> Tensor:
    """Greedy tokens [B, T] after prompts of which each but the first is padded at the left."""
    ids_BT = torch.randint(2, 256, (rows, 9), generator=torch.Generator().manual_seed(3))
    mask_BT = (torch.arange(9) >= 2 * torch.arange(rows)[:, None]).long()
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD} | options
    tokens: Tensor = model.generate(
        ids_BT.masked_fill(mask_BT == 0, PAD), attention_mask=mask_BT, **settings
    )
    return tokens


@pytest.mark.parametrize("options", [
    {"memory": 1.0},
    {"memory": 0.25, "policy": "lfu"},
    {"memory": 2 / 32 + 1e-6},
    {"memory": 0.25, "prefetch": True},
])  # fmt: skip
def test_tokens_are_stock_whatever_is_resident(model: Any, options: dict[str, Any]) -> None:
    want = generate(model)
    engine = load_fake(model, **options).expertflow
    assert torch.equal(generate(model), want)
    assert engine.decode_path == "graph"
    engine.check_integrity()
    assert engine.stats().tokens == 9 + NEW - 1
    assert torch.equal(generate(engine.detach()), want)


@pytest.mark.parametrize("kind", ["olmoe", "mixtral", "gpt_oss"])
def test_a_step_compiles_whole_and_says_the_same(kind: str) -> None:
    """One graph, in which the experts are an operator: nothing falls back to Python."""
    torch._dynamo.reset()
    counters.clear()
    model: Any = tiny_model(kind, num_hidden_layers=2)
    want = generate(model)
    engine = load_fake(model, memory=0.5, compile=True).expertflow
    assert torch.equal(generate(model), want)
    assert engine.decode_path == "graph"
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert all(step.has_own_attention for step in engine._backend.decoder.steps.values())


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_attention_that_no_kernel_has_is_the_models_own(model: Any, compile: bool) -> None:
    """Compiled or not: found out in the first pass, whose experts have changed the cache."""
    torch._dynamo.reset()
    model.model.layers[-1].self_attn.sinks = torch.zeros(4)  # to be heeded, it seems
    want = generate(model, 2)
    engine = load_fake(model, memory=0.5, batch=2, compile=compile, prefetch=True).expertflow
    assert torch.equal(generate(model, 2), want)
    assert engine.decode_path == "graph"
    assert not any(step.has_own_attention for step in engine._backend.decoder.steps.values())
    engine.check_integrity()


def test_every_size_of_step_is_compiled_whatever_torchs_limit() -> None:
    torch._dynamo.reset()
    counters.clear()
    model: Any = tiny_model("olmoe", num_hidden_layers=2)
    want = [generate(model, rows) for rows in (1, 2)]
    with torch._dynamo.config.patch(recompile_limit=1):
        load_fake(model, memory=0.5, compile=True, batch=2)
        assert all(torch.equal(generate(model, len(tokens)), tokens) for tokens in want)
    assert counters["stats"]["unique_graphs"] == 2


def test_belady_replays_what_was_recorded_with_fewer_loads(model: Any, tmp_path: Path) -> None:
    want = generate(model, max_new_tokens=9)
    recording = load_fake(model, memory=0.25, record=tmp_path / "routes").expertflow
    assert torch.equal(generate(model, max_new_tokens=9), want)
    recording.detach()
    replaying = load_fake(
        model, memory=0.25, policy="belady", replay=tmp_path / "routes"
    ).expertflow
    assert torch.equal(generate(model, max_new_tokens=9), want)
    assert replaying.decode_path == "graph"
    assert replaying.stats().misses < recording.stats().misses
    replaying.check_integrity()


def test_prefetching_is_tried_in_turns_and_changes_no_tokens(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetching, "TURN", 2)
    monkeypatch.setattr(trial, "SETTLING", 0)
    monkeypatch.setattr(prefetching, "NEEDED", 3)
    want = generate(model, max_new_tokens=9)
    engine = load_fake(model, memory=0.5, prefetch="auto").expertflow
    assert engine.prefetching == "prefetching is being tried"
    assert torch.equal(generate(model, max_new_tokens=9), want)
    assert engine.stats().prefetches > 0
    assert re.fullmatch(r"prefetching is (on|off): .* with it, .* without", engine.prefetching)
    assert torch.equal(generate(model, max_new_tokens=9), want)
    engine.check_integrity()


@pytest.mark.parametrize("prefetch", ["auto", True])
def test_where_every_expert_has_a_slot_all_come_behind_the_first_prompt_and_steps_fetch_nothing(
    model: Any, prefetch: bool | str
) -> None:
    engine = load_fake(model, memory=1.0, prefetch=prefetch).expertflow
    assert engine.prefetching == "prefetching is off: every expert has a slot"
    want = generate(model, max_new_tokens=1)
    stats = engine.stats()
    assert 0 < stats.misses < stats.total_experts
    assert engine.resident_LE.all()
    assert stats.bytes_loaded % stats.total_experts == 0
    stats.reset()
    assert torch.equal(generate(model, max_new_tokens=4)[:, : want.shape[1]], want)
    assert (stats.prefetches, stats.misses, stats.bytes_loaded) == (0, 0, 0)
    assert stats.hits > 0
    engine.check_integrity()


def test_a_sequence_that_ends_early_leaves_the_step_ahead_of_it_behind(model: Any) -> None:
    want = generate(model, max_new_tokens=6)
    end = int(want[0, 10])
    load_fake(model, memory=0.5)
    ended = generate(model, max_new_tokens=6, eos_token_id=end)
    assert torch.equal(ended, want[:, : ended.shape[1]])
    assert ended.shape[1] < want.shape[1]
    assert torch.equal(generate(model, max_new_tokens=6), want)


def test_rows_beyond_a_batch_change_nothing_and_are_not_counted(model: Any) -> None:
    want = generate(model, rows=3)
    load_fake(model, memory=0.5, batch=4)
    assert torch.equal(generate(model, rows=3), want)
    assert model.expertflow.decode_path == "graph"


@pytest.mark.parametrize(
    ("memory", "prefetch", "looks"),
    [(0.5, "auto", True), (0.5, True, True), (0.5, False, False), (1.0, "auto", False)],
)
def test_a_prompts_layer_sends_for_missing_experts_of_the_next_one_unless_told_not_to(
    model: Any, memory: float, prefetch: bool | str, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Mock(side_effect=look_ahead._wanted)
    monkeypatch.setattr(look_ahead, "_wanted", asked)
    prompt_BT = torch.randint(2, 256, (1, 64), generator=torch.Generator().manual_seed(3))
    inputs = {"input_ids": prompt_BT, "attention_mask": torch.ones_like(prompt_BT)}
    want = model.generate(**inputs, max_new_tokens=1)
    engine = load_fake(model, memory=memory, prefetch=prefetch).expertflow
    for _ in range(2):  # the first prompt uses every expert, and brings what there is room for
        asked.reset_mock()
        engine.stats().reset()
        assert torch.equal(model.generate(**inputs, max_new_tokens=1), want)
    assert asked.called == looks
    assert (engine.stats().prefetches > 0) == looks
    assert (engine.stats().prefetches_used > 0) == looks


@pytest.mark.parametrize(("options", "reason"), [
    ({"num_beams": 2}, "beam"),
    ({"max_new_tokens": NEW + 1}, f"context={9 + NEW}"),
    ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
])  # fmt: skip
def test_what_is_not_captured_runs_all_the_same_and_says_why(
    model: Any, options: dict[str, Any], reason: str
) -> None:
    load_fake(model, memory=0.5, context=9 + NEW)
    with pytest.warns(UserWarning, match=reason):
        generate(model, **options)
    assert reason in model.expertflow.decode_path
    assert generate(model).shape == (1, 9 + NEW)
    assert model.expertflow.decode_path == "graph"


def test_sequences_that_need_more_experts_than_fit_run_range_by_range(model: Any) -> None:
    want = generate(model, rows=3)
    load_fake(model, memory=3 / 32 + 1e-6, batch=4)
    assert torch.equal(generate(model, rows=3), want)
    assert model.expertflow.decode_path == "graph"


def test_sequences_of_which_not_even_a_range_fits_run_uncaptured() -> None:
    model: Any = tiny_model("olmoe", num_experts=32)
    want = generate(model, rows=3, max_new_tokens=2)
    load_fake(model, memory=2 / 128 + 1e-6, batch=4)
    with pytest.warns(UserWarning, match="4 slots"):
        assert torch.equal(generate(model, rows=3, max_new_tokens=2), want)


def test_a_predictor_runs_beside_the_steps(model: Any, tmp_path: Path) -> None:
    want = generate(model)
    predictor = write_predictor(tmp_path / "p.onnx", topology_of(model))
    engine = load_fake(model, predictor, memory=0.25).expertflow
    assert torch.equal(generate(model), want)
    assert engine._backend.decoder.driver.thread.failure is None
    assert engine.stats().prediction_ms


def test_a_prompt_is_one_step_of_the_policy_whenever_its_forecast_arrives(
    model: Any, tmp_path: Path
) -> None:
    """Else the policy would learn from half a prompt that the other half was not used."""
    predictor = write_predictor(tmp_path / "p.onnx", topology_of(model))
    engine = load_fake(model, predictor, memory=0.25).expertflow
    policy = engine._backend._policy
    policy.begin_step = Mock(wraps=policy.begin_step)
    policy.revise = Mock(wraps=policy.revise)
    generate(model, max_new_tokens=1)
    deadline = time.monotonic() + 30
    while not engine.stats().prediction_ms and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [call.args for call in policy.begin_step.call_args_list] == [(None,)]
    assert [call.args[0] is None for call in policy.revise.call_args_list] == [True, False]


def test_a_pass_that_has_begun_is_not_taught_the_routes_of_the_step_before(
    model: Any, tmp_path: Path
) -> None:
    topology = topology_of(model)
    predictor = write_predictor(tmp_path / "p.onnx", topology)
    backend = load_fake(model, predictor, memory=0.25).expertflow._backend
    policy, thread = backend._policy, backend.decoder.driver.thread
    policy.touch_routes, policy.revise = Mock(), Mock(wraps=policy.revise)
    one = np.zeros((1, 1), np.int64)
    stack = topology.stack()
    routes_LBK = np.zeros((stack.num_layers, 1, stack.top_k), np.int64)
    thread._answer([PredictorRequest(one, one, routes_LBK, is_new=False, has_begun=True)])
    assert not policy.touch_routes.called
    assert policy.revise.call_count == 1
    thread._answer([PredictorRequest(one, one, routes_LBK, is_new=False)])
    assert policy.touch_routes.call_count == 1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_predictor_that_fails_costs_no_token(model: Any, tmp_path: Path) -> None:
    want = generate(model)
    predictor = write_predictor(tmp_path / "p.onnx", topology_of(model))
    engine = load_fake(model, predictor, memory=0.25).expertflow
    engine._backend.decoder.driver.thread._forecaster.predict = lambda *_: 1 / 0
    assert torch.equal(generate(model), want)
    assert torch.equal(generate(model), want)
    assert "ZeroDivisionError" in engine._backend.decoder.driver.thread.failure


def test_nan_is_an_error_and_the_engine_goes_on(model: Any) -> None:
    want = generate(model)
    load_fake(model, memory=0.5)
    norm = model.model.norm.weight
    kept = norm.data.clone()
    norm.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN"):
        generate(model)
    norm.data.copy_(kept)
    assert torch.equal(generate(model), want)


def test_captures_leave_cudnn_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The switch around warm-up and capture, which only a real GPU can run."""
    seen: list[bool] = []

    def watched(_: CapturedStep) -> None:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())

    monkeypatch.setattr(CapturedStep, "_warm_up_and_capture", watched)
    object.__new__(DecodeStep)._capture()
    assert seen == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_no_step_leaves_its_attention_to_cudnn(model: Any) -> None:
    """It plans anew for each length, and in bfloat16 its bits differ from run to run."""
    seen: list[bool] = []
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(
        lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled())
    )
    load_fake(model)
    generate(model)
    assert seen and not any(seen)
    attention.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_an_interrupted_generation_leaves_the_engine_usable(model: Any) -> None:
    want = generate(model)
    load_fake(model, memory=0.5)

    class Interrupting:
        def put(self, _: Tensor) -> None:
            self.count = getattr(self, "count", 0) + 1
            if self.count == 2:
                raise KeyboardInterrupt

        def end(self) -> None:
            raise AssertionError("never reached")

    with pytest.raises(KeyboardInterrupt):
        generate(model, streamer=Interrupting())
    model.expertflow.check_integrity()
    assert torch.equal(generate(model), want)


def test_embedding_and_head_stay_on_the_host_where_a_budget_is_tiny(model: Any) -> None:
    want = generate(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    load_fake(model, memory=0.5, host_bytes=10**9)
    assert "weight" not in model.lm_head._parameters
    assert torch.equal(generate(model), want)
    head, stock = "lm_head.weight", tiny_model("olmoe")
    assert sorted(model.state_dict()) == sorted(stock.state_dict())
    model.load_state_dict({head: model.state_dict()[head].flip(0)}, strict=False)
    assert torch.equal(model.state_dict()[head], stock.state_dict()[head].flip(0))
    model.load_state_dict({head: stock.state_dict()[head]}, strict=False)
    assert torch.equal(generate(model), want)
    model.expertflow.detach()
    assert isinstance(model.lm_head.weight, torch.nn.Parameter)
    assert torch.equal(generate(model), want)
