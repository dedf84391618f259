"""An offloaded model computes what the stock model computes, whatever the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

import runtime
from runtime.engine.guards.placeholder import Placeholder
from tests.helpers.offloading import Predictor, check, generate, logits, offload, prompts
from tests.helpers.tiny import KINDS, tiny_model

FUSED = [kind for kind in KINDS if kind != "switch_transformers"]
SIZES = {"all": 1.0, "a quarter": 0.25, "the minimum": None}
LIVE_POLICIES = ["lru", "lfu", "predicted"]
MOE_16X64 = Path(__file__).parents[4] / "shared/models/moe-16x64"


# ---------------------------------------------------------------------- logits


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_stock_models(kind: str, size: str) -> None:
    """The prompts need more distinct experts in a layer than the minimum has slots: waves."""
    model = tiny_model(kind)
    expected = logits(model)
    model = offload(model, SIZES[size])
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    check(model)
    num_requests = model.expertflow.stats().hits + model.expertflow.stats().misses
    assert num_requests > 5 * len(model.expertflow.stats().layers), "layers use many experts"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_bit_identical_whatever_the_cache(
    kind: str, dtype: torch.dtype, tiny_predictor: Predictor
) -> None:
    seen: list[Tensor] = []
    for size in (*SIZES.values(), 0.4):
        for policy in LIVE_POLICIES:
            model = tiny_model(kind).to(dtype)
            file = tiny_predictor(kind) if policy == "predicted" else None
            model = offload(model, size, policy, predictor=file)
            seen += [logits(model), logits(model)]
            step = generate(model, output_logits=True, return_dict_in_generate=True)
            seen.append(torch.stack(step.logits))
            check(model)
    assert seen[0].dtype == dtype
    for number, values in enumerate(seen):
        assert torch.equal(values, seen[2 if number % 3 == 2 else 0])


@pytest.mark.parametrize("kind", FUSED)
def test_logits_in_bfloat16_are_as_close_as_its_rounding(kind: str) -> None:
    """Against float32 the offloaded model is no further off than the stock one, give or take."""
    exact = logits(tiny_model(kind))
    model = tiny_model(kind).to(torch.bfloat16)
    stock = (logits(model).float() - exact).abs().mean()
    ours = (logits(offload(model, None)).float() - exact).abs().mean()
    assert ours <= 1.25 * stock


@pytest.mark.parametrize("kind", KINDS)
def test_experts_of_odd_shape_are_exact_too(kind: str) -> None:
    """Slots that begin at odd addresses, rows of odd length."""
    name = {"switch_transformers": "d_ff", "qwen3_moe": "moe_intermediate_size"}
    model: Any = tiny_model(kind, **{name.get(kind, "intermediate_size"): 13})
    if kind != "switch_transformers":
        model.set_experts_implementation("eager")  # the stock model's others need round shapes
    expected, seen = logits(model), []
    for size in SIZES.values():
        with offload(model, size).expertflow:
            step = generate(model, output_logits=True, return_dict_in_generate=True)
            seen.append((logits(model), torch.stack(step.logits)))
    torch.testing.assert_close(seen[0][0], expected, rtol=0, atol=1e-5)
    for whole, steps in seen:
        assert torch.equal(whole, seen[0][0]) and torch.equal(steps, seen[0][1])


@pytest.mark.parametrize("kind", FUSED)
def test_experts_from_a_directory_are_exact_too(
    kind: str, tiny_directory: Callable[[str], Path]
) -> None:
    stock = AutoModelForCausalLM.from_pretrained(tiny_directory(kind))
    model = offload(tiny_directory(kind), 0.25)
    torch.testing.assert_close(logits(model), logits(stock), rtol=0, atol=1e-5)
    assert torch.equal(generate(model), generate(stock))


def test_an_encoder_decoder_from_a_directory_is_exact_too(
    tiny_directory: Callable[[str], Path],
) -> None:
    stock = AutoModelForSeq2SeqLM.from_pretrained(tiny_directory("switch_transformers"))
    model = offload(tiny_directory("switch_transformers"), 0.25)
    torch.testing.assert_close(logits(model), logits(stock), rtol=0, atol=1e-5)
    assert torch.equal(generate(model), generate(stock))


# ---------------------------------------------------------------------- generate


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_p": 0.95},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams, several sequences": {"num_beams": 4, "num_return_sequences": 2},
    "no key/value cache": {"use_cache": False},
    "static key/value cache": {"cache_implementation": "static"},
    "repetition penalty": {"repetition_penalty": 1.5},
}


@pytest.mark.parametrize("way", GENERATION)
@pytest.mark.parametrize("kind", KINDS)
def test_generated_tokens_are_the_stock_models(
    kind: str, way: str, tiny_predictor: Predictor
) -> None:
    expected = generate(tiny_model(kind), **GENERATION[way])
    assert len(expected.unique()) > 5, "a model that repeats itself would prove nothing"
    model = offload(tiny_model(kind), 0.3, "predicted", predictor=tiny_predictor(kind))
    assert torch.equal(generate(model, **GENERATION[way]), expected)
    check(model)
    assert model.expertflow.stats().prediction_ms


@pytest.mark.parametrize("kind", KINDS)
def test_a_streamer_gets_the_stock_models_tokens(kind: str) -> None:
    streams = []
    models: list[Any] = [tiny_model(kind), offload(tiny_model(kind))]
    for model in models:
        stream = Collector()
        model.generate(prompts()[0][:1], max_new_tokens=8, do_sample=False, streamer=stream)
        assert stream.ended
        streams.append(stream.tokens)
    assert streams[0] == streams[1] and len(streams[0]) > 8


def test_embeddings_instead_of_token_ids_give_the_stock_models_tokens(
    tiny_predictor: Predictor,
) -> None:
    def continue_embeddings(model: Any) -> Tensor:
        embeds = model.get_input_embeddings()(prompts()[0])
        options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": prompts()[1]}
        return model.generate(inputs_embeds=embeds, **options)

    expected = continue_embeddings(tiny_model("olmoe"))
    model = offload(tiny_model("olmoe"), 0.25, "predicted", predictor=tiny_predictor("olmoe"))
    assert torch.equal(continue_embeddings(model), expected)


def test_generations_one_after_another_do_not_disturb_each_other(tiny_predictor: Predictor) -> None:
    stock = tiny_model("mixtral")
    model = offload(tiny_model("mixtral"), 0.25, "predicted", predictor=tiny_predictor("mixtral"))
    for way in ("greedy", "beams", "sampling", "several sequences", "greedy"):
        assert torch.equal(generate(model, **GENERATION[way]), generate(stock, **GENERATION[way]))
        check(model)


# ---------------------------------------------------------------------- moe-16x64


@pytest.fixture(scope="module")
def trained() -> Any:
    """The stock moe-16x64, in float32 and bfloat16."""
    if not MOE_16X64.is_dir():
        pytest.skip("shared/models/moe-16x64 is not here")
    return {
        dtype: AutoModelForCausalLM.from_pretrained(MOE_16X64, dtype=dtype).eval()
        for dtype in (torch.float32, torch.bfloat16)
    }


TEXTS = ["The old lighthouse keeper climbed the stairs, and at the top", "def main():"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moe_16x64_generates_the_stock_models_tokens_bit_identically(
    trained: Any, dtype: torch.dtype
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MOE_16X64, padding_side="left")
    options: dict[str, Any] = {
        "max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "output_logits": True,
        "return_dict_in_generate": True,
        **tokenizer(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False),
    }  # fmt: skip
    stock = trained[dtype].generate(**options)
    seen = []
    for size, policy in ((1.0, "lru"), (0.25, "lru"), (0.25, "lfu"), (8 / 1024, "lru")):
        model: Any = runtime.load(MOE_16X64, memory=size, policy=policy, dtype=dtype)
        ours = model.generate(**options)
        assert torch.equal(ours.sequences, stock.sequences)
        seen.append(torch.stack(ours.logits))
        check(model)
    assert all(torch.equal(values, seen[0]) for values in seen)
    if dtype == torch.float32:
        torch.testing.assert_close(seen[0], torch.stack(stock.logits), rtol=0, atol=1e-5)


def test_moe_16x64_never_holds_more_than_its_slots(trained: Any) -> None:
    model = runtime.load(MOE_16X64, memory=0.125)
    assert model.expertflow.stats().num_slots == 128
    held = sum(p.numel() for p in model.parameters() if not isinstance(p, Placeholder))
    assert held < 0.4 * sum(p.numel() for p in trained[torch.float32].parameters())
