"""Captured steps over rows that begin in host memory: the bits of pages on the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

pytest.importorskip("triton")

from runtime.cuda import backend
from runtime.cuda.decode.captured_model import CapturedModel
from runtime.cuda.kernels import attention as kernels
from runtime.cuda.kernels.attention import attend
from runtime.cuda.memory.pinned import PinnedPool
from runtime.cuda.options import CudaOptions
from runtime.kv.pages import places as places_module
from runtime.kv.pages.places import PAGE, Paged, Spilled
from runtime.kv.row_cache import row_cache
from runtime.kv.storage import Storage
from runtime.serving.model_runner import CapturedRunner
from runtime.serving.request import Request
from runtime.serving.serving_loop import ServingLoop
from runtime.serving.settings import ServeSettings
from tests.helpers import interpreter
from tests.helpers.architectures import architecture_model
from tests.helpers.fake_cuda import fake_cuda, fake_pinning, load_fake
from tests.helpers.serving import greedy
from tests.helpers.tiny import tiny_model
from tests.runtime.cuda.test_graph_step import with_chunks
from tests.runtime.cuda.test_paged_rows import CONTEXT, asked, grown, in_pages
from tests.runtime.cuda.test_row_step import continued, run_prompt, step_of

interpreter.mend()
SHORT, LONGEST_ROW = 16, 64


@pytest.fixture(autouse=True)
def _not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "window"), [(8, None), (256, 80)])
def test_attention_over_spilled_pages_gives_the_bits_of_pages_on_the_device(
    dtype: torch.dtype, width: int, window: int | None
) -> None:
    """Numbers from 6 on are of host memory."""
    table_RN = torch.tensor([[9, 7, 1], [8, 0, 3], [5, 4, 2]], dtype=torch.int32)
    keys, values = torch.randn(2, 3, 2, CONTEXT, width).to(dtype)
    all_keys, all_values = (in_pages(states, table_RN, 10) for states in (keys, values))
    near_keys, near_values = all_keys[:6].clone(), all_values[:6].clone()
    spilled = Spilled(all_keys[6:].clone(), all_values[6:].clone())
    query, rows = torch.randn(3, 4, width).to(dtype), torch.tensor([2, 0, 1])
    positions = torch.tensor([CONTEXT - 1, 170, 63])
    given: dict[str, Any] = {"scale": 0.3, "window": window, "paged": Paged(table_RN, PAGE)}
    expected = attend(query, all_keys, all_values, rows, positions, **given)
    found = attend(query, near_keys, near_values, rows, positions, **given, spilled=spilled)
    assert expected.isfinite().all()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text", "qwen3_next"])
def test_steps_over_spilled_pages_give_the_bits_of_pages_on_the_device(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same captured step goes on while pages leave between its runs."""
    monkeypatch.setattr(kernels, "LONGEST", SHORT)
    monkeypatch.setattr(places_module, "PAGE", SHORT)
    model: Any = with_chunks(architecture_model(kind))
    lengths = {2: 33, 0: 1}
    found = []
    for spills in (False, True):
        storage = Storage(3, LONGEST_ROW, 6 * SHORT, 4 * SHORT)
        cache = grown(row_cache(model, 3, LONGEST_ROW, storage), {2: 37, 0: 5})
        first = {
            row: run_prompt(model, cache, row, torch.arange(5, 5 + length)[None])
            for row, length in lengths.items()
        }
        next_tokens = {row: int(logits_V.argmax()) for row, logits_V in first.items()}
        step = step_of(model, cache, 4)
        pieces = []
        for number in range(2):
            if spills:
                assert cache.pages is not None and cache.pages.spill(1, {2: 2})
                cache.send_pages(torch.device("cpu"))
                for tensor in cache.by_position:  # what they leave behind is read no more
                    tensor[cache.pages._free] = float("nan")
            at = {row: length + 2 * number for row, length in lengths.items()}
            logits = continued(model, step, next_tokens, at, 2)
            next_tokens = {row: int(ones[-1].argmax()) for row, ones in logits.items()}
            pieces += [one for row in lengths for one in logits[row]]
        found.append(torch.stack(pieces))
    assert found[0].isfinite().all()
    assert torch.equal(*found)


# ---------------------------------------------------------------------- served


@pytest.fixture
def _short_pages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "LONGEST", SHORT)
    monkeypatch.setattr(places_module, "PAGE", SHORT)
    with fake_cuda(monkeypatch):
        yield


def spilling_engine(model: Any, pages: int, host_pages: int, **options: Any) -> Any:
    sizes: dict[str, Any] = {
        "batch": 3, "context": LONGEST_ROW, "cache_tokens": pages * SHORT,
        "spill_tokens": host_pages * SHORT,
    }  # fmt: skip
    return load_fake(model, memory=0.75, **sizes, **options).expertflow


