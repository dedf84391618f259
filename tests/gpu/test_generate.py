"""generate over captured steps: the library's tokens, bit-identical whatever is resident."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

pytest.importorskip("triton")

from runtime.cuda import prefetching, trial
from tests.gpu.offloaded import (
    MOE_8X32,
    NEVER,
    NEW,
    PREDICTOR,
    check_slots,
    forbid_waiting,
    generate,
    generate_with_logits,
    minimum,
    needs_gpu,
    offloaded,
    prompts,
    stock_tokens,
)
from tests.helpers.tiny import tiny_model

pytestmark = needs_gpu

CAPTURED = ["olmoe", "mixtral", "qwen3_moe", "gpt_oss"]

# ---------------------------------------------------------------------- the library's tokens


@pytest.mark.parametrize("kind", CAPTURED)
def test_captured_decoding_gives_the_librarys_tokens(kind: str) -> None:
    """In batches of 1 to 5 rows with padding, in any order."""
    with offloaded(tiny_model(kind), memory=0.4) as model:  # 8 of 24 for the batch of 5
        for batch in (3, 1, 2, 5, 4, 1):
            assert torch.equal(generate(model, batch), stock_tokens(kind, batch))
            assert model.expertflow.decode_path == "graph"
            check_slots(model)


def test_a_sliding_window_hides_what_is_out_of_it() -> None:
    expected = generate(tiny_model("mixtral", sliding_window=5), 3)
    with offloaded(tiny_model("mixtral", sliding_window=5), memory=0.4) as model:
        assert torch.equal(generate(model, 3), expected)
        assert model.expertflow.decode_path == "graph"


def test_rows_end_at_their_end_tokens() -> None:
    new_BT = stock_tokens("olmoe", 3, eos_token_id=NEVER)[:, -NEW:]
    end = [int(new_BT[0, 5]), int(new_BT[1, 3])]
    expected = generate(tiny_model("olmoe"), 3, eos_token_id=end)
    assert (expected[:2] == 0).any()
    with offloaded(tiny_model("olmoe")) as model:
        assert torch.equal(generate(model, 3, eos_token_id=end), expected)


def test_processors_and_lengths_are_the_librarys() -> None:
    options: dict[str, Any] = {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 8,
    }
    expected = generate(tiny_model("olmoe"), 2, **options)
    with offloaded(tiny_model("olmoe")) as model:
        assert torch.equal(generate(model, 2, **options), expected)
        assert torch.equal(generate(model, 2, max_new_tokens=1), stock_tokens("olmoe", 2)[:, :13])
        assert model.expertflow.decode_path == "graph"


def test_a_dict_is_returned_where_one_is_asked_for() -> None:
    with offloaded(tiny_model("olmoe")) as model:
        output = generate(model, 2, return_dict_in_generate=True)
        assert torch.equal(output.sequences.cpu(), stock_tokens("olmoe", 2))
        assert model.expertflow.decode_path == "graph"


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.reshape(-1).tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=["greedy", "sampled"])
def test_a_streamer_gets_every_token(options: dict[str, Any]) -> None:
    collector = Collector()
    with offloaded(tiny_model("olmoe")) as model:
        tokens = generate(model, streamer=collector, **options)
        assert model.expertflow.decode_path == "graph"
    assert collector.tokens == tokens[0].tolist()
    assert collector.ended


class Checking(BaseStreamer):
    """Looks at every slot after each token, while the next step may be under way."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def put(self, _: Tensor) -> None:
        check_slots(self._model)

    def end(self) -> None: ...


@pytest.mark.parametrize("prefetch", [False, True])
def test_looking_at_the_slots_between_steps_disturbs_nothing(prefetch: bool) -> None:
    with offloaded(tiny_model("olmoe"), prefetch=prefetch) as model:
        for _ in range(2):
            tokens = generate(model, streamer=Checking(model))
            assert torch.equal(tokens, stock_tokens("olmoe", 1))


def test_sampling_repeats_with_its_seed_whatever_is_resident() -> None:
    drawn = []
    for memory in (1.0, 0.25):
        with offloaded(tiny_model("olmoe"), memory=memory) as model:
            for seed in (5, 5, 6):
                torch.manual_seed(seed)
                drawn.append(generate(model, 2, do_sample=True, temperature=1.5))
            assert model.expertflow.decode_path == "graph"
    assert all(torch.equal(drawn[i], drawn[0]) for i in (1, 3, 4))
    assert torch.equal(drawn[2], drawn[5])
    assert not torch.equal(drawn[0], drawn[2])


