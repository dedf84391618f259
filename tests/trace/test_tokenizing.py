"""trace.sources.tokenizing: long documents are cut before, with the tokens of the whole."""

from __future__ import annotations

import time
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.helpers.tiny import tiny_tokenizer
from trace.sources import Text, tokenize, tokenizing
from trace.sources.tokenizing import beginning

WORDS = "the quick brown fox  jumps\n\nover lazy dogs' 1234 ünïcode 漢字 don't aaaa abab    "
CORPUS = [WORDS * 3, "aaaaaaaa abababab", "the thethethe\tquick"] * 20
SPECIALS = ["<unk>", "<s>", "</s>"]
KINDS = ("bytes", "sentence pieces", "unigram", "word pieces", "words")


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A trained tokenizer of one algorithm, which puts a token before and after every text."""
    made: Any
    trainer: Any
    if kind == "bytes":
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
    elif kind == "sentence pieces":  # as Llama 2: no words, merges over the whole text
        made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS, max_token_length=12)
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=150, special_tokens=SPECIALS, unk_token="<unk>"
        )
    elif kind == "word pieces":
        made = Tokenizer(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=20))
        made.normalizer = normalizers.BertNormalizer()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIALS)
    else:
        made = Tokenizer(models.WordLevel(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=SPECIALS)
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


pieces = st.sampled_from(
    ["a", "ab", "b", " ", "  ", "\n", "\t", "the", " the", "quick", "é", "e\u0301", "漢", "1", "'s",
     "<s>", "zzzz", "aaaaaaaaa", ".", "\u200b", "😀"]
)  # fmt: skip
repeated = st.builds(lambda piece, times: piece * times, pieces, st.integers(1, 120))
documents = st.lists(pieces | repeated, max_size=60).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(text=documents, limit=st.integers(1, 40), special=st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_tokens_of_a_beginning_are_those_of_the_whole(
    kind: str, text: str, limit: int, special: bool
) -> None:
    """With a margin of 16 tokens, and a first guess of one character a token."""
    whole = tokenizer(kind)(text, add_special_tokens=special)["input_ids"]
    with (
        patch.object(tokenizing, "MARGIN", 16),
        patch.object(tokenizing, "CHARACTERS_A_TOKEN", 1),
        patch.object(tokenizing, "GROWTH", 2),
    ):
        found = beginning(tokenizer(kind), text, limit, add_special_tokens=special)
    assert found.ids == whole[:limit]
    cut = max(0, len(whole) - limit)
    assert found.num_cut == cut or (found.has_more and found.num_cut > 0)


@pytest.mark.parametrize("kind", ["bytes", "sentence pieces", "unigram", "word pieces", "words"])
def test_a_document_of_megabytes_is_not_read_to_its_end(kind: str) -> None:
    text, longest = WORDS * 20_000, 0
    original = PreTrainedTokenizerFast.__call__

    def measured(self: Any, text: str, **options: Any) -> Any:
        nonlocal longest
        longest = max(longest, len(text))
        return original(self, text, **options)

    with patch.object(PreTrainedTokenizerFast, "__call__", measured):
        found = beginning(tokenizer(kind), text, 64, add_special_tokens=True)
    assert longest < 20_000
    assert found.ids == tokenizer(kind)(text[:200_000])["input_ids"][:64]
    assert found.has_more


def test_a_line_of_megabytes_without_a_blank_takes_no_time() -> None:
    start = time.perf_counter()
    [prompt] = tokenize([Text("z" * 40_000_000, "long")], tiny_tokenizer(), max_tokens=100)
    assert time.perf_counter() - start < 2
    assert len(prompt.ids) == 100
    assert prompt.has_more


def test_a_document_that_fits_has_no_more() -> None:
    [prompt] = tokenize([Text("z" * 300, "a")], tiny_tokenizer(), max_tokens=250)
    assert (len(prompt.ids), prompt.num_cut, prompt.has_more) == (250, 50, False)