def served(
    engine: Any, requests: list[Request], **options: Any
) -> tuple[dict[str, Any], list[int]]:
    """The tokens of each request, and the pages in host memory after each step."""
    given: dict[str, Any] = {"batch": 3, "rows": 3, "context": LONGEST_ROW, "chunk": 64} | options
    loop = ServingLoop(engine, None, ServeSettings(**given))
    assert isinstance(loop._runner, CapturedRunner) and loop._cache.pages is not None
    for request in requests:
        loop.submit(request)
    found: dict[str, Any] = {}
    away = []
    while not loop.is_idle:
        found |= {result.id: result.token_ids for result in loop.step()}
        away.append(loop._cache.pages.num_spilled)
    assert loop.num_displaced == 0
    assert loop.num_failed_steps == 0
    engine.check_integrity()
    return found, away


@pytest.mark.usefixtures("_short_pages")
@pytest.mark.parametrize(("kind", "compile"), [("olmoe", False), ("gpt_oss", True)])
def test_served_tokens_are_those_of_each_request_alone_while_pages_come_and_go(
    kind: str, compile: bool
) -> None:
    """Five pages on the device, for two sequences of three, and a third that needs one."""
    torch._dynamo.reset()
    counters.clear()
    model: Any = tiny_model(kind, num_hidden_layers=2)
    prompts: list[Any] = [one.prompt for one in asked(3)]
    prompts[0] = 2 * prompts[0]
    requests = [
        Request(id=str(i), prompt=one, max_tokens=4, ignore_eos=True)
        for i, one in enumerate(prompts)
    ]
    alone = {str(i): greedy(model, one, 4) for i, one in enumerate(prompts)}
    engine = spilling_engine(model, 5, 6, compile=compile)
    found, away = served(engine, requests)
    assert found == alone
    assert max(away) > 0 and away[-1] == 0
    assert engine.stats().bytes_spilled > 0
    assert not counters["graph_break"]


# ---------------------------------------------------------------------- memory and refusals


def test_pages_in_host_memory_are_pinned_at_once_and_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = tiny_model("olmoe", num_hidden_layers=2)
    with fake_pinning(monkeypatch) as addresses:
        before = set(addresses)
        engine = load_fake(
            model, memory=0.75, batch=4, context=128, cache_tokens=256, spill_tokens=1000
        ).expertflow
        storage = engine.key_value_storage
        assert storage.spilled == 256, "as many as four sequences of 128 can have beyond 256"
        keys = storage.host_pages(0, "keys", torch.empty(0, 4, 1, 8))
        assert keys.shape[::2] == (4, PAGE)
        assert any(addresses - before)
        engine.close()
        assert not addresses


def test_a_pool_hands_out_parts_that_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_pinning(monkeypatch) as addresses:
        pool = PinnedPool(4096)
        one, other = pool.take((2, 3, 64), torch.bfloat16), pool.take((5, 64), torch.float32)
        one.fill_(1), other.fill_(2)
        assert one.sum() == 384 and other.sum() == 640
        with pytest.raises(AssertionError):
            pool.take((4096,), torch.uint8)
        pool.close()
        assert not addresses


def test_options_that_nothing_could_make_use_of_are_refused() -> None:
    with pytest.raises(ValueError, match=r"spill_tokens=64 without cache_tokens=: .* give cache_"):
        CudaOptions(context=64, spill_tokens=64)
    with pytest.raises(ValueError, match=r"spill_tokens=1.5 is not a whole number"):
        CudaOptions(context=64, cache_tokens=64, spill_tokens=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="spill_tokens=-1 is negative"):
        CudaOptions(context=64, cache_tokens=64, spill_tokens=-1)
    assert CudaOptions(context=64, batch=4, cache_tokens=256, spill_tokens=9).spilled_tokens == 0
    assert CudaOptions(context=64, batch=4, cache_tokens=200, spill_tokens=99).spilled_tokens == 56


@pytest.mark.usefixtures("_short_pages")
def test_a_model_without_pages_or_kernels_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: dict[str, Any] = {"batch": 3, "context": 64, "cache_tokens": 64, "spill_tokens": 64}
    with pytest.raises(ValueError, match=r"cache_tokens=64: .* lies in whole rows"):
        load_fake(architecture_model("deepseek_v3"), memory=0.75, **sizes)
    monkeypatch.setattr(backend, "common_layout", lambda _: "its experts have several kinds")
    with pytest.raises(ValueError, match="spill_tokens=64 is for captured steps, but its experts"):
        load_fake(architecture_model("olmoe"), memory=0.75, **sizes)


def test_more_than_the_host_has_is_refused_before_it_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("runtime.sizing.host_memory.available_bytes", lambda: 1 << 10)
    model: Any = tiny_model("olmoe", num_hidden_layers=2)
    options = CudaOptions(context=128, batch=4, cache_tokens=256, spill_tokens=128)
    source: Any = type("Source", (), {"model": model, "layers": [type("L", (), {"top_k": 2})]})
    with pytest.raises(ValueError, match=r"spill_tokens=128 takes 32 KiB .* 1 KiB are free; give"):
        CapturedModel(source, options, torch.device("cpu"))
