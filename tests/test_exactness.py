"""An offloaded model computes what the stock model computes, and leaves no trace when detached."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

import runtime
from routing.topology import topology_of
from runtime.store import ExpertStore
from tests.onnx_predictor import write_predictor
from tests.tiny import KINDS, PAD, tiny_model

FUSED = [kind for kind in KINDS if kind != "switch_transformers"]
SIZES = {"all": 1.0, "a quarter": 0.25, "the minimum": None}
LIVE_POLICIES = ["lru", "lfu", "predicted"]
MOE_16X64 = Path(__file__).parents[2] / "shared/models/moe-16x64"

Predictor = Callable[[str], Path]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """`predictor(kind)`: a predictor of that tiny model, made once."""
    made: dict[str, Path] = {}

    def path(kind: str) -> Path:
        if kind not in made:
            target = tmp_path_factory.mktemp("predictor") / "predictor.onnx"
            made[kind] = write_predictor(target, topology_of(tiny_model(kind)))
        return made[kind]

    return path


def minimum(model: Any) -> float:
    """The fraction of the experts that one layer's top-k is."""
    layers = [layer for stack in topology_of(model).stacks for layer in stack.layers]
    return max(layer.top_k for layer in layers) / sum(layer.num_experts for layer in layers)


def offload(model: Any, size: float | None = 0.25, policy: str = "lru", **options: Any) -> Any:
    """`runtime.load`; a size of None is the smallest there is."""
    return runtime.load(
        model, memory=minimum(model) if size is None else size, policy=policy, **options
    )


def prompts() -> tuple[Tensor, Tensor]:
    """Token ids and mask of three prompts of 12, 7 and 9 tokens, padded at the left."""
    token_ids = torch.randint(2, 256, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(token_ids)
    for row, padding in enumerate((0, 5, 3)):
        token_ids[row, :padding], mask[row, :padding] = PAD, 0
    return token_ids, mask


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    """Of the tokens that are not padding."""
    token_ids, mask = prompts()
    if model.config.is_encoder_decoder:
        decoder_ids = token_ids[:, 5:]
        output = model(token_ids, attention_mask=mask, decoder_input_ids=decoder_ids)
        return output.logits.flatten(0, 1)
    return model(token_ids, attention_mask=mask).logits[mask > 0]


def generate(model: Any, **options: Any) -> Any:
    token_ids, mask = prompts()
    options = {"max_new_tokens": 8, "do_sample": False} | options
    torch.manual_seed(5)
    return model.generate(token_ids, attention_mask=mask, **options)


def check(model: Any) -> None:
    model.expertflow.check_integrity()
    stats = model.expertflow.stats()
    resident = sum(pool.cache.num_resident for pool in dict.fromkeys(model.expertflow._pools))
    assert stats.misses == stats.evictions + resident, "whatever was loaded stays or was evicted"


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
    kind: str, dtype: torch.dtype, predictor: Predictor
) -> None:
    seen: list[Tensor] = []
    for size in (*SIZES.values(), 0.4):
        for policy in LIVE_POLICIES:
            model = tiny_model(kind).to(dtype)
            file = predictor(kind) if policy == "predicted" else None
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
def test_generated_tokens_are_the_stock_models(kind: str, way: str, predictor: Predictor) -> None:
    expected = generate(tiny_model(kind), **GENERATION[way])
    assert len(expected.unique()) > 5, "a model that repeats itself would prove nothing"
    model = offload(tiny_model(kind), 0.3, "predicted", predictor=predictor(kind))
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
    predictor: Predictor,
) -> None:
    def continue_embeddings(model: Any) -> Tensor:
        embeds = model.get_input_embeddings()(prompts()[0])
        options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": prompts()[1]}
        return model.generate(inputs_embeds=embeds, **options)

    expected = continue_embeddings(tiny_model("olmoe"))
    model = offload(tiny_model("olmoe"), 0.25, "predicted", predictor=predictor("olmoe"))
    assert torch.equal(continue_embeddings(model), expected)


