"""A recording: what two caches did, as the simulator counts it, and how a page packs it."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from routing.predictor_file.reader import open_predictor
from routing.shards import TraceReader
from runtime.cache.policies import FREE_RULES
from runtime.replay.model_files import find_model_files, texts_of
from runtime.replay.page_data import packed, page_data
from runtime.replay.recording import Recording, record
from runtime.replay.settings import ReplaySettings
from runtime.simulation.replay import simulate
from tests.helpers.tiny import tiny_tokenizer
from tests.runtime.replay.conftest import EVIL, PROMPT_TOKENS, STORY, Traced


def unpacked(numbers: dict[str, Any]) -> np.ndarray:
    dtype = {8: "<u1", 16: "<u2", 32: "<u4"}[numbers["bits"]]
    return np.frombuffer(base64.b64decode(numbers["data"]), dtype).astype(np.int64)


def recorded(traced: Traced, index: int = 1, **options: Any) -> Recording:
    reader = TraceReader(traced.trace)
    return record(reader, reader.document(index), **options)


@pytest.mark.parametrize("decode_all", [False, True])
def test_misses_are_the_loads_that_simulate_counts(decode_all: bool, traced: Traced) -> None:
    predictor = open_predictor(traced.predictor)
    stack = traced.topology.stack()
    steps = recorded(traced, decode_all=decode_all).steps
    results = simulate(
        steps, (stack.num_layers, stack.num_experts), residency=[0.25], predictor=predictor
    )
    expected = {result.policy: result for result in results}
    for policy in (*FREE_RULES, "belady", "predicted"):
        recording = recorded(traced, policy=policy, predictor=predictor, decode_all=decode_all)
        assert [run.policy for run in recording.runs] == list(dict.fromkeys((policy, "lru")))
        for run in recording.runs:
            assert sum(map(len, run.missed)) == expected[run.policy].loads > 0
            assert run.num_slots == expected[run.policy].slots


@pytest.mark.parametrize("policy", ["lru", "reuse", "arc", "belady"])
def test_residents_that_a_page_derives_never_exceed_the_slots(policy: str, traced: Traced) -> None:
    recording = recorded(traced, policy=policy, decode_all=True)
    num_experts = traced.topology.stack().num_experts
    run, held = recording.runs[0], set[int]()
    for step, missed, left in zip(recording.steps, run.missed, run.left, strict=True):
        used = {layer * num_experts + int(e) for layer, experts in step.calls() for e in experts}
        assert used - held <= set(missed.tolist()) <= used
        assert set(left.tolist()) <= held | set(missed.tolist())
        held = (held | set(missed.tolist())) - set(left.tolist())
        assert len(held) <= run.num_slots
    assert len(held) == run.num_slots


def test_a_prompt_is_one_step_unless_it_is_asked_for_token_by_token(traced: Traced) -> None:
    lengths = [len(step.token_ids_T) for step in recorded(traced).steps]
    assert lengths[0] == PROMPT_TOKENS and set(lengths[1:]) == {1}
    assert len(recorded(traced, decode_all=True).steps) == sum(lengths)
    assert len(recorded(traced, index=0).steps) > 1, "a trace of prompts alone"


def test_the_predicted_experts_are_the_likeliest_of_each_layer(traced: Traced) -> None:
    recording = recorded(traced, predictor=open_predictor(traced.predictor), decode_all=True)
    stack = traced.topology.stack()
    guesses = recording.predicted_SLK
    assert guesses is not None
    assert guesses.shape == (len(recording.steps), stack.num_layers, stack.top_k)
    seen = int(recording.steps[0].token_ids_T[0]) % stack.num_experts
    assert (guesses[0] == seen).any(axis=-1).all(), "the hand-made predictor repeats its token"
    assert recorded(traced).predicted_SLK is None


def test_the_default_policy_is_the_one_a_model_would_run_with(traced: Traced) -> None:
    assert recorded(traced).runs[0].policy == "reuse"
    predictor = open_predictor(traced.predictor)
    assert recorded(traced, predictor=predictor).runs[0].policy == "predicted"


@pytest.mark.parametrize(
    ("policy", "said"), [("predicted", "needs --predictor"), ("hot-set", "give one of lru, ")]
)
def test_a_policy_that_cannot_be_replayed_is_refused(
    policy: str, said: str, traced: Traced
) -> None:
    with pytest.raises(ValueError, match=said):
        recorded(traced, policy=policy)


@pytest.mark.parametrize("text", [EVIL, STORY, "end of half a character: é"])
def test_the_texts_of_tokens_are_the_whole_text(text: str) -> None:
    tokenizer = tiny_tokenizer()
    token_ids = tokenizer(text)["input_ids"]
    texts = texts_of(tokenizer, token_ids)
    assert len(texts) == len(token_ids) and "".join(texts) == text
    assert texts_of(tokenizer, [1]) == ["<eos>"]
    cut = texts_of(tokenizer, tokenizer("é")["input_ids"][:1])
    assert cut == ["\ufffd"]


@pytest.mark.parametrize("largest", [0, 255, 256, 65_535, 65_536, 2**32 - 1])
def test_numbers_take_as_few_bits_as_the_largest_needs(largest: int) -> None:
    numbers = packed([3, largest, 0])
    assert unpacked(numbers).tolist() == [3, largest, 0]
    assert numbers["bits"] == (8 if largest < 256 else 16 if largest < 65_536 else 32)


def settings_for(traced: Traced, **options: Any) -> ReplaySettings:
    return ReplaySettings(trace=traced.trace, out=Path("page.html"), **options)


def test_a_page_holds_routes_misses_and_bytes_as_recorded(traced: Traced) -> None:
    reader, recording = TraceReader(traced.trace), recorded(traced)
    files = find_model_files(reader, settings_for(traced))
    data = page_data(reader, recording, files, 1)
    assert "".join(data["texts"]) == STORY
    experts_TLK = reader.document(1).experts_TLK
    assert unpacked(data["routes"]).tolist() == experts_TLK.reshape(-1).tolist()
    assert unpacked(data["lengths"])[0] == PROMPT_TOKENS
    for cache, run in zip(data["caches"], recording.runs, strict=True):
        assert unpacked(cache["missed"]["keys"]).tolist() == np.concatenate(run.missed).tolist()
        assert unpacked(cache["left"]["counts"]).tolist() == [len(keys) for keys in run.left]
    weights = sum(
        file.stat().st_size for file in traced.model.iterdir() if file.suffix == ".safetensors"
    )
    num_experts = traced.topology.stack().num_layers * traced.topology.stack().num_experts
    assert 0.2 * weights < data["expert_bytes"] * num_experts < weights


def test_without_the_model_a_page_has_ids_and_says_so(traced: Traced, tmp_path: Path) -> None:
    reader = TraceReader(traced.trace)
    reader.provenance["model"] = str(tmp_path / "gone")
    files = find_model_files(reader, settings_for(traced, expert_mb=2.0))
    assert files.tokenizer is None and files.expert_bytes == 2e6
    assert str(tmp_path / "gone") in files.remark
    data = page_data(reader, recorded(traced), files, 1)
    assert data["texts"] is None and data["remark"] == files.remark
    del reader.provenance["model"]
    assert "--model DIR" in find_model_files(reader, settings_for(traced)).remark


def test_a_model_that_is_given_must_be_the_traced_one(traced: Traced, tmp_path: Path) -> None:
    tiny_tokenizer(300).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is another than the trace was made with"):
        find_model_files(TraceReader(traced.trace), settings_for(traced, model=tmp_path))
