"""What an engine counts adds up, and can be looked at."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.offloading import Predictor, generate, logits, offload
from tests.helpers.tiny import tiny_model


def test_the_counts_add_up(tiny_predictor: Predictor) -> None:
    model = offload(tiny_model("olmoe"), 0.25, "predicted", predictor=tiny_predictor("olmoe"))
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