def test_generations_one_after_another_do_not_disturb_each_other(predictor: Predictor) -> None:
    stock = tiny_model("mixtral")
    model = offload(tiny_model("mixtral"), 0.25, "predicted", predictor=predictor("mixtral"))
    for way in ("greedy", "beams", "sampling", "several sequences", "greedy"):
        assert torch.equal(generate(model, **GENERATION[way]), generate(stock, **GENERATION[way]))
        check(model)


# ---------------------------------------------------------------------- statistics


def test_the_counts_add_up(predictor: Predictor) -> None:
    model = offload(tiny_model("olmoe"), 0.25, "predicted", predictor=predictor("olmoe"))
    generate(model, max_new_tokens=4, eos_token_id=None)
    stats = model.expertflow.stats()
    assert (stats.steps, stats.tokens) == (4, 12 + 7 + 9 + 3 * 3)
    assert stats.hits == stats.hits_L.sum() and stats.misses == stats.misses_L.sum()
    assert stats.hit_rate == stats.hits / (stats.hits + stats.misses)
    assert stats.bytes_loaded == stats.misses * (3 * 32 * 24 * 4)
    assert len(stats.prediction_ms) == 4 and 0 <= stats.recall <= 1
    report = model.expertflow.report()
    assert report.startswith("predicted: 8 of 32 experts fit, 37 tokens in 4 steps, hit rate ")
    assert "\n" not in report
    stats.reset()
    assert (stats.steps, stats.tokens, stats.misses, stats.bytes_loaded) == (0, 0, 0, 0)


