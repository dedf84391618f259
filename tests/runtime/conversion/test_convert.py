"""`prepare(..., encoding=)`: a smaller model that is never taken for the original."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import runtime
from runtime.plan import plan
from runtime.prepare import PrepareSettings, main, prepare
from runtime.sizing.memory_plan import describe
from runtime.weights.encodings.encoders.table import ENCODERS
from runtime.weights.prepared.checksums import verify
from runtime.weights.prepared.manifest import read_manifest
from tests.helpers.compatibility import logits
from tests.helpers.tiny import save_tiny

OTHER_NAMES = {"mxfp4": "mxfp4", "int4": "int4-group", "fp8": "fp8-block", "nvfp4": "nvfp4"}
TEXT = "Pack my box with five dozen liquor jugs. How quickly daft jumping zebras vex! " * 8


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A model whose experts' sizes divide."""
    return save_tiny(tmp_path / "hub", "olmoe", intermediate_size=32)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def converted(hub: Path, text: str) -> Path:
    return prepare(hub, hub.parent / "out", encoding="int4", text=[text], calibration=[text])


@pytest.mark.parametrize("name", ENCODERS)
def test_a_converted_model_runs_near_its_original_and_says_what_it_lost(
    name: str, hub: Path, text: str
) -> None:
    out = prepare(hub, hub.parent / "out", encoding=name, text=[text], calibration=[text])
    ours, theirs = runtime.load(out, memory=0.5), runtime.load(hub, memory=0.5)
    change = json.loads((out / "conversion.json").read_text())["quality"]["change"]
    line = f"lossy {OTHER_NAMES[name]}, perplexity {100 * change:+.2f} %"
    assert ours.expertflow.encoding == line
    assert ours.expertflow.report().startswith(f"{line}; reuse: 16 of 32")
    assert ours.expertflow.stats().as_dict()["loss"] == line
    assert line in describe(plan(out, 0.5), None)
    assert theirs.expertflow.encoding == "plain" and "lossy" not in theirs.expertflow.report()
    difference = (logits(ours) - logits(theirs)).abs().mean() / logits(theirs).abs().mean()
    assert 0 < difference < (0.1 if name == "fp8" else 0.5)
    assert ours.expertflow.topology == theirs.expertflow.topology  # so a predictor fits both


def test_a_converted_model_is_the_same_whatever_is_resident(converted: Path) -> None:
    few, all_fit = (runtime.load(converted, memory=share) for share in (0.1, 1.0))
    in_memory = runtime.load(converted, memory=0.25, host="memory")
    assert torch.equal(logits(few), logits(all_fit))
    assert torch.equal(logits(few), logits(in_memory))
    assert in_memory.expertflow.encoding == few.expertflow.encoding


def test_only_the_experts_differ_from_the_original(hub: Path, converted: Path) -> None:
    whole: Any = runtime.load(converted).expertflow.detach()
    theirs: Any = AutoModelForCausalLM.from_pretrained(hub)
    changed = {
        name
        for name, tensor in theirs.state_dict().items()
        if not torch.equal(tensor, whole.state_dict()[name])
    }
    assert {name.rpartition(".")[2] for name in changed} == {"gate_up_proj", "down_proj"}
    assert len(changed) == 8


@pytest.mark.parametrize("rounding", ["search", "feedback"])
def test_transposed_experts_with_biases_and_alternating_rows_are_converted(
    rounding: str, tmp_path: Path, text: str
) -> None:
    hub = save_tiny(tmp_path / "gpt", "gpt_oss", hidden_size=64, intermediate_size=32)
    texts: Any = {"text": [text], "calibration": [text]}
    out = prepare(hub, tmp_path / "out", encoding="fp8", rounding=rounding, **texts)
    ours: Any = runtime.load(out).expertflow.detach()
    theirs: Any = AutoModelForCausalLM.from_pretrained(hub)
    for name, parameter in theirs.model.layers[1].mlp.experts.named_parameters():
        converted = ours.model.layers[1].mlp.experts.get_parameter(name)
        if name.endswith("bias"):
            assert torch.equal(converted, parameter)
        else:
            error = (converted - parameter).abs().mean() / parameter.abs().mean()
            assert 0 < error < 0.04, name


