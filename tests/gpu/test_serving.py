"""engine.serve on a GPU: captured steps over rows, prompts beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from runtime.cuda.decode.row_decoder import RowStep
from runtime.serving.request import Request
from tests.gpu.offloaded import (
    MOE_8X32,
    NEVER,
    PREDICTOR,
    check_slots,
    forbid_waiting,
    needs_gpu,
    offloaded,
)
from tests.helpers.serving import by_id, prompts
from tests.helpers.tiny import tiny_model

pytestmark = needs_gpu

SETTINGS: dict[str, Any] = {"batch": 4, "context": 48, "chunk": 16}


def requests(count: int, max_tokens: int = 12) -> list[Request]:
    return [
        Request(id=str(index), prompt=prompt, max_tokens=max_tokens, ignore_eos=True)
        for index, prompt in enumerate(prompts(3, count))
    ]


def alone(model: Any, asked: list[Request]) -> dict[str, tuple[int, ...]]:
    """What transformers generates for each request by itself, on the CPU."""
    tokens = {}
    for request in asked:
        ids = torch.tensor([request.prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_tokens,
            do_sample=False, eos_token_id=NEVER,
        )  # fmt: skip
        tokens[request.id] = tuple(out[0, ids.shape[1] :].tolist())
    return tokens


@pytest.mark.parametrize("kind", ["olmoe", "qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("memory", [1.0, 0.5, 0.4])
def test_greedy_tokens_are_those_of_each_request_alone(kind: str, memory: float) -> None:
    model: Any = tiny_model(kind)
    asked = requests(9)
    want = alone(model, asked)
    with offloaded(model, memory=memory, batch=8) as model:
        served = by_id(model.expertflow.serve(asked, **SETTINGS))
        assert {id: result.token_ids for id, result in served.items()} == want
        check_slots(model)


def test_compiled_steps_say_the_same() -> None:
    model: Any = tiny_model("olmoe")
    asked = requests(5)
    want = alone(model, asked)
    with offloaded(model, memory=0.5, batch=8, compile=True) as model:
        served = by_id(model.expertflow.serve(asked, **SETTINGS))
        assert {id: result.token_ids for id, result in served.items()} == want


@pytest.mark.parametrize("scheduler", ["fifo", "predicted", "paper"])
@pytest.mark.parametrize("prefetch", [False, True, "auto"])
def test_serving_with_a_predictor_ends_every_request(scheduler: str, prefetch: bool | str) -> None:
    asked = requests(24)
    with offloaded(MOE_8X32, predictor=PREDICTOR, batch=16, prefetch=prefetch) as model:
        served = by_id(model.expertflow.serve(asked, scheduler=scheduler, **SETTINGS))
        assert all(len(result.token_ids) == 12 for result in served.values())
        assert len(served) == 24
        assert model.expertflow.stats().recall > 0.3
        check_slots(model)


def test_a_step_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = forbid_waiting(monkeypatch)
    with offloaded(MOE_8X32, predictor=PREDICTOR, batch=8) as model:
        list(model.expertflow.serve(requests(8), **SETTINGS))
    assert sum(isinstance(step, RowStep) for step in watched) > 10
