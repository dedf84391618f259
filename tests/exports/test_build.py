"""`expertflow build`: recipes, stages, what is made once, and the mistakes that it names."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import get_args

import pytest

import exports.build
from exports.architecture import Architecture, new_model
from exports.build import (
    BuildSettings,
    Name,
    build_text,
    main,
    on_this_machine,
    train_settings,
)
from exports.corpus.domains import Domain, Source, read_domains
from exports.corpus.evaluation import first_pieces
from exports.corpus.packages import Package, Unpacked

PACKAGE = Package(registry="npm", name="tiny", version="1.0.0")
SOURCE = Source(package=PACKAGE, files=("*.txt",), licence="MIT")
TABLE = {
    "prose": Domain(name="prose", role="model", limit=1, sources=(SOURCE,)),
    "polish": Domain(name="polish", role="predictor", limit=1, sources=(SOURCE,)),
    "greek": Domain(name="greek", role="held_out", limit=1, sources=(SOURCE,)),
}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A table of one package on this machine, and a recipe that trains on it in a moment."""
    files = tmp_path / "files"
    files.mkdir()
    for i in range(40):
        words = " ".join(f"word{j * i % 17} stands here" for j in range(30))
        (files / f"{i}.txt").write_text(f"Document {i}. {words}.")
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "moe-16x64.yaml").write_text(
        "architecture: olmoe\nhidden_size: 56\nnum_layers: 2\nnum_heads: 7\nkv_heads: 7\n"
        "normalised: true\nnum_experts: 4\ntop_k: 2\nexpert_size: 8\nvocab_size: 300\n"
        "context: 32\nbatch: 2\nsteps: 2\nminutes: 10\ndomains: [prose]\n"
    )
    unpacked = Unpacked(folder=files, archive="tiny-1.0.0.tgz", sha256="0" * 64)
    monkeypatch.setattr("exports.corpus.packages.PackageCache.get", lambda self, _: unpacked)
    monkeypatch.setattr("exports.corpus.domains.read_domains", lambda: TABLE)
    monkeypatch.setattr(exports.build, "RECIPES", recipes)
    return BuildSettings(model="moe-16x64", out=tmp_path / "out")


