"""Quantised checkpoints: their experts stay in codes, and the weights are those of their twins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import runtime
from routing.pretrained import read_json
from runtime.plan import PlanSettings, main, plan
from runtime.prepare import prepare
from runtime.weights.arena import expert_bytes
from runtime.weights.encodings.coded import bits_a_weight, decode_expert
from runtime.weights.files import WatchedFile
from runtime.weights.memory_store import MemoryStore
from runtime.weights.quantised.parts import empty
from runtime.weights.source import from_path
from tests.helpers.architectures import architecture_model, is_known
from tests.helpers.offloading import Predictor, check, generate
from tests.helpers.quantised import LAYOUTS, LayoutWriter, save_source, write_quantised
from tests.helpers.tiny import save_tiny, tiny_model

SIZES: dict[str, dict[str, Any]] = {
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3},
    "qwen3_moe": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 3,
    },
}
"""Widths of several blocks, by architecture."""
CONFIGS = {
    "mxfp4": "Mxfp4Config",
    "fp8": "FineGrainedFP8Config",
    "mxfp8": "FineGrainedFP8Config",
    "compressed-tensors": "CompressedTensorsConfig",
}
"""transformers' configurations that dequantise, by method."""
MISREAD = ("fp8 stacked", "nvfp4 compressed-tensors")
"""Layouts that the library loads without some scales of the experts."""


