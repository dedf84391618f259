"""PEFT: adapters put on before and after loading are exact; adapters of experts are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import runtime
from runtime import prepare
from tests.helpers.offloading import Predictor, check, offload
from tests.helpers.tiny import save_tiny, tiny_model

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
]

Adapt = Callable[[Any], Any]
IDS = torch.tensor([[2, 3, 4, 5, 6]])


def lora(targets: Any = ("q_proj", "v_proj"), **options: Any) -> Any:
    """Not the default weights, with which an adapter changes nothing."""
    settings = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | options
    modules = list(targets) if isinstance(targets, tuple) else targets
    return peft.LoraConfig(target_modules=modules, **settings)


def adapted(config: Any, **options: Any) -> Adapt:
    return lambda model: peft.get_peft_model(model, config, **options)


def prompt(kind: str, **options: Any) -> Adapt:
    return adapted(getattr(peft, kind)(num_virtual_tokens=3, task_type="CAUSAL_LM", **options))


def mixin(model: Any) -> Any:
    """transformers' own way to put an adapter on."""
    model.add_adapter(lora())
    return model


def switched(model: Any) -> Any:
    model = adapted(lora())(model)
    model.add_adapter("other", lora(("k_proj",), r=2))
    model.set_adapter("other")
    return model


def merged_in_place(model: Any) -> Any:
    model = adapted(lora())(model)
    model.merge_adapter()
    return model


EXACT: dict[str, Adapt] = {
    "attention": adapted(lora()),
    "attention, no task": adapted(lora(task_type=None)),
    "embeddings": adapted(lora(("embed_tokens",))),
    "the head": adapted(lora(("lm_head",))),
    "the router": adapted(lora((), target_parameters=["gate.weight"])),
    "a router saved whole": adapted(lora(modules_to_save=["gate"])),
    "a head saved whole": adapted(lora(modules_to_save=["lm_head"])),
    "some tokens": adapted(lora(trainable_token_indices=[3, 4])),
    "DoRA": adapted(lora(use_dora=True)),
    "IA3": adapted(
        peft.IA3Config(
            target_modules=["k_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False
        )
    ),
    "norms": adapted(peft.LNTuningConfig(target_modules=["norm"])),
    "a soft prompt": prompt("PromptTuningConfig"),
    "a prefix": prompt("PrefixTuningConfig"),
    "an encoded prompt": prompt("PromptEncoderConfig", encoder_hidden_size=16),
    "mixed": adapted(lora(task_type=None), mixed=True),
    "transformers' adapter": mixin,
    "the second of two": switched,
    "merged in place": merged_in_place,
    "merged": lambda model: adapted(lora())(model).merge_and_unload(),
    "unloaded": lambda model: adapted(lora())(model).unload(),
}


def with_seed(adapt: Adapt, model: Any) -> Any:
    torch.manual_seed(3)
    return adapt(model)


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    values: Tensor = model(input_ids=IDS).logits
    return values


def generate(model: Any) -> Tensor:
    tokens: Tensor = model.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False,
        eos_token_id=None,
    )  # fmt: skip
    return tokens


