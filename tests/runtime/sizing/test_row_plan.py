"""The choice of how many sequences decode together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.batch.jobs import Jobs
from runtime.batch.lengths import Length, mean_tokens, sampled_lengths
from runtime.batch.sequences import ON_CPU, sized, told
from runtime.cuda import row_choices as choices
from runtime.cuda.device_budget import device_budget, reserved_bytes
from runtime.kv.size import page_bytes
from runtime.kv.storage import StorageSize
from runtime.serving.batch.rows import Row
from runtime.serving.batch.settings import BatchSettings
from runtime.sizing.row_plan import NEAR_BEST, RowChoice, best_choice
from runtime.weights.repository.hub import HubOptions
from runtime.weights.source import from_path_on_meta

MODEL = Path(__file__).parents[3] / "exports/moe-8x32"
DEVICE = torch.device("cpu")
POSITIVE = st.floats(1e-3, 10)


@given(st.lists(st.tuples(st.integers(1, 1024), POSITIVE, POSITIVE), min_size=1, max_size=9))
def test_the_fewest_sequences_near_the_best_bound_are_chosen(
    drawn: list[tuple[int, float, float]],
) -> None:
    found = [RowChoice(rows, 1, link_s, device_s) for rows, link_s, device_s in drawn]
    chosen, best = best_choice(found), max(choice.tokens_per_s for choice in found)
    assert chosen.tokens_per_s >= NEAR_BEST * best
    assert all(
        choice.tokens_per_s < NEAR_BEST * best for choice in found if choice.rows < chosen.rows
    )


@pytest.fixture
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "measure_link", lambda *_: 1e6)
    monkeypatch.setattr(choices, "device_bandwidth", lambda *_: 1e7)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (300 << 20, 400 << 20))


def choices_of(
    memory: float | int, most: int, context: int = 64, **options: Any
) -> list[RowChoice]:
    source = from_path_on_meta(MODEL, "auto", HubOptions())
    sizes: dict[str, Any] = {"context": context, "most": most}
    return list(choices.row_choices(source, memory, device=DEVICE, **sizes, **options))


@pytest.mark.usefixtures("_measured")
def test_within_a_size_more_sequences_leave_fewer_experts() -> None:
    found = choices_of(95 << 20, most=1024)
    assert [choice.rows for choice in found] == list(choices.ROWS[: len(found)])
    assert 1 < len(found) < len(choices.ROWS)
    slots = [choice.slots for choice in found]
    assert slots == sorted(slots, reverse=True)
    assert slots[-1] < slots[0]


@pytest.mark.usefixtures("_measured")
def test_a_share_of_the_experts_stays_and_the_free_memory_bounds_the_sequences() -> None:
    short, long = choices_of(0.5, most=1024), choices_of(0.5, most=1024, context=512)
    assert len({choice.slots for choice in short}) == 1
    assert len(long) < len(short)
    assert [choice.rows for choice in choices_of(0.5, most=20)] == [8, 16, 32]


def settings(**given: Any) -> BatchSettings:
    return BatchSettings(model=str(MODEL), dataset="rows.jsonl", out=Path("out.jsonl"), **given)


def test_on_a_cpu_and_with_workers_the_number_is_fixed() -> None:
    assert sized(settings(device="cpu"), 500).batch == ON_CPU
    assert sized(settings(device="cpu", workers=2), 500).batch == ON_CPU
    assert sized(settings(device="cpu", rows=8), 500).batch == 8
    assert sized(settings(device="cpu", batch=3), 500).batch == 3


@pytest.mark.usefixtures("_measured")
def test_on_a_gpu_the_choice_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("runtime.loading.target_device", lambda *_: torch.device("cuda"))
    chosen = sized(settings(context=64, memory="0.5"), 100)
    expected = best_choice(choices_of(0.5, most=100))
    assert chosen.batch == chosen.rows == expected.rows
    assert capsys.readouterr().err.strip() == told(expected)
    with pytest.raises(ValueError, match="has no room for 1024 tokens of 8 sequences"):
        sized(settings(memory="1MiB"), 100)


# ---------------------------------------------------------------------- tokens that are needed


LENGTHS = st.lists(st.builds(Length, st.integers(1, 900), st.integers(0, 900)), max_size=20)


@given(LENGTHS, st.integers(64, 1000))
def test_the_mean_is_within_what_sequences_take(lengths: list[Length], context: int) -> None:
    fitting = [sum(one) for one in lengths if sum(one) <= context]
    found = mean_tokens(lengths, context, 64)
    if not fitting:
        assert found is None
        return
    assert found is not None
    assert min(fitting) <= found <= -(-max(fitting) // 64) * 64 + 1
    assert found >= sum(fitting) / len(fitting)


def test_long_sequences_count_by_the_time_that_they_are_in_flight() -> None:
    short, long = Length(1, 63), Length(1, 639)
    assert mean_tokens([short] * 9 + [long], 1024, 64) == int((9 * 63 * 64 + 639 * 640) / 1206) + 1


def rows(count: int) -> list[Row]:
    data: list[Any] = [{"prompt": [1] * (1 + number), "max_tokens": 4} for number in range(count)]
    return [Row(f"row {number}", one) for number, one in enumerate(data)]


def test_lengths_are_those_of_rows_that_are_left_all_over_the_data_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("runtime.batch.lengths.SAMPLED", 5)
    jobs = Jobs(settings(), None, has_openai=False)
    found = sampled_lengths(iter(rows(14)), 14, jobs, None, done={0, 1, 2, 3})
    assert found == [Length(5, 4), Length(7, 4), Length(9, 4), Length(11, 4), Length(13, 4)]


def test_rows_that_make_no_request_have_no_length() -> None:
    bad = [Row("a", ValueError("no")), Row("b", {"prompt": 7}), Row("c", {"prompt": "text"})]
    jobs = Jobs(settings(), None, has_openai=False)
    assert sampled_lengths([*bad, *rows(1)], 4, jobs, None, done=()) == [Length(1, 4)]


@pytest.mark.usefixtures("_measured")
def test_with_room_for_the_tokens_that_are_needed_more_sequences_fit() -> None:
    long = choices_of(150 << 20, most=1024, context=512)
    paged = choices_of(150 << 20, most=1024, context=512, tokens_of=lambda rows: 512 + 64 * rows)
    assert len(paged) > len(long)
    assert [choice.cache_tokens for choice in paged] == [512 + 64 * one.rows for one in paged]
    assert all(one.slots >= other.slots for one, other in zip(paged, long, strict=False))
    assert {choice.cache_tokens for choice in long} == {None}


def test_reserved_bytes_fall_with_the_tokens() -> None:
    source = from_path_on_meta(MODEL, "auto", HubOptions())
    sizes: dict[str, Any] = {"context": 1024, "batch": 64}
    whole, paged = reserved_bytes(source, **sizes), reserved_bytes(source, **sizes, tokens=8192)
    assert paged < whole
    assert reserved_bytes(source, **sizes, tokens=8192 + 64) > paged


@pytest.mark.usefixtures("_measured")
def test_on_a_gpu_the_tokens_are_those_of_the_data_set_or_as_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("runtime.loading.target_device", lambda *_: torch.device("cuda"))
    chosen = sized(settings(context=512, memory="0.5"), 100, lambda: [Length(10, 50)] * 3)
    assert chosen.cache_tokens == chosen.rows * 65
    assert f"in a key/value cache of {chosen.cache_tokens:,} tokens" in capsys.readouterr().err
    asked = sized(settings(context=512, memory="0.5", cache_tokens=4000), 100)
    assert asked.cache_tokens == 4000


# ---------------------------------------------------------------------- pages in host memory


def spilling(most: int = 1024, host: int = 1 << 40, **options: Any) -> list[RowChoice]:
    """Choices within a size that has room for a few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choices, "available_bytes", lambda: host)
        return choices_of(95 << 20, most, 512, tokens_of=lambda rows: 512 + 64 * rows, **options)