def test_the_counts_can_be_seen_as_a_table_and_a_picture(tmp_path: Path) -> None:
    from rich.console import Console

    model = offload(tiny_model("olmoe"))
    generate(model)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(model.expertflow.stats().table())
    text = console.export_text()
    for layer in range(4):
        assert f"model.layers.{layer}.mlp.experts" in text
    model.expertflow.stats().plot(tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_pass_with_all_experts_resident_only_hits() -> None:
    model = offload(tiny_model("olmoe"), 1.0)
    logits(model)
    model.expertflow.stats().reset()
    logits(model)
    stats = model.expertflow.stats()
    assert stats.misses == 0 and stats.hits > 0 and stats.bytes_loaded == 0


# ---------------------------------------------------------------------- detach


def footprint(model: Any) -> dict[str, Any]:
    """Everything about a model that offloading might change."""
    return {
        "attributes": {name: sorted(m.__dict__) for name, m in model.named_modules()},
        "hooks": {
            name: [len(v) for k, v in sorted(m.__dict__.items()) if "hooks" in k]
            for name, m in model.named_modules()
        },
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        "order": list(model.state_dict()),
        "training": {name: m.training for name, m in model.named_modules()},
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "classes": [type(m) for m in model.modules()],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_detached_model_is_bit_for_bit_what_it_was(kind: str, predictor: Predictor) -> None:
    model: Any = tiny_model(kind)
    expected, tokens = logits(model), generate(model)
    before = footprint(model)
    offload(model, 0.25, "predicted", predictor=predictor(kind))
    generate(model)
    assert model.expertflow.detach() is model
    assert footprint(model) == before
    assert torch.equal(logits(model), expected) and torch.equal(generate(model), tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_a_detached_model_from_a_directory_is_the_stock_model(
    kind: str, tiny_directory: Callable[[str], Path]
) -> None:
    model = offload(tiny_directory(kind))
    generate(model)
    model.expertflow.detach()
    stock = type(model).from_pretrained(tiny_directory(kind))
    ours, theirs = model.state_dict(), stock.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    torch.testing.assert_close(logits(model), logits(stock), rtol=0, atol=1e-5)
    assert torch.equal(generate(model), generate(stock))
    left, right = footprint(model), footprint(stock)
    for key in left.keys() - {"parameters"}:
        assert left[key] == right[key], key


def test_a_model_in_training_comes_back_in_training_module_by_module() -> None:
    model: Any = tiny_model("olmoe").train()
    model.model.layers[1].eval()
    before = footprint(model)
    offload(model)
    assert not any(module.training for module in model.modules())
    model.expertflow.detach()
    assert footprint(model) == before


def test_the_context_manager_detaches_even_after_an_error() -> None:
    model: Any = tiny_model("olmoe")
    before = footprint(model)

    def fail() -> None:
        with offload(model).expertflow as engine:
            assert model.expertflow is engine
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert footprint(model) == before


def test_detaching_twice_does_nothing_and_the_model_can_be_offloaded_again() -> None:
    model: Any = tiny_model("olmoe")
    expected = generate(model)
    for _ in range(2):
        engine = offload(model).expertflow
        assert torch.equal(generate(model), expected)
        engine.detach()
        engine.detach()
    assert torch.equal(generate(model), expected)


def test_a_detached_models_slots_are_freed() -> None:
    model: Any = tiny_model("olmoe")
    arena = weakref.ref(offload(model).expertflow._pools[0].arena)
    assert arena() is not None
    model.expertflow.detach()
    gc.collect()
    assert arena() is None


def test_a_failed_attach_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("olmoe")
    before, expected = footprint(model), logits(model)
    original = type(model).to

    def fail_once(self: Any, *args: Any) -> Any:
        monkeypatch.setattr(type(self), "to", original)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(model), "to", fail_once)
    with pytest.raises(RuntimeError, match="out of memory"):
        offload(model)
    assert footprint(model) == before
    assert torch.equal(logits(model), expected)


# ---------------------------------------------------------------------- failing loads


class Failing(ExpertStore):
    """Another store, whose reads fail at the given one, half done."""

    def __init__(self, store: ExpertStore, fail_at: int, error: BaseException) -> None:
        self._store, self._error = store, error
        self._reads = iter(range(1 << 20))
        self._fail_at = fail_at

    def specs(self, layer: int) -> Any:
        return self._store.specs(layer)

    def read(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        if next(self._reads) == self._fail_at:
            next(iter(into.values())).fill_(float("nan"))
            raise self._error
        self._store.read(layer, expert, into)

    def restore(self, layer: int) -> None:
        self._store.restore(layer)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("the disk is gone")])
@pytest.mark.parametrize("fail_at", [0, 1, 5, 17, 40])
@pytest.mark.parametrize("size", [0.0625, 0.25, 1.0])
def test_an_expert_that_did_not_arrive_is_not_taken_for_resident(
    size: float, fail_at: int, error: BaseException
) -> None:
    model: Any = tiny_model("olmoe")
    expected = logits(model)
    engine = offload(model, size).expertflow
    for pool in dict.fromkeys(engine._pools):
        pool._store = Failing(pool._store, fail_at, error)
    failed = False
    for _ in range(3):
        try:
            torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
        except (KeyboardInterrupt, OSError):
            failed = True
        engine.check_integrity()
    assert failed == (fail_at < 32 or size < 1), "with all resident there are 32 reads at most"
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


class Interrupting(np.ndarray):
    """Interrupts the program where something is written to it."""

    def __setitem__(self, *_: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["between the books", "after the books"])
def test_an_expert_that_is_booked_when_an_interrupt_comes_is_not_taken_for_resident(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny_model("olmoe")
    expected = logits(model)
    engine = offload(model, 0.25).expertflow
    pool = engine._pools[0]
    for slots in pool.arena.tensors.values():
        slots.fill_(float("nan"))

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "between the books":
            patch.setattr(pool.cache, "key_of_slot", pool.cache.key_of_slot.view(Interrupting))
        else:
            patch.setattr(pool, "_load", interrupted)
        with pytest.raises(KeyboardInterrupt):
            logits(model)
    engine.check_integrity()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


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
        "max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "output_logits": True,
        "return_dict_in_generate": True,
        **tokenizer(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False),
    }  # fmt: skip
    stock = trained[dtype].generate(**options)
    seen = []
    for size, policy in ((1.0, "lru"), (0.25, "lru"), (0.25, "lfu"), (8 / 1024, "lru")):
        model = runtime.load(MOE_16X64, memory=size, policy=policy, dtype=dtype)
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
    held = sum(p.numel() for p in model.parameters())
    assert held < 0.4 * sum(p.numel() for p in trained[torch.float32].parameters())


def test_an_offloaded_model_is_not_saved_without_its_experts(tmp_path: Path) -> None:
    model = runtime.load(tiny_model("olmoe"), memory=0.5)
    with pytest.raises(ValueError, match="saved without its experts"):
        model.save_pretrained(tmp_path)
    model.expertflow.detach().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
