"""The choice of how many sequences decode together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.batch.sequences import ON_CPU, sized, told
from runtime.cuda import row_choices as choices
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


def choices_of(memory: float | int, most: int, context: int = 64) -> list[RowChoice]:
    source = from_path_on_meta(MODEL, "auto", HubOptions())
    return list(choices.row_choices(source, memory, context=context, most=most, device=DEVICE))


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