@pytest.mark.parametrize("adapt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("order", ["adapter after loading", "adapter before loading"])
def test_an_adapted_model_says_what_stock_says_and_every_step_is_counted(
    order: str, adapt: Adapt
) -> None:
    stock = with_seed(adapt, tiny_model("olmoe"))
    if "after" in order:
        model = with_seed(adapt, offload(tiny_model("olmoe")))
    else:
        given = with_seed(adapt, tiny_model("olmoe"))
        model = offload(given)
        assert model is given
    torch.testing.assert_close(logits(model), logits(stock), rtol=0, atol=1e-5)
    assert torch.equal(generate(model), generate(stock))
    stats = model.expertflow.stats()
    assert stats.steps == 7 and stats.hits + stats.misses > 0
    check(model)


def test_an_adapter_is_switched_off_on_and_merged_while_experts_are_offloaded() -> None:
    stock = with_seed(adapted(lora()), tiny_model("olmoe"))
    model = with_seed(adapted(lora()), offload(tiny_model("olmoe")))
    adapted_logits = logits(stock)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(tiny_model("olmoe")), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model), adapted_logits, rtol=0, atol=1e-5)
    assert not torch.equal(adapted_logits, logits(tiny_model("olmoe")))
    base = model.merge_and_unload()
    torch.testing.assert_close(logits(base), adapted_logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(base.expertflow.detach()), adapted_logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", ["after", "before"])
def test_the_predictor_runs_in_an_adapted_models_own_generate(
    order: str, tiny_predictor: Predictor
) -> None:
    adapt, options = adapted(lora()), {"predictor": tiny_predictor("olmoe")}
    model: Any = tiny_model("olmoe")
    if order == "after":
        model = adapt(offload(model, 0.25, "predicted", **options))
    else:
        model = offload(adapt(model), 0.25, "predicted", **options)
    generate(model)
    stats = model.expertflow.stats()
    assert stats.steps == 6 and stats.seconds["predict"] > 0
    assert "10 tokens in 6 steps" in stats.report()


REFUSED: dict[str, Adapt] = {
    "a matrix of experts": adapted(lora((), target_parameters=["experts.gate_up_proj"])),
    "attention and experts": adapted(lora(target_parameters=["experts.down_proj"])),
    "all linear layers, experts too": adapted(lora("all-linear")),
    "experts saved whole": adapted(lora(modules_to_save=["experts"])),
    "MoE blocks saved whole": adapted(lora(modules_to_save=["mlp"])),
}


@pytest.mark.parametrize("adapt", REFUSED.values(), ids=REFUSED)
def test_an_adapter_of_experts_is_refused(adapt: Adapt) -> None:
    model = offload(tiny_model("olmoe"))
    with pytest.raises(ValueError, match=r"offloaded|neither copied nor pickled"):
        adapt(model)
    with pytest.raises(ValueError, match=r"an adapter holds the experts .* merge_and_unload"):
        offload(adapt(tiny_model("olmoe")))


def test_an_adapter_of_experts_that_are_modules_is_refused() -> None:
    config = lora(("wi", "wo"), task_type="SEQ_2_SEQ_LM")
    with pytest.raises(ValueError, match="cannot be replaced while the experts are offloaded"):
        peft.get_peft_model(offload(tiny_model("switch_transformers")), config)
    with pytest.raises(ValueError, match="an adapter holds the experts"):
        offload(peft.get_peft_model(tiny_model("switch_transformers"), config))


def test_an_adapter_of_an_encoder_decoder_models_attention_is_exact() -> None:
    adapt = adapted(lora(("q", "v"), task_type="SEQ_2_SEQ_LM"))
    stock = with_seed(adapt, tiny_model("switch_transformers"))
    model = with_seed(adapt, offload(tiny_model("switch_transformers")))
    assert torch.equal(generate(model), generate(stock))
    assert model.expertflow.stats().steps > 0


# ---------------------------------------------------------------------- files


def save_adapter(path: Path, config: Any = None) -> Path:
    model = with_seed(adapted(config or lora()), tiny_model("olmoe"))
    model.save_pretrained(path)
    return path


def names(path: Path) -> set[str]:
    return {one.name for one in path.iterdir()} - {"README.md"}


@pytest.mark.parametrize("where", ["after", "before", "directory"])
def test_only_the_adapter_is_saved(where: str, tmp_path: Path) -> None:
    if where == "before":
        model = offload(with_seed(adapted(lora()), tiny_model("olmoe")))
    elif where == "after":
        model = with_seed(adapted(lora()), offload(tiny_model("olmoe")))
    else:
        model = with_seed(adapted(lora()), offload(save_tiny(tmp_path / "model", "olmoe")))
    model.save_pretrained(tmp_path / "ours")
    theirs = save_adapter(tmp_path / "theirs")
    assert names(tmp_path / "ours") == names(theirs)
    file = "adapter_model.safetensors"
    saved, expected = (load_file(path / file) for path in (tmp_path / "ours", theirs))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)