def test_one_command_makes_text_tokens_and_a_model_that_loads(tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    main(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny.out / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny.out / "model")
    assert model.config.num_key_value_heads == 7 and model.config.norm_topk_prob
    assert model(**tokenizer("Document 1", return_tensors="pt")).logits.isfinite().all()
    manifest = json.loads((tiny.out / "text/manifest.json").read_text())
    assert manifest["prose"]["sources"][0]["licence"] == "MIT"


def test_a_build_stops_after_the_stage_that_was_asked_for(tiny):
    main(replace(tiny, until="text"))
    assert (tiny.out / "text/prose.txt").is_file() and not (tiny.out / "tokens").exists()
    main(replace(tiny, until="tokens"))
    assert (tiny.out / "tokens/tokenizer.json").is_file() and not (tiny.out / "model").exists()


def test_tokens_that_are_there_are_read_rather_than_made_again(tiny):
    main(replace(tiny, until="tokens"))
    assert train_settings(tiny).text is None
    assert train_settings(replace(tiny, out=tiny.out / "other")).text is not None


def test_tokens_of_an_earlier_build_are_complete_without_its_text(tiny):
    main(replace(tiny, until="tokens"))
    for path in (tiny.out / "text").glob("*.txt"):
        path.unlink()
    main(tiny)
    assert (tiny.out / "model/config.json").is_file()


def test_kinds_of_text_that_no_model_is_trained_on_lie_apart(tiny):
    build_text(replace(tiny, kinds=True), ["prose"])
    assert (tiny.out / "held_out/greek.txt").is_file()
    assert (tiny.out / "kinds/polish.txt").is_file()
    assert [path.name for path in (tiny.out / "text").glob("*.txt")] == ["prose.txt"]


def test_a_trace_of_the_evaluation_text_is_labelled_by_role_and_kind(tiny, tmp_path):
    from trace.settings import CollectSettings
    from trace.sources import read_texts

    build_text(replace(tiny, kinds=True), ["prose"])
    settings = CollectSettings(model="", dataset=[str(tiny.out / "evaluation")], out="")
    assert {text.label for text in read_texts(settings)} == {
        "model/prose",
        "predictor/polish",
        "held_out/greek",
    }


def test_evaluation_text_begins_with_the_first_piece_of_every_document():
    long = "\n\n".join(f"Paragraph {i}. " + "word " * 100 for i in range(60))
    first, second, *_ = first_pieces([long, "Short."])
    assert first.startswith("Paragraph 0") and second == "Short."


def test_another_training_time_can_be_asked_for(tiny):
    assert on_this_machine(train_settings(tiny), 0.5).minutes == 0.5


@pytest.mark.parametrize(("has_gpu", "minutes"), [(True, 10), (False, 480)])
def test_training_takes_the_recipes_minutes_on_a_gpu_and_hours_on_a_cpu(
    tiny, monkeypatch, capsys, has_gpu, minutes
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    training = on_this_machine(train_settings(tiny), None)
    assert (training.minutes, training.batch) == (minutes, 2)
    assert ("no GPU" in capsys.readouterr().out) is not has_gpu


# ---------------------------------------------------------------------- the recipes as shipped
@pytest.mark.parametrize("name", get_args(Name))
def test_a_recipe_trains_on_domains_of_the_table_that_nothing_holds_out(name, tmp_path):
    recipe = train_settings(BuildSettings(model=name, out=tmp_path))
    domains = read_domains()
    assert {domains[domain].role for domain in recipe.domains} == {"model"}


def test_the_recipe_of_moe_16x64_has_the_published_models_shape(tmp_path):
    recipe = train_settings(BuildSettings(model="moe-16x64", out=tmp_path))
    small = replace(recipe, num_layers=1)
    config = new_model(small, vocab_size=64).config
    assert (config.hidden_size, config.intermediate_size, config.num_experts) == (224, 32, 64)
    assert (config.num_experts_per_tok, config.num_key_value_heads) == (8, 7)
    assert (recipe.num_layers, recipe.vocab_size, recipe.context) == (16, 12288, 2048)
    assert config.norm_topk_prob and config.tie_word_embeddings


def config_of(name, folder):
    """The configuration that a recipe's model gets."""
    recipe = train_settings(BuildSettings(model=name, out=folder))
    return recipe, new_model(replace(recipe, num_layers=1), vocab_size=64).config


def test_the_recipe_of_shared_6x48_is_a_qwen2_moe_with_a_shared_expert(tmp_path):
    recipe, config = config_of("shared-6x48", tmp_path)
    assert (config.model_type, recipe.num_layers, config.num_experts) == ("qwen2_moe", 6, 48)
    assert (config.num_experts_per_tok, config.norm_topk_prob) == (6, False)
    assert (config.moe_intermediate_size, config.shared_expert_intermediate_size) == (32, 64)


def test_the_recipe_of_switch_10x16_weighs_one_expert_a_token_by_its_probability(tmp_path):
    recipe, config = config_of("switch-10x16", tmp_path)
    assert (config.model_type, recipe.num_layers, config.num_experts) == ("olmoe", 10, 16)
    assert (config.num_experts_per_tok, config.norm_topk_prob) == (1, False)
    assert (config.intermediate_size, config.num_key_value_heads) == (96, 2)


# ---------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("options", "message"),
    [({"scale": 0}, "--scale"), ({"scale": 2}, "--scale"), ({"minutes": 0}, "--minutes")],
)
def test_settings_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        BuildSettings(model="moe-16x64", out=tmp_path, **options)


def test_key_value_heads_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(ValueError, match="7 attention heads cannot share 3"):
        Architecture(architecture="olmoe", num_heads=7)


def test_a_switch_style_model_cannot_be_normalised():
    with pytest.raises(ValueError, match="not normalised"):
        Architecture(architecture="olmoe", top_k=1, normalised=True)


def test_the_help_says_what_it_needs_and_how_long_it_takes():
    command = [sys.executable, "-m", "expertflow", "build", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    words = " ".join(done.stdout.split())
    assert "minutes on a GPU" in words and "hours on a CPU" in words and "apt-get" in words