def test_the_report_holds_the_measure_and_the_card_calls_the_model_lossy(
    hub: Path, text: str
) -> None:
    (hub / "README.md").write_text("# The best model\n")
    out = prepare(hub, hub.parent / "out", encoding="mxfp4", text=[text], calibration=[text])
    report = json.loads((out / "conversion.json").read_text())
    assert report["lossy"] is True and report["rounding"] == "feedback"
    assert report["bits"] == 4.25 and report["details"][0]["name"] == "mxfp4"
    assert report["text"] == report["calibration"] == ["text.txt"]
    quality = report["quality"]
    assert quality["tokens"] > 500 and quality["divergence"] > 0
    assert 0 < quality["agreement"] <= 1
    assert quality["change"] == quality["perplexity"] / quality["original_perplexity"] - 1
    card = (out / "README.md").read_text()
    assert card.startswith("# hub, lossy mxfp4\n") and "A LOSSY copy of hub" in card
    assert (out / "README.original.md").read_text() == "# The best model\n"


def test_the_shipped_sample_measures_a_small_model_that_nobody_gave_a_text(hub: Path) -> None:
    out = prepare(hub, hub.parent / "out", encoding="mxfp4", tokens=1024)
    report = json.loads((out / "conversion.json").read_text())
    assert report["calibration"][0] == "sample/code_c.txt, first half"
    assert report["text"][0] == "sample/code_c.txt, second half"
    assert report["quality"]["tokens"] == report["calibration_tokens"] - 2 == 1022


