"""Architectures that differ from the common ones; `make compatibility` tries every one there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from routing.layers import UNSUPPORTED, find_moe_layers
from tests.helpers.architectures import ARCHITECTURES, architecture_model, is_known
from tests.helpers.compatibility import check, logits

ODD = {
    "aria": "a wrapper of a text model; in transformers 5.17 its experts take logits",
    "dbrx": "all experts in one matrix",
    "deepseek_v4": "experts by token id in the first layers",
    "gpt_oss": "transposed, with biases",
    "inkling2_text": "interleaved on disk",
    "jetmoe": "experts called with counts",
    "llama4_text": "every expert called with every token",
    "longcat_flash": "experts without parameters",
    "nemotron_h": "no gate",
    "nllb-moe": "an encoder and a decoder of modules",
    "qwen3_vl_moe": "transposed on disk, a wrapper",
    "step3p7": "not of transformers' experts protocol",
    "zaya": "tokens that skip",
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_architecture_is_traced_exact_and_loaded_lazily(kind: str) -> None:
    if not is_known(kind):
        pytest.skip(f"this version of transformers has no {kind}")
    verdict = check(kind)
    assert verdict.is_exact
    assert (verdict.traced, verdict.parity, verdict.lazy) == ("yes", "yes", "yes")
    assert verdict.generates in ("yes", "-")


def test_two_kinds_of_experts_in_a_layer_are_exact_and_loaded_lazily() -> None:
    verdict = check("ernie4_5_vl_moe")
    assert verdict.is_exact and verdict.lazy == "yes" and verdict.generates == "yes"
    assert "vision_moe.experts saw no tokens" in verdict.traced


@torch.inference_mode()
def with_an_image(model: Any) -> torch.Tensor:
    """Logits of a text around an image of 64 x 64 pixels, which makes four tokens."""
    token_ids = torch.tensor([[5, 6, 251, 250, 250, 250, 250, 7, 8, 9]])
    pixels = torch.randn(16, 3 * 2 * 16 * 16, generator=torch.Generator().manual_seed(0))
    grid = torch.tensor([[1, 4, 4]])
    kinds = (token_ids == 250).int()
    return model(
        token_ids, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=kinds
    ).logits


def test_a_multimodal_wrapper_is_exact_with_an_image_too(tmp_path: Path) -> None:
    model: Any = architecture_model("qwen3_vl_moe")
    expected = with_an_image(model)
    model.save_pretrained(tmp_path)
    for size in (1.0, 0.25):
        offloaded: Any = runtime.load(tmp_path, memory=size)
        torch.testing.assert_close(with_an_image(offloaded), expected, rtol=0, atol=1e-5)
    with runtime.load(model, memory=0.25).expertflow as engine:
        torch.testing.assert_close(with_an_image(engine.model), expected, rtol=0, atol=1e-5)


def test_the_list_of_architectures_has_no_double_and_all_are_in_the_installed_version() -> None:
    assert len(set(ARCHITECTURES)) == len(ARCHITECTURES) >= 80
    assert sum(map(is_known, ARCHITECTURES)) >= 68


def test_experts_of_an_offloaded_model_are_those_of_the_slots() -> None:
    """The check has teeth: with other bytes in the slots the logits are others."""
    model: Any = architecture_model("jetmoe")
    expected = logits(model)
    runtime.load(model, memory=1.0)
    assert torch.equal(logits(model), expected)
    model.expertflow._backend.pools[0].arena.tensors["input_linear.weight"].zero_()
    assert not torch.allclose(logits(model), expected, atol=1e-2)


def test_transformers_still_runs_two_experts_of_nllb_whatever_its_router_says() -> None:
    """A defect that is repeated (`routing.containers.Nllb`). When this fails, it is mended."""
    model: Any = architecture_model("nllb-moe")
    ran = set()
    for layer in find_moe_layers(model):
        for number in range(layer.num_experts):
            layer.module.get_submodule(f"expert_{number}").register_forward_hook(
                lambda *_, number=number: ran.add(number)
            )
    logits(model)
    assert ran == {0, 1}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_experts_class_that_cannot_be_handled_is_refused_by_name(name: str) -> None:
    model = torch.nn.Sequential(type(name, (torch.nn.Module,), {})())
    with pytest.raises(ValueError, match=f"{name} .* is not supported: ") as caught:
        find_moe_layers(model)
    assert UNSUPPORTED[name] in str(caught.value)


def test_doge_is_refused_by_name() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("doge", is_moe=True))
    with pytest.raises(ValueError, match=r"DogeCDMoE .* is not supported"):
        find_moe_layers(model)
