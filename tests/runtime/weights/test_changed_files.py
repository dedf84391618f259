"""Checkpoints that change under a running model, and experts that cannot be read at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import runtime
from tests.helpers.architectures import architecture_model, is_known
from tests.helpers.compatibility import logits
from tests.helpers.tiny import save_tiny

WEIGHTS = "model.safetensors"


def rewrite(path: Path) -> None:
    """Write zeros into the middle of the file, in place."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(4096))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def touch(path: Path) -> None:
    os.utime(path, (0, 0))


@pytest.mark.parametrize("change", [rewrite, truncate, touch])
def test_a_file_changed_under_a_running_model_is_noticed_and_named(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    path = save_tiny(tmp_path, "olmoe") / WEIGHTS
    model: Any = runtime.load(tmp_path, memory=0.25)
    logits(model)
    change(path)
    with pytest.raises(ValueError, match=f"{path} was changed while the model was running"):
        logits(model)
    model.expertflow.check_integrity()


@pytest.mark.parametrize("change", [rewrite, truncate])
def test_resident_experts_need_their_file_no_more(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    path = save_tiny(tmp_path, "olmoe") / WEIGHTS
    model: Any = runtime.load(tmp_path, memory=1.0)
    expected = logits(model)
    change(path)
    assert torch.equal(logits(model), expected)


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(bytes(path.stat().st_size))
    other.rename(path)


@pytest.mark.parametrize("change", [replace, Path.unlink])
def test_a_file_that_is_replaced_or_deleted_is_still_read_as_it_was(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    path = save_tiny(tmp_path, "olmoe") / WEIGHTS
    model: Any = runtime.load(tmp_path, memory=0.25)
    expected = logits(model)
    change(path)
    assert torch.equal(logits(model), expected)
    assert model.expertflow.stats().misses > 32, "experts were read again"


@pytest.mark.parametrize("kind", ["olmoe", "inkling2_text", "nllb-moe"])
def test_experts_held_in_memory_need_their_file_no_more(kind: str, tmp_path: Path) -> None:
    if not is_known(kind):
        pytest.skip(f"this version of transformers has no {kind}")
    architecture_model(kind).save_pretrained(tmp_path)  # type: ignore[operator]
    expected = logits(runtime.load(tmp_path, memory=0.5))
    model: Any = runtime.load(tmp_path, memory=0.5, host="memory")
    truncate(tmp_path / WEIGHTS)
    assert torch.equal(logits(model), expected)
    torch.testing.assert_close(logits(model.expertflow.detach()), expected, rtol=0, atol=1e-5)


def test_an_unknown_host_tier_is_refused_naming_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="host='disk' is not one of file, memory"):
        runtime.load(save_tiny(tmp_path, "olmoe"), host="disk")


# ---------------------------------------------------------------------- other layouts on disk


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], Path]:
    """`saved(kind, to)`: a copy of a checkpoint of that architecture."""
    made: dict[str, Path] = {}

    def copy(kind: str, to: Path) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            architecture_model(kind).save_pretrained(made[kind])  # type: ignore[operator]
        return Path(shutil.copytree(made[kind], to / "model"))

    return copy


EXPERTS = {
    "nllb-moe": "model.decoder.layers.1.ffn.experts.expert_5.fc2.bias",
    "dbrx": "transformer.blocks.1.ffn.experts.mlp.v1",
    "jetmoe": "model.layers.1.mlp.output_linear.weight",
    "llama4_text": "model.layers.1.feed_forward.experts.down_proj",
    "qwen3_vl_moe": "model.language_model.layers.1.mlp.experts.gate_up_proj",
    "step3p7": "model.layers.1.moe.up_proj.weight",
}


def tensors_of(directory: Path, name: str) -> tuple[dict[str, Tensor], str]:
    """All tensors of a checkpoint, and the full key of the one that ends in `name`."""
    tensors = load_file(directory / WEIGHTS)
    (key,) = [key for key in tensors if key.endswith(name)]
    return tensors, key


@pytest.mark.parametrize("kind", EXPERTS)
def test_a_missing_tensor_of_the_experts_is_refused_by_name(
    kind: str, saved: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    directory = saved(kind, tmp_path)
    tensors, key = tensors_of(directory, EXPERTS[kind])
    del tensors[key]
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=str(directory)) as caught:
        runtime.load(directory)
    assert "experts" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("kind", EXPERTS)
def test_a_tensor_of_the_experts_of_another_shape_is_refused_by_name(
    kind: str, axis: int, saved: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    directory = saved(kind, tmp_path)
    tensors, key = tensors_of(directory, EXPERTS[kind])
    tensors[key] = tensors[key].narrow(axis, 0, tensors[key].shape[axis] - 1).clone()
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{directory}: {key}") as caught:
        runtime.load(directory)
    assert "shape" in str(caught.value)


def test_a_conversion_that_needs_all_experts_is_refused_with_the_remedy(
    saved: Callable[[str, Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.core_model_loading import Transpose

    def refuse(*_: Any, **__: Any) -> None:
        raise KeyError("all experts at once")

    directory = saved("qwen3_vl_moe", tmp_path)
    monkeypatch.setattr(Transpose, "convert", refuse)
    with pytest.raises(ValueError, match=r"gate_up_proj .* cannot be converted one expert at a ti"):
        runtime.load(directory)


def test_experts_stored_in_eight_bits_are_refused_by_name(tmp_path: Path) -> None:
    path = save_tiny(tmp_path, "olmoe") / WEIGHTS
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors = load_file(path)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} is stored as F8_E4M3: quantised"):
        runtime.load(tmp_path)


def test_a_quantised_directory_is_refused(tmp_path: Path) -> None:
    path = save_tiny(tmp_path, "olmoe") / "config.json"
    quantised = {"quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantised))
    with pytest.raises(ValueError, match=f"{tmp_path} is quantised .*fp8"):
        runtime.load(tmp_path)


def test_experts_shared_between_layers_are_refused_with_the_remedy(tmp_path: Path) -> None:
    architecture_model("diffusion_gemma").save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"shares the experts .* pass the model instead"):
        runtime.load(tmp_path)
