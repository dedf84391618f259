"""The training from a dense model in memory, the text and chats that it reads, its figures."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from exports.corpus.domains import read_domains
from exports.smol.answers import QUESTIONS, answers
from exports.smol.chats import chat_prompts, questions, write_chats
from exports.smol.differences import unpack
from exports.smol.measuring import compared, losses, usage
from exports.smol.settings import SmolSettings
from exports.smol.text import (
    DomainTokens,
    encode,
    long_lines,
    mixed_batches,
    permissive,
    shared,
    windows,
)
from exports.smol.train import train

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROOT = __file__.rpartition("/tests/")[0]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(f"{ROOT}/exports/moe-8x32")
    tokenizer.chat_template = CHATML
    return tokenizer


def dense_model(vocab_size: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def domain(first: int, length: int = 6000) -> np.ndarray:
    """A text that counts upwards by one or two within 16 tokens of its own."""
    steps = np.random.default_rng(first).integers(1, 3, length)
    return (np.cumsum(steps) % 16 + first).astype(np.uint16)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    """A short training on three domains, with chats."""
    folder = tmp_path_factory.mktemp("smol")
    train_ = {f"domain{i}": domain(16 * i) for i in range(3)}
    text = DomainTokens(train_, {name: ids[:700] for name, ids in train_.items()})
    settings = SmolSettings(
        tokens=folder / "unused", out=folder / "out", seconds=60, steps=40, batch=10, context=32,
        num_experts=4, rank=2, chats=6, chat_tokens=12, chat_share=0.2, learning_rate=2e-2,
    )  # fmt: skip
    dense = dense_model(tokenizer.vocab_size)
    return train(settings, text, dense, tokenizer, "ab" * 32), settings, dense


def test_a_short_training_improves_every_domain_and_leaves_no_expert_behind(trained):
    record, settings, _ = trained
    assert record["held_out"]["better"] == ["domain0", "domain1", "domain2"]
    assert record["history"][-1]["entropy"] < record["history"][0]["entropy"] - 0.3
    assert record["routing"]["least_used"] > 0.2
    assert record == json.loads((settings.out / "training.json").read_text())


def test_a_training_writes_differences_of_its_shape_and_dense_model(trained):
    _, settings, _ = trained
    differences = unpack(settings.out / "differences.safetensors")
    assert differences.dense_sha256 == "ab" * 32
    assert (differences.experts.num_experts, differences.experts.rank) == (4, 2)
    assert differences.router_LEH.shape == (2, 4, 32)
    assert differences.pairs["down_in"].shape == (2, 8, 64)


def test_the_dense_model_is_not_trained(trained):
    _, _, dense = trained
    fresh = dense_model(dense.config.vocab_size).state_dict()
    assert all(torch.equal(weight, fresh[name]) for name, weight in dense.state_dict().items())


# ---------------------------------------------------------------------- text
def test_every_batch_has_windows_of_all_domains_in_turn():
    tokens = {"a": np.arange(100, dtype=np.uint16), "b": np.arange(200, 300, dtype=np.uint16)}
    batches = mixed_batches(tokens, batch=6, context=10, seed=0)
    for _ in range(5):
        windows_BT, domains_B = next(batches)
        assert windows_BT.shape == (6, 11) and sorted(domains_B) == [0, 0, 0, 1, 1, 1]
        assert ((windows_BT[:, 0] >= 200) == domains_B).all()
        assert (np.diff(windows_BT) == 1).all()


def test_a_domain_of_too_few_tokens_is_refused():
    with pytest.raises(ValueError, match="only 20 tokens"):
        next(mixed_batches({"a": np.arange(20, dtype=np.uint16)}, batch=1, context=10, seed=0))


def test_windows_overlap_by_the_token_that_is_predicted():
    assert windows(np.arange(8, dtype=np.uint16), 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]


def test_tokens_are_read_as_they_were_saved(tmp_path):
    text = DomainTokens({"a": domain(0)}, {"a": domain(1), "b.c": domain(2)})
    text.save(tmp_path / "tokens.safetensors")
    again = DomainTokens.load(tmp_path / "tokens.safetensors")
    assert again.held_out.keys() == {"a", "b.c"}
    np.testing.assert_array_equal(again.train["a"], text.train["a"])
    with pytest.raises(ValueError, match=r"exports\.smol\.text"):
        DomainTokens.load(tmp_path / "nothing")


def test_documents_are_cut_at_the_limit_and_end_with_the_end_of_text(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids = encode(tokenizer, ["First one.", "Second."], limit=1000)
    assert ids[-1] == end and (ids == end).sum() == 2
    assert len(encode(tokenizer, ["word " * 50] * 9, limit=70)) == 70


def test_a_document_with_held_out_lines_is_recognised(tmp_path):
    line = "this line is long enough to be told from any other by what it says"
    (tmp_path / "held.txt").write_text(f"short\n{line}\n")
    lines = long_lines([tmp_path / "held.txt"])
    assert lines == {line}
    assert shared(f"short\n  {line}", lines) > 0.9 and shared("short", lines) == 0


def test_nothing_is_trained_on_under_a_restrictive_licence():
    domains = {domain.name: domain for domain in permissive(read_domains().values())}
    licences = {source.licence for domain in domains.values() for source in domain.sources}
    assert not any("GPL" in licence or "non-commercial" in licence for licence in licences)
    assert "en_genres" not in domains and {"en_prose", "code_go", "ru"} <= domains.keys()


# ---------------------------------------------------------------------- chats and answers
def test_half_of_the_chats_begin_with_a_question_of_the_models_own(tokenizer):
    prompts = chat_prompts(tokenizer, 7, seed=0)
    texts = [tokenizer.decode(ids) for ids in prompts]
    assert len(texts) == 7
    assert sum(text.endswith("<|im_start|>assistant\n") for text in texts) == 4
    assert sum(text.endswith("<|im_start|>user\n") for text in texts) == 3


def test_chats_are_what_the_model_writes_after_each_prompt_up_to_the_end_of_the_turn():
    dense = dense_model()
    prompts = [[5, 6], [7, 8, 9, 10]]
    ids = write_chats(dense, prompts, end=63, new_tokens=9, seed=0).tolist()
    again = write_chats(dense, prompts, end=63, new_tokens=9, seed=0).tolist()
    first, second = [5, 6], [7, 8, 9, 10]
    starts = [i for i in range(len(ids)) if ids[i : i + 2] == first or ids[i : i + 4] == second]
    assert ids == again and 0 in starts and len(starts) >= 2 and len(ids) <= 6 + 18


def test_no_question_that_is_published_is_trained_on():
    assert not set(questions()) & set(QUESTIONS)


def test_answers_are_greedy_and_marked_where_they_were_cut(tokenizer, monkeypatch):
    monkeypatch.setattr("exports.smol.answers.MOST_TOKENS", 5)
    dense = dense_model(tokenizer.vocab_size)
    found = answers(dense, tokenizer, ["Hello?", "Hello?"])
    assert found[0] == found[1] and found[0].endswith("…")


# ---------------------------------------------------------------------- figures
def test_losses_of_an_untrained_model_are_those_of_a_guess():
    found = losses(dense_model(), {"a": domain(0, 400)}, context=32)
    assert found["a"] == pytest.approx(math.log(64), abs=0.15)


def test_figures_say_which_domains_became_better():
    figures = compared({"a": 1.0, "b": 2.0}, {"a": 1.1, "b": 1.9})
    assert figures["better"] == ["b"]
    assert figures["perplexity"]["a"]["mixture"] == pytest.approx(math.exp(1.1))


def test_usage_is_told_by_domain_and_every_domain_weighs_the_same():
    one = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    other = torch.tensor([[0.0, 0.0, 0.25, 0.75]])
    figures = usage({"a": one, "b": other})
    assert figures["least_used"] == pytest.approx(0.5)
    assert figures["entropy_by_domain"]["a"] == pytest.approx(0.5)
    assert figures["entropy"] > figures["entropy_by_domain"]["b"]


@pytest.mark.parametrize(
    "options",
    [{"top_k": 8}, {"rank": 0}, {"seconds": 0}, {"chat_share": 1.0}, {"chats": 0}],
)
def test_settings_that_cannot_be_trained_with_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match=f"--{next(iter(options))}"):
        SmolSettings(tokens=tmp_path, out=tmp_path, **options)
