"""benchmarks.encodings: coded models without their weights, arms, rows and the whole program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.coded_models import (
    DRAWN,
    PLAIN,
    CodedStore,
    check_encoding,
    coded_bytes,
    coded_source,
)
from benchmarks.common.shapes import SCALE, empty_model, shape_named
from benchmarks.encodings import __main__ as encodings
from benchmarks.encodings import page
from benchmarks.encodings.arms import MEMORY, TRACE, CodedArm, encoding_arms, groups
from benchmarks.encodings.runner import EncodingRunner, expected_s
from benchmarks.encodings.settings import EncodingSettings
from benchmarks.encodings.subject import CodedSubject
from benchmarks.loading import coded
from benchmarks.loading.coded_checkpoint import write_coded
from routing.cli import run
from routing.layers import find_moe_layers
from runtime.plan import plan
from runtime.weights.encodings.coded import stored_specs

CPU = torch.device("cpu")
QUICK = EncodingSettings(
    shapes=["tiny-gpt-oss"], device="cpu", prompt=4, tokens=4, documents=1, check_steps=2
)
PUBLISHED = {"gpt-oss-20b": 20.9e9, "gpt-oss-120b": 116.8e9}
"""Parameters in all."""


def expert(store: Any, layer: int, expert: int) -> dict[str, torch.Tensor]:
    into = {n: torch.empty(s.shape, dtype=s.dtype) for n, s in store.specs(layer).items()}
    store.read(layer, expert, into)
    return into


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shapes_of_gpt_oss_have_the_published_sizes(name: str) -> None:
    model = empty_model(shape_named(name))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(PUBLISHED[name], rel=0.01)
    kinds = model.config.layer_types
    assert kinds[:2] == ["sliding_attention", "full_attention"]
    assert model.config.sliding_window == 128


@pytest.mark.parametrize("name", ["tiny", "tiny-gpt-oss"])
@pytest.mark.parametrize("encoding", [PLAIN, *DRAWN])
def test_experts_of_random_codes_decode_to_weights_of_the_usual_size(
    encoding: str, name: str
) -> None:
    store = coded_source(shape_named(name), encoding, CPU).store
    one, other = expert(store, 0, 1), expert(store, 1, 0)
    for key, weights in one.items():
        assert weights.isfinite().all()
        assert SCALE / 3 < weights.float().std() < SCALE * 3
        assert not torch.equal(weights, other[key])
    assert all(torch.equal(weights, one[key]) for key, weights in expert(store, 0, 1).items())


def test_experts_do_not_depend_on_the_order_in_which_they_are_read() -> None:
    shape = shape_named("tiny-gpt-oss")
    first, second = (coded_source(shape, "mxfp4", CPU).store for _ in range(2))
    before = expert(first, 0, 0)
    expert(second, 3, 5)
    assert all(torch.equal(weights, before[key]) for key, weights in expert(second, 0, 0).items())


def test_experts_in_codes_take_the_bytes_of_their_encoding() -> None:
    """gpt-oss-120b's experts take 61 GB, and none of them is made to say so."""
    assert coded_bytes("gpt-oss-120b", "mxfp4") == pytest.approx(60.9e9, rel=0.01)
    layers = find_moe_layers(empty_model(shape_named("gpt-oss-20b")))
    store = CodedStore(layers, layers, "mxfp4", 0)
    coding = store.coding(0)
    assert {name: matrix.shape for name, matrix in coding.items()} == {
        "gate_up_proj": (5760, 2880),
        "down_proj": (2880, 2880),
    }
    assert all(matrix.transposed for matrix in coding.values())
    stored = stored_specs(store.specs(0), coding)
    assert stored["gate_up_proj_bias"].dtype == torch.bfloat16


def test_an_unknown_encoding_is_refused() -> None:
    with pytest.raises(ValueError, match="encoding='q4' is not one of bf16, mxfp4"):
        check_encoding("q4")
    with pytest.raises(ValueError, match="encoding='int3' is not one of mxfp4, fp8"):
        write_coded(Path("nowhere"), "int3", 1e6)


def test_every_shape_has_arms_and_those_of_one_load_stand_together() -> None:
    settings = EncodingSettings(shapes=[name for name in MEMORY if name != "tiny"])
    arms = encoding_arms(settings, traced=set(), predicted=set())
    assert {arm.shape for arm in arms} == set(settings.shapes)
    assert len({arm.name for arm in arms}) == len(arms)
    compiled = [arm.compile for arm in arms]
    assert compiled == sorted(compiled), "what takes longest comes last"
    large = [group for group in groups(arms) if group[0].shape == "gpt-oss-120b"]
    assert [arm.routes for arm in large[0]] == ["0.45", "0.3", "0.7"]
    assert {arm.residency for arm in large[0]} == {"20GiB"}


def test_rows_of_equal_memory_have_one_budget_and_every_encoding() -> None:
    settings = EncodingSettings(shapes=["olmoe-7b"], memory="5GiB")
    arms = encoding_arms(settings, traced={"olmoe-7b"}, predicted={"olmoe-7b"})
    equal = [arm for arm in arms if arm.residency == "5GiB" and not arm.compile]
    assert {arm.encoding for arm in equal} == {"mxfp4", "int4", "int4-128", "fp8", "nvfp4", PLAIN}
    assert {(arm.policy, arm.routes) for arm in equal} == {("predicted", TRACE)}