@pytest.mark.usefixtures("_measured")
def test_where_the_gpus_memory_ends_host_memory_holds_the_rest() -> None:
    near, far = spilling(spill_tokens=0), spilling(spill_tokens=None)
    assert far[: len(near)] == near
    assert {choice.spill_tokens for choice in near} == {0}
    others = far[len(near) :]
    assert others
    held = near[-1].cache_tokens or 0
    assert {choice.cache_tokens for choice in others} == {held}
    assert all(one.spill_tokens == 512 + 64 * one.rows - held for one in others)
    assert spilling(spill_tokens=None, host=0) == near, "nothing is free beside the experts"


@pytest.mark.usefixtures("_measured")
def test_spilled_bytes_cross_the_link_beside_the_experts() -> None:
    source = from_path_on_meta(MODEL, "auto", HubOptions())
    budget = device_budget(source, 95 << 20, context=512, batch=64, tokens=1024)
    found = [
        choices.choice_of(source, budget, StorageSize(64, 512, 1024, spilled), 1e6, 1e7)[0]
        for spilled in (0, 640)
    ]
    added = found[1].link_s - found[0].link_s
    assert added == pytest.approx(page_bytes(source.model, 640) / 1e6)
    assert found[0].slots == found[1].slots and found[0].device_s == found[1].device_s


@given(st.floats(0, 100), st.floats(0.1, 100), st.floats(0.1, 10), st.integers(1, 8))
def test_spilling_pays_where_more_experts_cross_than_the_gpu_holds_keys_and_values(
    missing: float, held: float, each: float, more: int
) -> None:
    """Bytes: of the experts without a slot, of the keys and values on the GPU, of a sequence's."""
    rows = held / each
    near = RowChoice(1, 1, missing, 0.0)._replace(rows=rows)  # type: ignore[arg-type]
    far = RowChoice(1, 1, missing + more * each, 0.0)._replace(rows=rows + more)  # type: ignore[arg-type]
    if missing > 1.001 * held:
        assert far.tokens_per_s > near.tokens_per_s
    elif 0 < missing < 0.999 * held:
        assert far.tokens_per_s < near.tokens_per_s


@pytest.mark.usefixtures("_measured")
def test_a_batch_is_told_what_lies_in_host_memory_and_loads_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("runtime.loading.target_device", lambda *_: torch.device("cuda"))
    best = RowChoice(256, 5, 1.0, 0.1, 4096, 2048)
    asked: dict[str, Any] = {}

    def only(*_: Any, **options: Any) -> list[RowChoice]:
        asked.update(options)
        return [best]

    monkeypatch.setattr(choices, "row_choices", only)
    chosen = sized(settings(context=512), 100, lambda: [Length(10, 50)] * 3)
    assert (chosen.batch, chosen.cache_tokens, chosen.spill_tokens) == (256, 4096, 2048)
    assert "of 4,096 tokens, 2,048 more in host memory, 5 experts" in capsys.readouterr().err
    assert asked["spill_tokens"] is None
    sized(settings(context=512, cache_tokens=4000, spill_tokens=99), 100)
    assert asked["spill_tokens"] == 99


def test_spill_tokens_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="spill_tokens=99 without cache_tokens="):
        settings(spill_tokens=99)
