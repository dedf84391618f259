"""engine.serve over captured steps, on the CPU: interpreted kernels, streams that do nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

pytest.importorskip("triton")

import runtime
from routing.inspect_model import topology_of
from runtime.cuda import prefetching, trial
from runtime.cuda.decode.row_decoder import RowDecoder, RowStep
from runtime.serving.model_runner import CapturedRunner
from runtime.serving.request import Request
from runtime.serving.serving_loop import ServingLoop
from runtime.serving.settings import ServeSettings
from tests.helpers.fake_cuda import fake_cuda, load_fake
from tests.helpers.onnx_predictor import write_predictor
from tests.helpers.serving import by_id, greedy, prompts
from tests.helpers.tiny import tiny_model

SMALL: dict[str, Any] = {"batch": 2, "rows": 3, "context": 24, "chunk": 7, "lookahead": 5}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fake_cuda(monkeypatch):
        yield


def requests(count: int, max_tokens: int = 3) -> list[Request]:
    asked = prompts(3, count, longest=9)
    return [Request(id=str(i), prompt=p, max_tokens=max_tokens) for i, p in enumerate(asked)]


def load(model: Any, folder: Path | None = None, **options: Any) -> Any:
    """The engine of `model`, with the hand-made predictor where a folder for it is given."""
    predictor = None
    if folder is not None:
        predictor = write_predictor(folder / "predictor.onnx", topology_of(model))
    return load_fake(model, predictor, **{"memory": 0.75, "batch": 3} | options).expertflow


def shallow(kind: str) -> Any:
    """Of two layers: both kinds of gpt_oss, windows of mixtral."""
    windows = {"sliding_window": 5} if kind == "mixtral" else {}
    return tiny_model(kind, num_hidden_layers=2, **windows)


# ---------------------------------------------------------------------- the steps


@pytest.mark.parametrize("kind", ["olmoe", "mixtral", "gpt_oss"])
def test_greedy_tokens_are_those_of_each_request_alone(kind: str) -> None:
    model: Any = shallow(kind)
    asked = requests(3)
    alone = {r.id: greedy(model, r.prompt, 3) for r in asked}  # type: ignore[arg-type]
    engine = load(model)
    served = by_id(engine.serve(asked, **SMALL))
    assert {id: result.token_ids for id, result in served.items()} == alone
    engine.check_integrity()


@pytest.mark.parametrize(("memory", "joined"), [(0.75, False), (0.4, True)])
def test_prompts_take_the_decoding_along_where_most_experts_have_no_slot(
    memory: float, joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[set[bool]] = []
    together: list[int] = []
    pack, attend_singles = CapturedRunner._pack, RowDecoder.attend_singles

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        together.append(query.shape[2])
        return attend_singles(query, *args, **kwargs)

    def watched(runner: Any, parts: Any) -> Any:
        passes.append({part.sequence.is_ready for part in parts})
        return pack(runner, parts)

    monkeypatch.setattr(CapturedRunner, "_pack", watched)
    monkeypatch.setattr(RowDecoder, "attend_singles", staticmethod(counted))
    model: Any = tiny_model("olmoe")
    asked = requests(4)
    alone = {r.id: greedy(model, r.prompt, 3) for r in asked}  # type: ignore[arg-type]
    served = by_id(load(model, memory=memory).serve(asked, **SMALL))
    assert {id: result.token_ids for id, result in served.items()} == alone
    assert ({True, False} in passes) == joined
    if joined:
        assert max(together) > 1, "decoding sequences attend in one launch"
    assert {True} not in passes


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_steps_compile_whole_and_say_the_same(kind: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    model: Any = shallow(kind)
    asked = requests(3)
    alone = {r.id: greedy(model, r.prompt, 3) for r in asked}  # type: ignore[arg-type]
    engine = load(model, compile=True)
    served = by_id(engine.serve(asked, **SMALL))
    assert {id: result.token_ids for id, result in served.items()} == alone
    assert counters["stats"]["unique_graphs"] == 2  # one sequence, several
    assert not counters["graph_break"]


RULES: dict[str, dict[str, Any]] = {
    "penalties": {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.4},
    "bias": {"logit_bias": {9: 50.0, 11: 49.5}, "frequency_penalty": 1.0},
    "drawn": {"temperature": 1.2, "seed": 5, "min_p": 0.02, "top_k": 50, "presence_penalty": 1.0},
    "scored": {"prompt_logprobs": 2, "logprobs": 1},
    "scored alone": {"prompt_logprobs": 1, "max_tokens": 0},
}


def test_rules_of_sampling_hold_in_captured_steps() -> None:
    model: Any = shallow("olmoe")
    asked = [
        Request(id=name, prompt=prompt, **({"max_tokens": 4} | rules))
        for (name, rules), prompt in zip(RULES.items(), prompts(3, 5, longest=9), strict=True)
    ]
    with runtime.load(copy.deepcopy(model), memory=0.5).expertflow as resident:
        want = by_id(resident.serve(asked, **SMALL))
    got = by_id(load(model, memory=0.4).serve(asked, **SMALL))
    for name, result in want.items():
        assert got[name].error == result.error == ""
        assert got[name].token_ids == result.token_ids
        assert got[name].finish == result.finish
        for ours, theirs in (
            (got[name].logprobs, result.logprobs),
            (got[name].prompt_logprobs[1:], result.prompt_logprobs[1:]),
        ):
            assert [one.token_id for one in ours] == [one.token_id for one in theirs]  # type: ignore[union-attr]
            expected = [one.logprob for one in theirs]  # type: ignore[union-attr]
            assert [one.logprob for one in ours] == pytest.approx(expected, abs=1e-4)  # type: ignore[union-attr]
    assert set(want["bias"].token_ids) == {9, 11}


def test_prefetching_is_tried_in_turns_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetching, "TURN", 2)
    monkeypatch.setattr(trial, "SETTLING", 0)
    monkeypatch.setattr(prefetching, "NEEDED", 3)
    model: Any = tiny_model("olmoe")
    asked = requests(3, max_tokens=12)
    alone = {r.id: greedy(model, r.prompt, 12) for r in asked}  # type: ignore[arg-type]
    engine = load(model, prefetch="auto")
    served = by_id(engine.serve(asked, **SMALL))
    assert {id: result.token_ids for id, result in served.items()} == alone
    assert engine.stats().prefetches > 0
    assert engine.prefetching.startswith(
        "prefetching is being tried; while serving, prefetching is "
    )
    assert engine.prefetching.endswith(" without")


@pytest.mark.parametrize("scheduler", ["fifo", "predicted"])
def test_predictions_change_no_tokens(scheduler: str, tmp_path: Path) -> None:
    model: Any = tiny_model("olmoe")
    asked = requests(4)
    alone = {r.id: greedy(model, r.prompt, 3) for r in asked}  # type: ignore[arg-type]
    engine = load(model, tmp_path, memory=0.5, prefetch=True)
    loop = ServingLoop(engine, None, ServeSettings(scheduler=scheduler, **SMALL))
    assert isinstance(loop._runner, CapturedRunner)
    for request in asked:
        loop.submit(request)
    results = []
    while not loop.is_idle:
        results += loop.step()
    assert {result.id: result.token_ids for result in results} == alone
    stats = engine.stats()
    assert stats.tokens == sum(len(r.prompt) + 2 for r in asked)
    assert 0 < stats.recall <= 1
    assert engine._backend.decoder.driver.thread.failure is None


def test_a_sequence_that_becomes_nan_while_it_decodes_ends_alone() -> None:
    model: Any = tiny_model("olmoe")
    asked = requests(3)
    alone = {r.id: greedy(model, r.prompt, 3) for r in asked}  # type: ignore[arg-type]
    engine = load(model)
    broken = alone["1"][0]
    others = [id for id, said in alone.items() if broken not in said]
    assert others
    with torch.no_grad():
        model.get_input_embeddings().weight[broken] = torch.nan
    served = by_id(engine.serve(asked, **SMALL))
    assert served["1"].token_ids == (broken,)
    assert "logits are NaN" in served["1"].error
    assert all(served[id].token_ids == alone[id] for id in others)


def test_decoding_runs_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    set_inputs = RowStep.set_inputs

    def watch(step: RowStep, tokens: Any, *places: Any) -> None:
        sizes.append(len(tokens))
        set_inputs(step, tokens, *places)

    monkeypatch.setattr(RowStep, "set_inputs", watch)
    engine = load(tiny_model("olmoe"))
    list(engine.serve(requests(3), **SMALL))
    assert sum(sizes) == 3 * 2  # each request's first token comes from its prompt
    assert max(sizes) == 2


def test_generate_and_serve_take_turns_in_one_cache() -> None:
    model: Any = shallow("olmoe")
    first, second = requests(2)
    alone = {r.id: greedy(model, r.prompt, 3) for r in (first, second)}  # type: ignore[arg-type]
    engine = load(model)
    for request in (first, second):
        (result,) = engine.serve([request], **SMALL)
        assert result.token_ids == alone[request.id]
        assert greedy(model, first.prompt, 3) == alone["0"]  # type: ignore[arg-type]
        assert engine.decode_path == "graph"


def test_too_few_slots_for_a_captured_step_run_the_generic_path() -> None:
    model: Any = tiny_model("olmoe")
    asked = requests(3)
    alone = {r.id: greedy(model, r.prompt, 3) for r in asked}  # type: ignore[arg-type]
    engine = load(model, memory=2 / 32 + 1e-6)
    served = by_id(engine.serve(asked, **SMALL))
    assert {id: result.token_ids for id, result in served.items()} == alone


@pytest.mark.parametrize(("asked", "said"), [
    ({"batch": 4, "rows": 4}, r"batch=4 needs runtime.load\(..., batch="),
    ({"context": 100}, r"context=100 needs runtime.load\(..., context="),
])  # fmt: skip
def test_what_was_not_reserved_is_refused(asked: dict[str, int], said: str) -> None:
    engine = load(tiny_model("olmoe"))
    with pytest.raises(ValueError, match=said):
        engine.serve(requests(1), **SMALL | asked)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("options", [{}, {"batch": 40}, {"context": 24}])
def test_serving_takes_what_was_reserved_where_nothing_is_said(options: dict[str, int]) -> None:
    """After a plain load, which reserves one sequence, a plain serve works."""
    model: Any = tiny_model("olmoe")
    asked = requests(3)
    alone = {r.id: greedy(model, r.prompt, 3) for r in asked}  # type: ignore[arg-type]
    reserved: dict[str, Any] = {"batch": 1} | options
    engine = load(model, **reserved)
    served = by_id(engine.serve(asked))
    assert {id: result.token_ids for id, result in served.items()} == alone


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("batch", "asked"), [(1, {}), (4, {"batch": 2, "rows": 32}), (3, {"burst": 20})]
)
def test_a_burst_never_waits_for_more_rows_than_were_reserved(
    batch: int, asked: dict[str, int], tmp_path: Path
) -> None:
    engine = load(tiny_model("olmoe"), tmp_path, memory=0.5, batch=batch)
    settings = ServeSettings.within(engine.key_value_storage, scheduler="predicted", **asked)
    loop = ServingLoop(engine, None, settings)
    for request in requests(6):
        loop.submit(request)
    ended = [result for _ in range(40) for result in loop.step()]
    assert len(ended) == 6


def test_no_more_rows_are_used_than_were_reserved() -> None:
    engine = load(tiny_model("olmoe"), batch=2)
    assert len(list(engine.serve(requests(3), **SMALL | {"rows": 30}))) == 3
    assert (
        engine._backend.decoder.model.storage.view(0, "keys", torch.zeros(1, 2, 1, 8), 2).shape[0]
        == 2
    )