def test_arms_are_chosen_by_name_encoding_and_device() -> None:
    every = encoding_arms(EncodingSettings(shapes=["olmoe-7b"]), set(), set())
    only = EncodingSettings(shapes=["olmoe-7b"], only=[every[3].name])
    assert encoding_arms(only, set(), set()) == [every[3]]
    coded = EncodingSettings(shapes=["olmoe-7b"], encodings=["fp8"], compile=False)
    assert {(a.encoding, a.compile) for a in encoding_arms(coded, set(), set())} == {("fp8", False)}
    on_cpu = EncodingSettings(shapes=["olmoe-7b"], device="cpu")
    assert not any(arm.compile or arm.prefetch for arm in encoding_arms(on_cpu, set(), set()))
    with pytest.raises(ValueError, match="no arm is left"):
        encoding_arms(EncodingSettings(only=["nothing"]), set(), set())


def test_an_arm_that_would_outlast_the_budget_is_skipped_and_says_so() -> None:
    subject = CodedSubject(CPU, trace=None, predictor=None, seed=0)
    settings = EncodingSettings(shapes=["tiny-gpt-oss"], device="cpu", budget_seconds=1.0)
    arms = encoding_arms(settings, set(), set())
    rows = EncodingRunner(settings, subject).run_all(arms, lambda rows: None)
    assert [row.arm for row in rows] == arms
    assert all(row.error is not None and row.error.startswith("skipped") for row in rows)


def test_compiling_and_large_models_are_expected_to_take_longer() -> None:
    def seconds(**options: Any) -> float:
        values = {"shape": "gpt-oss-20b", "encoding": "mxfp4", "routes": "0.45"} | options
        return expected_s([CodedArm(**values)])

    assert seconds(compile=True) > seconds() + 24
    assert seconds(encoding=PLAIN) > seconds()
    assert seconds(shape="gpt-oss-120b") > seconds() + 10


def test_a_failing_model_costs_its_own_rows_only() -> None:
    settings = EncodingSettings(
        shapes=["tiny-gpt-oss"], device="cpu", prompt=4, tokens=3, documents=1, memory="1MiB"
    )
    subject = CodedSubject(CPU, trace=None, predictor=None, seed=0)
    arms = encoding_arms(settings, set(), set())
    rows = EncodingRunner(settings, subject).run_all(arms, lambda rows: None)
    failed = [row for row in rows if row.error is not None]
    assert {row.arm.residency for row in failed} == {"1MiB"}
    assert all("give at least" in str(row.error) for row in failed)
    assert [row.arm for row in rows] == arms


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encodings") / "out.json"
    arguments = "--device cpu --prompt 4 --tokens 4 --documents 1 --check_steps 2"
    shapes = "--shapes tiny-gpt-oss --encodings mxfp4 --localities 0.45 0.7"
    run(encodings.main, EncodingSettings, [*arguments.split(), *shapes.split(), "--out", str(out)],
        prog="encodings")  # fmt: skip
    return out


def test_the_program_runs_and_logits_are_equal_at_all_residencies(results: Path) -> None:
    rows = json.loads(results.read_text())["rows"]
    assert [row["error"] for row in rows] == [None] * len(rows)
    assert len(rows) == 5
    compared = [row["logits"] for row in rows if row["logits"]]
    assert compared == [{"expertflow": "identical"}] * 3
    assert all(row["hit_rate"] <= 1 and row["tokens_per_s"] > 0 for row in rows)
    quarter = [row for row in rows if row["residency"] == "0.25"]
    assert all(row["extra"]["resident_share"] == 0.25 for row in quarter)
    assert quarter[0]["hit_rate"] < quarter[1]["hit_rate"], "more locality, more hits"


def test_the_page_shows_every_row_and_names_what_was_not_measured(results: Path) -> None:
    written = json.loads(results.read_text())
    text = page.page([written])
    assert text.count("| mxfp4 |") == len(written["rows"])
    assert "drawn, LRU hits 0.7" in text
    assert "llama.cpp" not in text
    for row in written["rows"]:
        row["shape"] = "olmoe-7b"
    written["rows"][0]["error"] = "skipped"
    assert "2026-11-28" in page.page([written])
    assert "## Not run" in page.page([written])


@pytest.mark.parametrize(("encoding", "shape"), [("mxfp4", "tiny-gpt-oss"), ("fp8", "tiny")])
def test_a_coded_checkpoint_is_loaded_and_planned_in_its_encoding(
    tmp_path: Path, encoding: str, shape: str
) -> None:
    size = write_coded(tmp_path / "model", encoding, 2e6, shape_named(shape))
    forecast = plan(tmp_path / "model", 0.5)
    assert forecast.source.encoding is not None
    assert forecast.source.encoding.startswith(encoding)
    assert size > forecast.total_stored_bytes > 1e6
    settings = coded.CodedLoadingSettings(encoding=encoding, device="cpu", cold=True)
    values = coded.measure(settings, tmp_path / "model")
    assert values["bytes"] == size
    assert values["load_s"] > 0
