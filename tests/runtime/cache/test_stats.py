"""What an engine counts adds up, and can be looked at."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import numpy as np
from torch import nn

from routing.layers import MoELayer
from runtime.cache.stats import Stats
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


def test_layers_with_long_names_are_told_apart_in_a_narrow_table() -> None:
    from rich.console import Console

    layers = [
        MoELayer(name=f"model.language_model.decoder.layers.{n}.feed_forward.experts.of.{n}",
                 module=nn.Identity(), num_experts=8, top_k=2, stack="decoder", kind="modules")
        for n in range(3)
    ]  # fmt: skip
    stats = Stats(layers=layers, num_slots=1, policy="lru")
    for counts_L in (stats.hits_L, stats.late_L, stats.misses_L):
        counts_L += 12_345
    with patch.object(Stats, "report", lambda _: "a run"):
        console = Console(width=60, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(stats.table())
    text = console.export_text()
    assert "…" not in text
    cells = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert "".join(cells) == "".join(layer.name for layer in layers)


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


def prefetching_stats() -> Stats:
    """Four layers of eight experts; layer 1 needed one that was half there."""
    model = offload(tiny_model("olmoe"))
    stats = model.expertflow.stats()
    stats.count_step(np.full(4, 3), np.array([1, 1, 1, 1]), 100, 1)
    stats.count_prefetches(
        np.array([0, 1, 0, 0]), begun=2, whole=0, bytes_sent=150, bytes_late=50, bytes_wasted=100
    )
    return stats


def test_a_late_expert_is_no_hit_in_the_headline_in_the_table_and_in_the_counts() -> None:
    stats = prefetching_stats()
    assert (stats.hits, stats.late, stats.misses) == (7, 1, 4)
    assert stats.hit_rate == 7 / 12
    cells = [list(column.cells) for column in stats.table().columns]
    assert cells[1:] == [
        ["2", "1", "2", "2"],
        ["0", "1", "0", "0"],
        ["1", "1", "1", "1"],
        ["66.7%", "33.3%", "66.7%", "66.7%"],
    ]
    counts = stats.as_dict()
    assert [layer["late"] for layer in counts["layers"]] == [0, 1, 0, 0]
    assert counts["hit_rate"] == 7 / 12


def test_nothing_is_a_number_before_the_first_step() -> None:
    stats = offload(tiny_model("olmoe")).expertflow.stats()
    assert stats.report() == "lru: 8 of 32 experts fit, 0 tokens in 0 steps"
    counts = stats.as_dict()
    assert counts["hit_rate"] is None and counts["recall"] is None
    assert json.loads(json.dumps(counts, allow_nan=False)) == counts


def test_the_counts_are_plain_data(tiny_predictor: Predictor) -> None:
    model = offload(tiny_model("olmoe"), 0.25, "predicted", predictor=tiny_predictor("olmoe"))
    generate(model, max_new_tokens=4, eos_token_id=None)
    counts = model.expertflow.stats().as_dict()
    assert json.loads(json.dumps(counts, allow_nan=False)) == counts
    assert counts["hits"] == sum(layer["hits"] for layer in counts["layers"])
    assert counts["policy"] == "predicted" and 0 <= counts["recall"] <= 1


def test_the_representations_are_one_short_line() -> None:
    engine = offload(tiny_model("olmoe")).expertflow
    assert repr(engine) == "<Engine of OlmoeForCausalLM: lru, 8 of 32 experts fit>"
    assert repr(engine.stats()).startswith("<Stats: lru: 8 of 32 experts fit, ")