def test_an_adapter_is_loaded_onto_an_offloaded_model_in_peft_and_in_transformers(
    tmp_path: Path,
) -> None:
    path = save_adapter(tmp_path)
    stock = peft.PeftModel.from_pretrained(tiny_model("olmoe"), path)
    wrapped = peft.PeftModel.from_pretrained(offload(tiny_model("olmoe")), path)
    model = offload(tiny_model("olmoe"))
    model.load_adapter(str(path))
    for one in (wrapped, model):
        torch.testing.assert_close(logits(one), logits(stock), rtol=0, atol=1e-5)
        assert one.expertflow.stats().steps == 1
    model.save_pretrained(tmp_path / "again")
    assert "adapter_model.safetensors" in names(tmp_path / "again")
    assert "model.safetensors" not in names(tmp_path / "again")
    model.disable_adapters()
    torch.testing.assert_close(logits(model), logits(tiny_model("olmoe")), rtol=0, atol=1e-5)


def test_a_loaded_adapter_of_experts_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    """PEFT has put layers on by then, whose first weights (`init_lora_weights`) change nothing."""
    config = lora(target_parameters=["experts.down_proj"], init_lora_weights=True)
    path = save_adapter(tmp_path, config)
    for load in (
        lambda model: peft.PeftModel.from_pretrained(model, path),
        lambda model: model.load_adapter(str(path)),
    ):
        model = offload(tiny_model("olmoe"))
        with pytest.raises(ValueError, match="experts cannot be replaced while"):
            load(model)
        torch.testing.assert_close(logits(model), logits(tiny_model("olmoe")), rtol=0, atol=1e-5)


def beside(path: Path, config: Any = None) -> Path:
    """A model's directory with an adapter beside the weights."""
    save_tiny(path, "olmoe")
    for file in save_adapter(path.with_suffix(".adapter"), config).glob("adapter_*"):
        shutil.copy(file, path)
    return path


@pytest.mark.parametrize("prepared", [False, True])
def test_an_adapter_beside_the_weights_is_put_on_as_transformers_does(
    prepared: bool, tmp_path: Path
) -> None:
    path = beside(tmp_path / "model")
    stock = type(tiny_model("olmoe")).from_pretrained(path)  # type: ignore[attr-defined]
    assert not torch.equal(logits(stock), logits(tiny_model("olmoe")))
    if prepared:
        path = prepare.prepare(path, tmp_path / "prepared")
    model: Any = runtime.load(path, memory=0.25)
    torch.testing.assert_close(logits(model), logits(stock), rtol=0, atol=1e-5)
    assert model.active_adapters() == stock.active_adapters()
    assert model.name_or_path == str(path)


def test_an_adapter_of_experts_beside_the_weights_is_refused(tmp_path: Path) -> None:
    path = beside(tmp_path / "model", lora(target_parameters=["experts.down_proj"]))
    with pytest.raises(ValueError, match=r"the adapter in .*model cannot be put on .* Merge it"):
        runtime.load(path, memory=0.25)


def test_weights_that_are_missing_beside_an_adapter_are_named(tmp_path: Path) -> None:
    path = beside(tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.0.self_attn.k_proj.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no weights for .*k_proj"):
        runtime.load(path, memory=0.25)


def test_a_directory_of_an_adapter_alone_names_its_base(tmp_path: Path) -> None:
    path = save_adapter(tmp_path)
    config = json.loads((path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "somebody/base"
    (path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"runtime.load\('somebody/base'\).*load_adapter"):
        runtime.load(path)
