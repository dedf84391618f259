"""The embedded model and the sample text: small, licensed, offline, trained as the card says."""

import json
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import exports
from exports.routing_metrics import RouterTap, measure
from exports.token_stream import read_documents
from routing.inspect_model import tokenizer_fingerprint, topology_of
from routing.predictor_file.reader import open_predictor
from runtime.serving.chat import render_chat

HERE = Path(exports.__file__).parent
MODEL = HERE / "moe-8x32"
PREDICTOR = HERE / "predictors" / "moe-8x32.onnx"
SAMPLE = HERE / "sample"
CARD = json.loads((MODEL / "training.json").read_text(encoding="utf-8"))["held_out"]
DOMAINS = sorted(path.stem for path in SAMPLE.glob("*.txt"))


def folder_bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def table_row(card, label):
    row = next(line for line in card.splitlines() if line.startswith(f"| {label} |"))
    return [float(cell) for cell in re.findall(r"\d+\.\d+", row)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(
        MODEL, local_files_only=True, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def windows(tokenizer) -> dict[str, torch.Tensor]:
    """The first 1025 tokens of each domain of the sample, int64 [1, 1025]."""
    windows = {}
    for name in DOMAINS:
        ids: list[int] = []
        for document in read_documents(SAMPLE / f"{name}.txt"):
            ids += [*tokenizer(document).input_ids, tokenizer.eos_token_id]
        windows[name] = torch.tensor([ids[:1025]])
    return windows


@pytest.fixture(scope="module")
def figures(model, windows):
    return measure(model, RouterTap(model), windows, batch=1)


def test_the_embedded_model_takes_at_most_ten_megabytes():
    assert folder_bytes(MODEL) <= 10e6


def test_the_sample_takes_at_most_a_megabyte_and_every_file_has_its_sources():
    sources = (SAMPLE / "SOURCES.md").read_text(encoding="utf-8")
    text_files = [path for path in SAMPLE.iterdir() if path.name != "SOURCES.md"]
    assert sum(path.stat().st_size for path in text_files) <= 1e6
    assert len(text_files) == 10
    assert [path.name for path in text_files if f"| {path.name} |" not in sources] == []


def test_the_sources_table_counts_the_documents_that_are_there():
    sources = (SAMPLE / "SOURCES.md").read_text(encoding="utf-8")
    for name in DOMAINS:
        num_documents = len(list(read_documents(SAMPLE / f"{name}.txt")))
        assert f"| {name}.txt | {num_documents} |" in sources


def test_every_part_of_the_exports_is_in_the_index():
    index = (HERE / "README.md").read_text(encoding="utf-8")
    parts = [path.name for path in HERE.iterdir() if not path.name.startswith(("_", "README"))]
    assert [name for name in parts if name not in index] == []


def test_the_embedded_model_has_eight_layers_of_thirty_two_experts_top_four(model, tokenizer):
    topology = topology_of(model, tokenizer)
    stack = topology.stack()
    assert (stack.num_layers, stack.num_experts, stack.top_k) == (8, 32, 4)
    assert {(layer.num_experts, layer.top_k) for layer in stack.layers} == {(32, 4)}
    assert topology.vocab_size == len(tokenizer)


def test_the_embedded_model_generates_with_finite_logits(model, tokenizer):
    prompt = tokenizer("func main() {", return_tensors="pt")
    output = model.generate(
        **prompt,
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert len(output.logits) == 8
    assert all(torch.isfinite(logits_BV).all() for logits_BV in output.logits)


def test_the_tokenizer_gives_any_text_back(tokenizer):
    text = "x = 1234  # naïve\n\t春風\r\n🙂 "
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_embedded_model_chats_in_the_form_of_its_training_dialogues(tokenizer):
    messages = [
        {"role": "system", "content": "What is your favourite food?"},
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "How are you? "},
    ]
    shown = tokenizer.decode(render_chat(tokenizer, messages))
    assert shown == "Topic: What is your favourite food?\nA: Hi!\nB: Hello.\nA: How are you?\nB:"
    training_form = read_documents(SAMPLE / "dialogue.txt")[0].splitlines()[:3]
    assert [line.partition(":")[0] for line in training_form] == ["Topic", "A", "B"]
    with pytest.raises(ValueError, match="the roles are user and assistant"):
        render_chat(tokenizer, [{"role": "tool", "content": "x"}])


def test_the_predictor_is_of_the_tokenizer_that_has_the_template(model, tokenizer):
    predictor = open_predictor(PREDICTOR)
    topology_of(model, tokenizer).require_match(
        predictor.topology, ours="the model", theirs="its predictor"
    )
    assert predictor.topology.tokenizer == tokenizer_fingerprint(tokenizer)


def test_the_predictor_was_trained_on_no_kind_of_text_that_its_card_calls_held_out():
    kinds = json.loads((HERE.parent / "docs" / "results" / "kinds.json").read_text())["groups"]
    entries = {p.key: p.value for p in onnx.load(PREDICTOR).metadata_props}
    (trace,) = json.loads(entries["expertflow"])["provenance"]["traces"]
    trained_on = {Path(file).stem for file in trace["dataset"]}
    assert len(trained_on) == 35
    assert trained_on >= set(kinds["corpus"]["in the corpus"])
    assert not trained_on & set(kinds["corpus"]["held out"])


def test_the_size_on_the_card_is_that_of_the_predictor():
    card = (PREDICTOR.parent / "README.md").read_text(encoding="utf-8")
    assert f"{PREDICTOR.stat().st_size / 2**20:.1f} MiB" in card


def test_unseen_text_costs_what_the_card_says(figures):
    assert figures["mean_loss"] == pytest.approx(CARD["mean_loss"], abs=0.3)
    for name in DOMAINS:
        assert figures["loss"][name] == pytest.approx(CARD["loss"][name], abs=1.0), name


def test_shuffled_tokens_cost_far_more_than_text(model, windows, figures):
    generator = torch.Generator().manual_seed(0)
    shuffled = {
        name: window_BT[:, torch.randperm(window_BT.shape[1], generator=generator)]
        for name, window_BT in windows.items()
    }
    control = measure(model, RouterTap(model), shuffled, batch=1)
    assert control["mean_loss"] > figures["mean_loss"] + 4


def test_the_model_routes_as_the_card_says(figures):
    overlap_L = figures["previous_token_overlap"]
    assert overlap_L == pytest.approx(CARD["previous_token_overlap"], abs=0.05)
    assert min(figures["usage_entropy"]) > 0.95
    assert figures["top_k_cover_within_domain"] > 1.5 * figures["top_k_cover"]


def test_the_card_tells_the_figures_of_the_training_record():
    card = (MODEL / "README.md").read_text(encoding="utf-8").partition("## Held-out loss")[2]
    for name, loss in CARD["loss"].items():
        assert table_row(card, name)[0] == pytest.approx(loss, abs=0.0051)
    overlap_L = table_row(card, "experts shared with the previous token")
    assert overlap_L == pytest.approx(CARD["previous_token_overlap"], abs=0.00051)
    entropy_L = table_row(card, "entropy of usage over its maximum")
    assert entropy_L == pytest.approx(CARD["usage_entropy"], abs=0.00051)