# ---------------------------------------------------------------------- bit for bit

RESIDENT = {"memory": 1.0, "policy": "lru"}
WAYS: dict[str, dict[str, Any]] = {
    "a quarter": {"memory": 0.25, "policy": "lru"},
    "a quarter, lfu": {"memory": 0.25, "policy": "lfu"},
    "a quarter, reuse": {"memory": 0.25, "policy": "reuse"},
    "a quarter, reuse and prefetching": {"memory": 0.25, "policy": "reuse", "prefetch": True},
    "a quarter, prefetching": {"memory": 0.25, "policy": "lru", "prefetch": True},
    "a quarter, predicted": {"memory": 0.25, "predictor": PREDICTOR},
    "a quarter, predicted and prefetching": {
        "memory": 0.25,
        "predictor": PREDICTOR,
        "prefetch": True,
    },
    "the minimum": {"memory": minimum(4, 8 * 32), "policy": "lru", "batch": 1},
    "the minimum, predicted and prefetching": {
        "memory": minimum(4, 8 * 32),
        "predictor": PREDICTOR,
        "prefetch": True,
        "batch": 1,
    },
}


def outputs(options: dict[str, Any], batch: int) -> list[Tensor]:
    with offloaded(MOE_8X32, **options) as model:
        greedy = generate(model, batch)
        made = [greedy, *generate_with_logits(model, batch)]
        assert model.expertflow.decode_path == "graph"
        check_slots(model)
        predictor_thread = model.expertflow._backend.decoder.driver.thread
        assert predictor_thread is None or predictor_thread.failure is None
        return made


@pytest.fixture(scope="module")
def resident() -> dict[int, list[Tensor]]:
    """Tokens and logits with all experts resident, for one row and for three."""
    return {batch: outputs(RESIDENT, batch) for batch in (1, 3)}


@pytest.mark.parametrize("way", WAYS)
def test_tokens_and_logits_are_bit_identical_to_the_resident_models(
    way: str, resident: dict[int, list[Tensor]]
) -> None:
    for batch in (1, 3)[: 1 if WAYS[way].get("batch") == 1 else 2]:
        for ours, theirs in zip(outputs(WAYS[way], batch), resident[batch], strict=True):
            assert torch.equal(ours, theirs)


def relative_errors(logits_BNV: Tensor, exact_BNV: Tensor) -> Tensor:
    return (logits_BNV - exact_BNV).norm(dim=-1) / exact_BNV.norm(dim=-1)


@torch.no_grad()
def step_by_step(model: Any, tokens_BT: Tensor, mask_BT: Tensor, num_new: int) -> Tensor:
    """Logits [B, N, V] by transformers with its dynamic cache, for given tokens."""
    logits, past, length = [], None, tokens_BT.shape[1] - num_new
    for end in range(length, tokens_BT.shape[1]):
        start = 0 if past is None else end - 1
        mask = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), end - length)], 1)
        positions_BT = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:]
        output = model(
            input_ids=tokens_BT[:, start:end], attention_mask=mask, position_ids=positions_BT,
            past_key_values=past, use_cache=True,
        )  # fmt: skip
        past = output.past_key_values
        logits.append(output.logits[:, -1].float().cpu())
    return torch.stack(logits, 1)