def test_without_a_tokenizer_nothing_is_measured_and_the_reports_say_so(
    hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in hub.glob("tokenizer*"):
        path.unlink()
    main(PrepareSettings(model=str(hub), out=str(hub.parent / "out"), encoding="mxfp4"))
    printed = capsys.readouterr().out
    assert "The loss was not measured" in printed and "it is not the original" in printed
    model = runtime.load(hub.parent / "out")
    assert model.expertflow.encoding == "lossy mxfp4, its loss was not measured"
    report = json.loads((hub.parent / "out" / "conversion.json").read_text())
    assert report["quality"] is None and report["rounding"] == "search"


def test_rounding_with_more_care_costs_less(hub: Path, text: str) -> None:
    losses = {}
    for rounding in ("nearest", "search", "weighted", "feedback"):
        out = hub.parent / rounding
        texts: Any = {"text": [text], "calibration": [text]}
        prepare(hub, out, encoding="int4", rounding=rounding, **texts)
        losses[rounding] = json.loads((out / "conversion.json").read_text())["quality"]
    divergence = {name: quality["divergence"] for name, quality in losses.items()}
    assert divergence["feedback"] < divergence["search"] < divergence["nearest"]
    assert divergence["weighted"] < divergence["nearest"]


def test_the_command_prints_the_loss(
    hub: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = hub.parent / "out"
    texts: Any = {"text": [text], "calibration": [text]}
    main(PrepareSettings(model=str(hub), out=str(out), encoding="fp8", **texts))
    printed = capsys.readouterr().out
    assert "KL divergence from the original" in printed
    assert "same greedy token as the original" in printed
    assert f"{out} is ready for runtime.load; it is not the original: lossy fp8-block" in printed


# ---------------------------------------------------------------------- named lossy


def test_a_model_without_its_report_still_says_that_it_is_lossy(converted: Path) -> None:
    (converted / "conversion.json").unlink()
    assert runtime.load(converted).expertflow.encoding == (
        "lossy int4-group, its loss was not measured"
    )


@pytest.mark.parametrize("content", ["", "{}", '{"encoding": "mxfp4", "quality": null}'])
def test_a_report_that_is_damaged_or_of_another_encoding_is_refused(
    content: str, converted: Path
) -> None:
    (converted / "conversion.json").write_text(content)
    with pytest.raises(ValueError, match=r"conversion\.json is not a report of this model's"):
        runtime.load(converted)


# ---------------------------------------------------------------------- damage


def test_a_damaged_code_is_found_by_its_checksum(converted: Path) -> None:
    assert verify(converted) == 32
    layer = read_manifest(converted).layers[1]
    with (converted / "experts.bin").open("r+b") as file:
        file.seek(layer.offset(3))
        file.write(b"\x7f\x7e")
    with pytest.raises(ValueError, match=f"expert 3 of {layer.name} is damaged"):
        verify(converted)


def _another_encoding(layer: dict[str, Any]) -> None:
    layer["codes"]["down_proj"]["encoding"]["name"] = "int3"


def _another_group(layer: dict[str, Any]) -> None:
    layer["codes"]["down_proj"]["encoding"]["columns"] = 16


def _without_scales(layer: dict[str, Any]) -> None:
    del layer["parameters"]["down_proj.scales"]


@pytest.mark.parametrize("change", [_another_encoding, _another_group, _without_scales])
def test_a_manifest_that_contradicts_itself_is_refused(
    change: Callable[[dict[str, Any]], None], converted: Path
) -> None:
    path = converted / "experts.json"
    manifest = json.loads(path.read_text())
    change(manifest["layers"][1])
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"experts\.json is not a manifest of experts"):
        runtime.load(converted)


def test_codes_of_another_shape_than_the_model_are_refused(converted: Path) -> None:
    path = converted / "experts.json"
    manifest = json.loads(path.read_text())
    for layer in manifest["layers"]:
        layer["codes"]["down_proj"]["shape"] = [16, 64]
        layer["parameters"]["down_proj.codes"][1] = [16, 32]
        layer["parameters"]["down_proj.scales"][1] = [16, 2]
    del manifest["checksum"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="of another model than its config"):
        runtime.load(converted)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        ("olmoe", {}, r"down_proj cannot be in int4: .*24"),
        ("switch_transformers", {}, r"experts of .* cannot be encoded: .*wi"),
    ],
)
def test_experts_that_the_encoding_cannot_take_are_refused_by_name(
    kind: str, sizes: dict[str, int], message: str, tmp_path: Path
) -> None:
    hub = save_tiny(tmp_path / "hub", kind, **sizes)
    with pytest.raises(ValueError, match=message):
        prepare(hub, tmp_path / "out", encoding="int4")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_refused_by_name(hub: Path, text: str) -> None:
    path = hub / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "layers.2.mlp.experts.5.down_proj" in name)
    tensors[name][3, 4] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.experts, expert 5: down_proj"):
        prepare(hub, hub.parent / "out", encoding="int4", rounding="search", text=[text])
    assert not (hub.parent / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "int3"}, "encoding='int3' is not one of"),
        ({"encoding": "int4", "rounding": "up"}, "rounding='up' is not one of"),
        ({"encoding": "int4", "group": 16}, "group=16"),
        ({"encoding": "int4", "tokens": 0}, "tokens=0"),
        ({"encoding": "int4", "text": ["nowhere.txt"]}, r"nowhere\.txt is no text file"),
        ({"group": 128}, "group: nothing without encoding="),
    ],
)
def test_options_that_fit_nothing_are_refused(
    options: dict[str, Any], message: str, hub: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(hub, hub.parent / "out", **options)
    assert not (hub.parent / "out").exists()


def test_options_of_a_conversion_are_refused_where_none_is_asked_for(hub: Path) -> None:
    with pytest.raises(ValueError, match="--rounding: nothing without --encoding"):
        main(PrepareSettings(model=str(hub), out=str(hub.parent / "out"), rounding="search"))


def test_a_converted_model_is_not_converted_again(converted: Path) -> None:
    with pytest.raises(ValueError, match="is a prepared model already"):
        prepare(converted, converted.parent / "again", encoding="mxfp4")