def save(layout: str, directory: Path) -> Path:
    """The unquantised model that a layout is made of."""
    kind = LAYOUTS[layout].architecture
    return save_source(directory, kind, SIZES[kind])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> LayoutWriter:
    """A checkpoint in some layout, and the unquantised one with the same weights."""
    return LayoutWriter(tmp_path_factory.mktemp("layouts"), SIZES)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of an offloaded model, which is not offloaded any more."""
    return model.expertflow.detach().state_dict()  # type: ignore[union-attr,operator]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not same(found[name], tensor)] == []


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_coded_model_is_its_unquantised_twin(layout: str, written: LayoutWriter) -> None:
    coded, twin = written(layout)
    expected: Any = runtime.load(twin, memory=1.0)
    tokens = generate(expected)
    for host, memory in (("file", 0.25), ("memory", 1.0)):
        model: Any = runtime.load(coded, memory=memory, host=host)
        assert torch.equal(generate(model), tokens)
        check(model)
    assert f" {LAYOUTS[layout].encoding} experts fit" in model.expertflow.report()
    assert_equal(weights(model), weights(expected))


def test_experts_of_one_tensor_stay_in_codes(tmp_path: Path) -> None:
    model: Any = tiny_model("qwen3_moe", **SIZES["qwen3_moe"]).to(torch.bfloat16)
    model._weight_conversions = []  # saved as the model has it, not one tensor for each expert
    model.save_pretrained(tmp_path / "plain")
    coded, twin = tmp_path / "coded", tmp_path / "twin"
    write_quantised(tmp_path / "plain", coded, "fp8 stacked", twin=twin)
    found, expected = (runtime.load(path) for path in (coded, twin))
    assert "fp8-block experts" in found.expertflow.report()
    assert torch.equal(generate(found), generate(expected))
    assert_equal(weights(found), weights(expected))


def test_a_parameter_of_coded_and_plain_matrices_is_decoded_as_it_is_read(
    written: LayoutWriter, tmp_path: Path
) -> None:
    coded, twin = (shutil.copytree(p, tmp_path / p.name) for p in written("fp8 128x128"))
    plain = load_file(twin / "model.safetensors")

    def decode_up(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if "experts" in key and key.endswith("up_proj.weight")]:
            tensors[key] = plain[key]
            del tensors[f"{key}_scale_inv"]

    change(coded, decode_up)
    model, expected = runtime.load(coded), runtime.load(twin)
    assert set(model.expertflow._store.coding(0)) == {"down_proj"}
    assert torch.equal(generate(model), generate(expected))
    assert_equal(weights(model), weights(expected))


def test_codes_that_the_library_converts_are_decoded_first(tmp_path: Path) -> None:
    kind = "qwen3_vl_moe"
    model: Any = architecture_model(kind).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "plain")
    coded, twin = tmp_path / "coded", tmp_path / "twin"
    write_quantised(tmp_path / "plain", coded, "fp8 stacked", twin=twin)
    found: Any = runtime.load(coded)
    assert found.expertflow._store.coding(0) == {}
    assert_equal(weights(found), weights(runtime.load(twin)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weights_are_those_of_transformers_own_dequantisation(
    layout: str, written: LayoutWriter
) -> None:
    name = CONFIGS.get(LAYOUTS[layout].quantization["quant_method"])
    if name is None or layout in MISREAD:
        pytest.skip("transformers has no dequantisation of it")
    if name == "CompressedTensorsConfig":
        pytest.importorskip("compressed_tensors")
    coded, _ = written(layout)
    model: Any = runtime.load(coded, memory=0.25)
    assert_dequantised(weights(model), dequantised(coded, getattr(transformers, name)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["mxfp4 gpt-oss", "fp8 128x128"])
def test_a_number_format_is_that_of_the_decoded_weights(
    layout: str, dtype: torch.dtype, written: LayoutWriter
) -> None:
    coded, _ = written(layout)
    config = getattr(transformers, CONFIGS[LAYOUTS[layout].quantization["quant_method"]])
    for host in ("file", "memory"):
        model: Any = runtime.load(coded, memory=0.25, dtype=dtype, host=host)
        generate(model)
        assert_dequantised(weights(model), dequantised(coded, config, dtype=dtype))


def assert_dequantised(found: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """transformers leaves some weights in the number format of their file or of their scales."""
    assert_equal(found, {name: theirs[name].to(tensor.dtype) for name, tensor in found.items()})


def dequantised(directory: Path, config: Any, **options: Any) -> dict[str, Tensor]:
    """The weights that transformers makes of a quantised directory."""
    if not hasattr(config(dequantize=True), "dequantize"):
        pytest.skip("this version of transformers does not dequantise it")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, quantization_config=config(dequantize=True), **options
        )
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"transformers cannot dequantise it: {error}")
    return dict(model.state_dict())


def test_the_configuration_forgets_the_quantisation(written: LayoutWriter, tmp_path: Path) -> None:
    coded, twin = written("fp8 128x128")
    model: Any = runtime.load(coded)
    assert not hasattr(model.config, "quantization_config") and "fp8" not in repr(model.config)
    assert not getattr(model, "is_quantized", False)
    model.expertflow.detach().save_pretrained(tmp_path)
    reloaded: Any = runtime.load(tmp_path, memory=1.0)
    assert_equal(weights(reloaded), weights(runtime.load(twin)))


def test_a_quantisation_of_a_part_of_the_model_is_found_in_it(tmp_path: Path) -> None:
    kind = "qwen3_5_moe"
    if not is_known(kind):
        pytest.skip(f"this version of transformers has no {kind}")
    architecture_model(kind).to(torch.bfloat16).save_pretrained(tmp_path / "plain")  # type: ignore[operator]
    coded, twin = tmp_path / "coded", tmp_path / "twin"
    write_quantised(tmp_path / "plain", coded, "fp8 128x128", twin=twin)
    config = read_json(coded / "config.json")
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (coded / "config.json").write_text(json.dumps(config))
    model: Any = runtime.load(coded)
    assert "quantization_config" not in json.dumps(model.config.to_dict(), default=str)
    assert_equal(weights(model), weights(runtime.load(twin)))


def test_a_predictor_of_the_unquantised_model_is_one_of_the_coded_model(
    tiny_predictor: Predictor, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "plain", "qwen3_moe")
    coded = write_quantised(tmp_path / "plain", tmp_path / "coded", "fp8 24x24")
    model: Any = runtime.load(coded, tiny_predictor("qwen3_moe"))
    assert model.expertflow.topology == runtime.load(tmp_path / "plain").expertflow.topology
    generate(model)
    assert model.expertflow.report().startswith("predicted: ")


@pytest.mark.parametrize("layout", ["mxfp4 gpt-oss", "fp8 stacked", "fp8 128x128"])
def test_no_tensor_of_all_experts_is_read(
    layout: str, written: LayoutWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    coded, _ = written(layout)
    store = from_path(coded, None, "auto").store
    largest = max(spec.num_bytes for spec in store.stored_specs(0).values())
    read, sizes = WatchedFile.read, list[int]()

    def watched(self: WatchedFile, start: int, target: Tensor, dtype: torch.dtype) -> None:
        sizes.append(target.numel() * dtype.itemsize)
        read(self, start, target, dtype)

    monkeypatch.setattr(WatchedFile, "read", watched)
    store.read(0, 3, empty(store.specs(0)))
    MemoryStore(store)  # type: ignore[arg-type]
    assert max(sizes) <= largest


@pytest.mark.sampled(4)
@pytest.mark.parametrize("host", ["file", "memory"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_threads_read_experts_as_they_are_stored(
    layout: str, host: str, written: LayoutWriter
) -> None:
    coded, _ = written(layout)
    store = from_path(coded, None, "auto", in_memory=host == "memory").store
    specs = store.specs(0)

    def is_intact(expert: int) -> bool:
        stored, decoded, direct = map(empty, (store.stored_specs(0), specs, specs))
        store.read_stored(0, expert, stored)
        decode_expert(stored, store.coding(0), decoded)
        store.read(0, expert, direct)
        return all(same(decoded[name], direct[name]) for name in specs)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(is_intact, [*range(8)] * 4))


def test_in_memory_experts_take_the_bytes_that_they_have_in_the_files(
    written: LayoutWriter,
) -> None:
    coded, _ = written("mxfp4 gpt-oss")
    source = from_path(coded, None, "auto", in_memory=True)
    (group,) = source.groups
    assert bits_a_weight(group.coding) == 4.25
    arenas = source.store._experts  # type: ignore[attr-defined]
    assert {arena.slot_bytes for arena in arenas} == {source.stored_bytes(0)}
    assert source.stored_bytes(0) < expert_bytes(group.specs) / 3


@pytest.mark.parametrize("layout", ["mxfp4 gpt-oss", "fp8 128x128"])
def test_gradients_are_those_of_the_decoded_model(layout: str, written: LayoutWriter) -> None:
    found, expected = (gradients(runtime.load(path)) for path in written(layout))
    assert_equal(found, expected)
    assert found


def gradients(model: Any) -> dict[str, Tensor]:
    token_ids = torch.arange(2, 14)[None]
    model(token_ids, labels=token_ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", ["mxfp4 gpt-oss", "fp8 128x128", "mxfp4 deepseek"])
def test_a_prepared_copy_is_the_same_model(
    layout: str, written: LayoutWriter, tmp_path: Path
) -> None:
    coded, twin = written(layout)
    model: Any = runtime.load(prepare(coded, tmp_path / "prepared"), memory=0.25)
    expected: Any = runtime.load(twin)
    assert torch.equal(generate(model), generate(expected))
    assert_equal(weights(model), weights(expected))


def test_the_plan_names_the_encoding(
    written: LayoutWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    coded, twin = written("mxfp4 gpt-oss")
    found, expected = plan(coded, 0.5), plan(twin, 0.5)
    assert (found.slots, found.resident_bytes) == (expected.slots, expected.resident_bytes)
    assert found.stored_bytes[0] < found.expert_bytes[0] / 3
    assert found.bytes_per_token(0.5) < expected.bytes_per_token(0.5) / 3
    main(PlanSettings(model=str(coded)))
    said = capsys.readouterr().out
    assert "own mxfp4: 4.25 bits a weight, 3.76 x smaller than bfloat16" in said


# What is refused, and how


def change(path: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def configure(path: Path, **fields: Any) -> None:
    config = read_json(path / "config.json") | fields
    (path / "config.json").write_text(json.dumps(config))


KEY = "model.layers.2.mlp.experts.3.up_proj.weight"


def lose_scale(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{KEY}_scale_inv"]


def shorten_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{KEY}_scale_inv"] = torch.ones(3, 5)


def decode_one(tensors: dict[str, Tensor]) -> None:
    lose_scale(tensors)
    tensors[KEY] = tensors[KEY].to(torch.bfloat16)


def cut_one(tensors: dict[str, Tensor]) -> None:
    tensors[KEY] = tensors[KEY][:-16].clone()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lose_scale, f"{KEY} is stored in codes of F8_E4M3.*scale"),
        (shorten_scale, rf"{KEY}_scale_inv has the shape \[3, 5\]"),
        (decode_one, f"{KEY} is stored as plain numbers, but .* as FP8Block"),
        (cut_one, rf"{KEY} has shape \(240, 128\), but the model needs \(256, 128\)"),
    ],
)
def test_damaged_codes_are_refused_by_name(
    edit: Callable[[dict[str, Tensor]], None], said: str, written: LayoutWriter, tmp_path: Path
) -> None:
    coded = shutil.copytree(written("fp8 128x128")[0], tmp_path / "damaged")
    change(coded, edit)
    for use in (runtime.load, plan, lambda path: prepare(path, tmp_path / "out")):
        with pytest.raises(ValueError, match=said) as error:
            use(coded)
        assert str(coded) in str(error.value)


def test_codes_in_an_order_of_their_own_are_refused_at_once(
    written: LayoutWriter, tmp_path: Path
) -> None:
    coded = shutil.copytree(written("int4 gptq")[0], tmp_path / "damaged")
    name = "model.layers.0.mlp.experts.0.down_proj.g_idx"

    def shuffle(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].flip(0)

    change(coded, shuffle)
    with pytest.raises(ValueError, match=f"{coded}: {name}"):
        runtime.load(coded)


def test_a_truncated_file_is_refused_by_name(written: LayoutWriter, tmp_path: Path) -> None:
    coded = shutil.copytree(written("fp8 128x128")[0], tmp_path / "damaged")
    file = coded / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cut in .*fetch it again"):
        runtime.load(coded)


def test_codes_of_another_model_are_refused_by_name(written: LayoutWriter, tmp_path: Path) -> None:
    coded = shutil.copytree(written("fp8 128x128")[0], tmp_path / "other")
    configure(coded, moe_intermediate_size=64)
    with pytest.raises(
        ValueError, match=r"has shape \(256, 128\), but the model needs \(64, 128\)"
    ):
        runtime.load(coded)


@pytest.mark.parametrize("method", ["aqlm", "bitsandbytes", "hqq", None])
def test_other_quantisations_are_refused_by_name(method: str | None, tmp_path: Path) -> None:
    save_tiny(tmp_path, "olmoe")
    configure(tmp_path, quantization_config={"quant_method": method})
    with pytest.raises(ValueError, match=f"{tmp_path} is quantised.*{method or 'quant_method'}"):
        runtime.load(tmp_path)


def test_a_quantisation_without_codes_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "olmoe")
    configure(tmp_path, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match="none of its tensors is in codes"):
        runtime.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "described"),
    [("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}, "producer": {}})],
)
def test_a_quantisation_described_in_a_file_of_its_own_is_read(
    file: str, described: dict[str, Any], written: LayoutWriter, tmp_path: Path
) -> None:
    coded, twin = written("fp8 modelopt")
    shutil.copytree(coded, tmp_path, dirs_exist_ok=True)
    config = read_json(tmp_path / "config.json")
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / file).write_text(json.dumps(described))
    assert_equal(weights(runtime.load(tmp_path)), weights(runtime.load(twin)))


def test_a_plan_without_files_says_that_it_counts_decoded_experts(
    written: LayoutWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coded, twin = written("mxfp4 gpt-oss")
    shutil.copy(coded / "config.json", tmp_path)
    assert plan(tmp_path).expert_bytes == plan(twin).expert_bytes
    main(PlanSettings(model=str(tmp_path)))
    said = capsys.readouterr().out
    assert "The weights are quantised (mxfp4): the files, which are not here, say" in said


def test_on_a_gpu_a_budget_of_bytes_pays_for_codes(written: LayoutWriter) -> None:
    coded, twin = (plan(path, 0.5, device="cuda") for path in written("fp8 128x128"))
    assert coded.slots == twin.slots
    assert coded.slot_bytes < 0.6 * twin.slot_bytes