def from_disk(dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(MOE_8X32, dtype=dtype).eval()


@pytest.mark.parametrize("batch", [1, 4])
def test_logits_are_as_close_to_float32_as_the_librarys_bfloat16(batch: int) -> None:
    """Over enough sequences: an error stays in a sequence's keys and values."""
    num_new, seeds = 48, range(1, 1 + 12 // batch)
    with offloaded(MOE_8X32, context=80) as model:
        said = [
            generate_with_logits(
                model, batch, seed=seed, max_new_tokens=num_new, eos_token_id=NEVER
            )
            for seed in seeds
        ]
    precise, stock = from_disk(torch.float32).to("cuda"), from_disk(torch.bfloat16).to("cuda")
    ours, theirs = list[Tensor](), list[Tensor]()
    for seed, (tokens_BT, ours_BNV) in zip(seeds, said, strict=True):
        mask_BT = prompts(batch, seed=seed)["attention_mask"]
        inputs = tokens_BT.to("cuda"), mask_BT.to("cuda"), num_new
        exact_BNV = step_by_step(precise, *inputs)
        ours.append(relative_errors(ours_BNV, exact_BNV))
        theirs.append(relative_errors(step_by_step(stock, *inputs), exact_BNV))
    medians = [torch.cat(errors).median() for errors in (ours, theirs)]
    assert medians[0] <= 1.1 * medians[1], "ours {:.2e}, transformers' {:.2e}".format(*medians)


def test_compiled_steps_say_the_same() -> None:
    with offloaded(tiny_model("olmoe"), compile=True) as model:
        for batch in (1, 3):
            assert torch.equal(generate(model, batch), stock_tokens("olmoe", batch))
        assert model.expertflow.decode_path == "graph"


def test_prefetching_is_tried_until_it_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetching, "TURN", 4)
    monkeypatch.setattr(trial, "SETTLING", 1)
    monkeypatch.setattr(prefetching, "NEEDED", 6)
    with offloaded(tiny_model("olmoe"), prefetch="auto") as model:
        for _ in range(3):
            assert torch.equal(generate(model), stock_tokens("olmoe", 1))
        assert "ms a step with it" in model.expertflow.prefetching
        check_slots(model)


def test_belady_replays_what_was_recorded_with_fewer_loads(tmp_path: Path) -> None:
    misses = []
    recorded = tmp_path / "routes"
    for options in ({"record": recorded}, {"policy": "belady", "replay": recorded}):
        with offloaded(tiny_model("olmoe"), **options) as model:
            assert torch.equal(generate(model), stock_tokens("olmoe", 1))
            assert model.expertflow.decode_path == "graph"
            misses.append(model.expertflow.stats().misses)
    assert misses[1] < misses[0]


# ---------------------------------------------------------------------- inside a step


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_step_never_waits_for_the_device(prefetch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = forbid_waiting(monkeypatch)
    with offloaded(MOE_8X32, predictor=PREDICTOR, prefetch=prefetch) as model:
        generate(model, eos_token_id=NEVER)
        generate(model, 2, eos_token_id=NEVER)
        assert model.expertflow._backend.decoder.driver.thread.failure is None
    assert len(watched) == 2 * (NEW - 2)
    torch.cuda.set_sync_debug_mode("error")  # what the watching would have said
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_counts_of_captured_steps_add_up() -> None:
    with offloaded(tiny_model("olmoe"), memory=0.25) as model:
        generate(model, eos_token_id=NEVER)
        stats = model.expertflow.stats()
        stats.reset()
        generate(model, eos_token_id=NEVER)
        link_bytes = model.expertflow._backend.decoder._host.link_bytes(0)
    steps = NEW - 1  # the prompt's pass gives the first token
    assert stats.steps == steps + 1
    assert stats.tokens == 12 + steps
    requests = stats.hits_L + stats.misses_L
    assert (requests >= steps * 2).all() and (requests <= steps * 2 + 8).all()
    assert stats.misses > 0
    assert stats.bytes_loaded % link_bytes == 0
    assert stats.bytes_loaded >= stats.misses * link_bytes
    assert stats.seconds["step"] > 0


# ---------------------------------------------------------------------- what is not captured

FALLBACKS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "beams": ({}, {"num_beams": 2}, "beam"),
    "too short a context": ({"context": 20}, {}, "context=20"),
    "too many rows": ({"batch": 1}, {}, "batch=1"),
    "scores": ({}, {"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
    "no cache": ({}, {"use_cache": False}, "use_cache"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_is_not_captured_says_why_and_gives_the_same_tokens(name: str) -> None:
    loading, options, reason = FALLBACKS[name]
    expected = generate(tiny_model("olmoe"), 2, **options)
    with offloaded(tiny_model("olmoe"), **loading) as model:
        with pytest.warns(UserWarning, match="outside of CUDA graphs"):
            tokens = generate(model, 2, **options)
        assert reason in model.expertflow.decode_path
        ours, theirs = (t if isinstance(t, Tensor) else t.sequences for t in (tokens, expected))
        assert torch.equal(ours.cpu(), theirs)
        generate(model, 1, max_new_tokens=4)
        assert model.expertflow.decode_path == "graph"


@pytest.mark.parametrize(
    ("kind", "overrides", "reason"),
    [
        ("mixtral", {"hidden_act": "tanh"}, "activation"),
        ("switch_transformers", {}, "encoder-decoder"),
    ],
)
def test_experts_without_kernels_run_generically(
    kind: str, overrides: dict[str, Any], reason: str
) -> None:
    expected = generate(tiny_model(kind, **overrides), 2)
    with offloaded(tiny_model(kind, **overrides)) as model:
        assert torch.equal(generate(model, 2), expected)
        assert reason in model.expertflow.decode_path
        model.expertflow.check_integrity()
