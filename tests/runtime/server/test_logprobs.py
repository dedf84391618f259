"""Log-probabilities over HTTP: prompts scored by echo, true bytes of tokens, finite numbers."""

from __future__ import annotations

import json
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from runtime.engine.engine import Engine
from runtime.server.protocol.completion import CompletionBody
from runtime.server.protocol.completion_answer import CompletionAnswer
from runtime.server.protocol.logprobs import LEAST, Offsets, of_chat, of_completion, of_prompt
from runtime.server.protocol.token_text import TokenText
from runtime.serving.request import Delta, Logprob, Result
from tests.helpers.tiny import tiny_tokenizer

TEXT = "hello 漢字 é"


def scores(engine: Engine, ids: list[int]) -> torch.Tensor:
    """Float [T - 1, V]: log-probabilities after each token of the prompt."""
    with torch.no_grad():
        logits: torch.Tensor = engine.model(input_ids=torch.tensor([ids])).logits[0]
    return logits[:-1].log_softmax(-1)


def pieces() -> PreTrainedTokenizerFast:
    """A tokenizer like Mixtral's: pieces with \u2581 for spaces, and bytes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {"\u2581": 259, "\u2581hi": 260, "hi": 261}
    made = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


# ---------------------------------------------------------------------- echo


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_with_logprobs_scores_prompts_as_the_harness_reads_them(
    client: openai.OpenAI, engine: Engine, as_ids: bool, max_tokens: int
) -> None:
    prompts = ["abc def", "hello"]
    ids = [tiny_tokenizer()(prompt).input_ids for prompt in prompts]
    said = client.completions.create(
        model="tiny",
        prompt=ids if as_ids else prompts,
        max_tokens=max_tokens,
        logprobs=1,
        echo=True,
        temperature=0,
        seed=1234,
    )
    for choice, text, prompt in zip(said.choices, prompts, ids, strict=True):
        found = choice.logprobs
        assert found is not None and found.tokens and found.token_logprobs
        assert found.top_logprobs is not None and found.text_offset is not None
        assert len(found.tokens) == len(prompt) + max_tokens
        assert found.to_dict()["token_logprobs"][0] is None  # type: ignore[index]
        assert found.to_dict()["top_logprobs"][0] is None  # type: ignore[index]
        expected_TV = scores(engine, prompt)
        expected = expected_TV.gather(-1, torch.tensor(prompt)[1:, None])[:, 0]
        np.testing.assert_allclose(
            found.token_logprobs[1 : len(prompt)], expected.numpy(), atol=1e-4
        )
        greedy = [
            max(top, key=top.__getitem__) == token
            for token, top in zip(found.tokens[1:], found.top_logprobs[1:], strict=True)
        ][: len(prompt) - 1]
        assert greedy == (expected_TV.argmax(-1) == torch.tensor(prompt)[1:]).tolist()
        assert choice.text.startswith(text)
        for token, offset in zip(found.tokens, found.text_offset, strict=True):
            assert choice.text[offset:].startswith(token) or token.startswith("bytes:")
    assert said.usage is not None and said.usage.prompt_tokens == sum(map(len, ids))
    assert said.usage.completion_tokens == max_tokens * len(prompts)


def test_echo_can_be_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 5, "echo": True}
    asked |= {"temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    assert whole.startswith("abc") and len(whole) > 3
    chunks = client.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole


def test_prompt_logprobs_are_those_of_vllm(address: str, engine: Engine) -> None:
    ids = tiny_tokenizer()("abc").input_ids
    asked = {"prompt": "abc", "max_tokens": 1, "prompt_logprobs": 2}
    choice = httpx.post(f"{address}/v1/completions", json=asked).json()["choices"][0]
    first, *others = choice["prompt_logprobs"]
    assert first is None and len(others) == len(ids) - 1
    for token_id, found, values_V in zip(ids[1:], others, scores(engine, ids), strict=True):
        assert found[str(token_id)]["logprob"] == pytest.approx(float(values_V[token_id]), abs=1e-4)
        assert {str(i) for i in values_V.topk(2).indices.tolist()} <= found.keys()
        best = str(int(values_V.argmax()))
        assert found[best]["rank"] == 1
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "prompt_logprobs": 0}
    told = httpx.post(f"{address}/v1/chat/completions", json=chat).json()
    assert told["prompt_logprobs"][0] is None and len(told["prompt_logprobs"]) > 3


def test_the_chosen_token_is_always_among_the_top(client: openai.OpenAI) -> None:
    said = client.completions.create(
        model="tiny", prompt="abc", max_tokens=20, temperature=2, seed=1, logprobs=1
    )
    found = said.choices[0].logprobs
    assert found is not None and found.top_logprobs and found.tokens
    tops = zip(found.tokens, found.top_logprobs, strict=True)
    assert all(token in top for token, top in tops)
    assert any(len(top) == 2 for top in found.top_logprobs)


def test_a_chat_has_logprobs_only_where_it_asks(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    asked |= {"max_tokens": 3}
    assert client.chat.completions.create(**asked).choices[0].logprobs is None
    plain = client.chat.completions.create(**asked, logprobs=True).choices[0].logprobs
    assert plain is not None and plain.content is not None
    assert all(token.top_logprobs == [] for token in plain.content)


# ---------------------------------------------------------------------- bytes and offsets


def test_bytes_of_byte_level_tokens_are_the_true_ones() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(TEXT).input_ids
    text = TokenText(tokenizer)
    assert b"".join(text.bytes_of(i) or b"" for i in ids).decode() == TEXT
    said = of_chat([Logprob(i, -1.0, ((i, -1.0),)) for i in ids], text)["content"]
    assert bytes(byte for token in said for byte in token["bytes"]).decode() == TEXT
    assert all(token["bytes"] == token["top_logprobs"][0]["bytes"] for token in said)
    assert any("\ufffd" in token["token"] for token in said)


def test_bytes_of_pieces_with_byte_fallback_are_the_true_ones() -> None:
    tokenizer = pieces()
    text = TokenText(tokenizer)
    ids = [260, *(3 + byte for byte in "é".encode()), 261]
    assert [text.bytes_of(i) for i in ids] == [b" hi", b"\xc3", b"\xa9", b"hi"]
    assert [text.named(i) for i in ids] == [" hi", "bytes:\\xc3", "bytes:\\xa9", "hi"]
    assert text.bytes_of(1) == b"<s>"


def test_a_completion_goes_on_from_its_prompt_with_the_space_that_decoding_strips() -> None:
    tokenizer, ids = pieces(), [260, 261, 260]
    assert tokenizer.decode(ids) == "hihi hi"
    logprobs = tuple(Logprob(i, -1.0, ()) for i in ids)
    result = Result(
        id="r", text="hihi hi", token_ids=tuple(ids), num_prompt=1, finish="length",
        logprobs=logprobs, prompt_logprobs=(None,),
    )  # fmt: skip
    texts = ("hi", "hi", " hi")
    deltas = [Delta("r", *said) for said in zip(ids, texts, logprobs, strict=True)]
    for echo, prompt in ((False, ""), (True, "hi")):
        body = CompletionBody.of({"prompt": "hi", "echo": echo, "logprobs": 0})

        def answer(body: CompletionBody = body) -> CompletionAnswer:
            return CompletionAnswer(body, "tiny", [[261]], TokenText(tokenizer), tokenizer)

        choice = answer().choice(0, result)
        assert choice["text"] == prompt + " hihi hi"
        offsets = choice["logprobs"]["text_offset"]
        assert offsets == ([0, 2, 5, 7] if echo else [0, 3, 5])
        streamed = answer()
        said = [event for delta in deltas for event in streamed.events(0, delta)]
        assert "".join(event["choices"][0]["text"] for event in said) == prompt + " hihi hi"


def test_offsets_count_characters_not_their_parts() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(TEXT).input_ids
    offsets = Offsets(tokenizer).take(ids)
    assert offsets == sorted(offsets)
    assert TEXT[offsets[-1]] == "é"
    text, read = TokenText(tokenizer), b""
    for token_id, offset in zip(ids, offsets, strict=True):
        if read.decode(errors="ignore").encode() == read:
            assert offset == len(read.decode())
        read += text.bytes_of(token_id) or b""


def test_numbers_are_finite() -> None:
    text = TokenText(tiny_tokenizer())
    one = Logprob(70, float("-inf"), ((71, 0.0), (70, float("-inf"))))
    told = [of_chat([one], text), of_completion([one], [70], [0], text), of_prompt([one], 1, text)]
    assert str(LEAST) in json.dumps(told, allow_nan=False)


def test_a_token_that_the_tokenizer_does_not_know_has_a_name() -> None:
    text = TokenText(tiny_tokenizer())
    assert text.bytes_of(100_000) == b""
    assert text.named(100_000) == "token_id:100000"
