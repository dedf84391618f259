"""Models that keep more than keys and values, served."""

from __future__ import annotations

from typing import Any

import pytest

import runtime
from runtime.serving.model_runner import ModelRunner
from runtime.serving.request import Request
from tests.helpers.architectures import architecture_model
from tests.helpers.capturing import served
from tests.helpers.serving import by_id, greedy, prompts

KINDS = "qwen3_next lfm2_moe jamba zaya deepseek_v32 minimax llama4_text nemotron_h".split()  # noqa: SIM905


@pytest.mark.parametrize("kind", [*KINDS, "qwen3_omni_moe_thinker"])
def test_sequences_of_different_lengths_get_the_tokens_that_each_gets_alone(kind: str) -> None:
    """Also of a model that gives logits of all tokens, whichever it is asked for."""
    assert served(kind) == "yes"


@pytest.mark.parametrize("kind", ["qwen3_next", "zaya", "deepseek_v32"])
def test_a_sequence_that_is_parked_goes_on_as_if_it_had_stayed(kind: str) -> None:
    """Groups larger than the rows take turns, and each turn parks others."""
    stock: Any = architecture_model(kind)
    given = prompts(4, 4, longest=9)
    alone = {str(i): greedy(stock, prompt, 5) for i, prompt in enumerate(given)}
    engine = runtime.load(architecture_model(kind), memory=0.6).expertflow
    requests = [
        Request(id=str(number), prompt=prompt, max_tokens=5, group=f"{number // 2}")
        for number, prompt in enumerate(given)
    ]
    found = by_id(engine.serve(requests, batch=1, rows=2, context=32, chunk=4))
    assert {id: result.token_ids for id, result in found.items()} == alone


@pytest.mark.parametrize("kind", ["qwen3_next", "zaya", "deepseek_v32"])
def test_a_step_that_fails_after_a_part_of_it_has_run_changes_no_token(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recurrence would go on twice where its token ran again."""
    stock: Any = architecture_model(kind)
    given = prompts(5, 4, longest=9)
    alone = {str(i): greedy(stock, prompt, 6) for i, prompt in enumerate(given)}
    own, failed = ModelRunner._pass, list[int]()

    def fail(runner: Any, parts: Any, *, stacked: bool = False) -> Any:
        ran = own(runner, parts, stacked=stacked)
        if len(failed) < 3 and parts[0].sequence.num_generated == len(failed) + 1:
            failed.append(len(parts))
            raise RuntimeError("a device that was busy")
        return ran

    monkeypatch.setattr(ModelRunner, "_pass", fail)
    engine = runtime.load(architecture_model(kind), memory=0.6).expertflow
    requests = [Request(id=str(i), prompt=prompt, max_tokens=6) for i, prompt in enumerate(given)]
    found = by_id(engine.serve(requests, batch=3, rows=3, context=32, chunk=4))
    assert {id: result.token_ids for id, result in found.items()} == alone
    assert len(failed) == 3


@pytest.mark.parametrize("kind", ["qwen3_next", "lfm2_moe", "deepseek_v32"])
def test_choices_of_one_prompt_share_what_it_left(kind: str) -> None:
    """Those in flight beside it, and those that wait for a row."""
    stock: Any = architecture_model(kind)
    prompt = prompts(4, 1, longest=20)[0]
    alone = greedy(stock, prompt, 5)
    engine = runtime.load(architecture_model(kind), memory=0.6).expertflow
    requests = [Request(id=str(i), prompt=prompt, max_tokens=5, group="one") for i in range(5)]
    found = by_id(engine.serve(requests, batch=2, rows=3, context=32, chunk=4))
    assert [result.token_ids for result in found.values()] == [alone] * 5


@pytest.mark.parametrize("kind", ["jamba", "qwen3_next"])
def test_logits_of_a_prompt_are_those_of_a_whole_pass(kind: str) -> None:
    """Also where a prompt is longer than a piece in which scores are taken."""
    prompt = prompts(1, 1, longest=30)[0] + list(range(2, 140))
    engine = runtime.load(architecture_model(kind), memory=0.6).expertflow
    request: dict[str, Any] = {"prompt": prompt, "max_tokens": 1, "prompt_logprobs": 1}
    settings: dict[str, Any] = {"batch": 1, "rows": 1, "context": 256}
    whole, pieces = (
        next(iter(engine.serve([Request(**request)], **settings, chunk=chunk)))
        for chunk in (256, 16)
    )
    assert whole.error == pieces.error == ""
    ours, theirs = (
        [one.logprob for one in result.prompt_logprobs[1:] if one] for result in (whole, pieces)
    )
    assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("inkling_text", "distances"),
        ("qwen4_exp_text", "indexer"),
        ("deepseek_v4", "heavily_compressed_attention"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(kind: str, reason: str) -> None:
    engine = runtime.load(architecture_model(kind), memory=0.6).expertflow
    with pytest.raises(ValueError, match=reason):
        next(iter(engine.serve([[2, 3]], context=16)))


def test_beginnings_in_common_are_not_cut_out_of_a_recurrence() -> None:
    engine = runtime.load(architecture_model("qwen3_next"), memory=0.6).expertflow
    with pytest.raises(ValueError, match="linear_attention"):
        next(iter(engine.serve([[2, 3]], context=16, prefix_reuse=True)))
