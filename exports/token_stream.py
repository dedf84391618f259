"""Stream of the token ids of a text folder, with a tokenizer trained on it.

A text folder has `<domain>.txt` to train on and the held-out `val/<domain>.txt`. A line
`<|endoftext|>` separates two documents.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_CHARS = 3_000_000
"""Characters of each domain that the tokenizer is trained on."""

TokenIds = npt.NDArray[np.uint16]


@dataclass(frozen=True, kw_only=True)
class TokenStream:
    """Tokenised documents of all domains in random order, each ended by `<|endoftext|>`."""

    train_N: TokenIds
    val: dict[str, TokenIds]
    """Held-out documents of each domain."""
    tokenizer: Tokenizer
    counts: dict[str, Any]
    """Documents, tokens and left-out documents of each domain."""

    def save(self, directory: Path) -> None:
        """Write `tokens.safetensors` and `tokenizer.json`."""
        directory.mkdir(parents=True, exist_ok=True)
        arrays = {"train": self.train_N, **{f"val.{name}": ids for name, ids in self.val.items()}}
        save_file(arrays, directory / "tokens.safetensors", {"counts": json.dumps(self.counts)})
        self.tokenizer.save(str(directory / "tokenizer.json"))

    @classmethod
    def load(cls, directory: Path) -> TokenStream:
        """Read the files of `save`."""
        with safe_open(directory / "tokens.safetensors", "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            counts = json.loads(file.metadata()["counts"])
        return cls(
            train_N=arrays.pop("train"),
            val={name.removeprefix("val."): ids for name, ids in arrays.items()},
            tokenizer=Tokenizer.from_file(str(directory / "tokenizer.json")),
            counts=counts,
        )


def tokenise_folder(
    text: Path,
    *,
    domains: list[str],
    exclude: list[Path],
    vocab_size: int,
    tokens_per_domain: int,
    seed: int,
) -> TokenStream:
    """Train a byte-level BPE tokenizer on `text` and tokenise it.

    Documents that also occur in `text/val` or in the folders `exclude` are never trained on.
    Raises ValueError if a domain has no training text or no held-out text.
    """
    generator = np.random.default_rng(seed)
    val = {name: read_documents(text / "val" / f"{name}.txt") for name in domains}
    unwanted = {document for folder in exclude for document in _folder_documents(folder)}
    unwanted.update(document for documents in val.values() for document in documents)
    train, counts = {}, {}
    for name in domains:
        documents = read_documents(text / f"{name}.txt")
        train[name] = [document for document in documents if document not in unwanted]
        generator.shuffle(train[name])
        counts[name] = {"left_out": len(documents) - len(train[name])}
    tokenizer = _train_tokenizer(train, vocab_size)
    stream = []
    for name in domains:
        pieces = list(_encode_up_to(tokenizer, train[name], tokens_per_domain))
        stream += pieces
        counts[name] |= {"documents": len(pieces), "tokens": sum(map(len, pieces))}
    order = generator.permutation(len(stream))
    return TokenStream(
        train_N=np.concatenate([stream[i] for i in order]),
        val={name: np.concatenate(list(_encode(tokenizer, val[name]))) for name in domains},
        tokenizer=tokenizer,
        counts=counts,
    )


def read_documents(path: Path) -> list[str]:
    """The documents of one text file. Raises ValueError if there are none."""
    if not path.is_file():
        raise ValueError(f"{path} not found: a text folder has DOMAIN.txt and val/DOMAIN.txt")
    parts = path.read_text(encoding="utf-8").split(f"\n{END_OF_TEXT}\n")
    documents = [part for part in parts if part.strip()]
    if not documents:
        raise ValueError(f"{path} has no text")
    return documents


def _folder_documents(folder: Path) -> Iterator[str]:
    paths = sorted(folder.glob("*.txt"))
    if not paths:
        raise ValueError(f"nothing to exclude in {folder}: it has no .txt files")
    for path in paths:
        yield from read_documents(path)


def _train_tokenizer(train: dict[str, list[str]], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_leading_text(train), trainer)
    return tokenizer


def _leading_text(train: dict[str, list[str]]) -> Iterator[str]:
    """The first documents of each domain, about TOKENIZER_CHARS characters of each."""
    for documents in train.values():
        taken = 0
        for document in documents:
            yield document
            taken += len(document)
            if taken >= TOKENIZER_CHARS:
                break


def _encode_up_to(tokenizer: Tokenizer, documents: list[str], limit: int) -> Iterator[TokenIds]:
    taken = 0
    for ids in _encode(tokenizer, documents):
        if taken >= limit:
            return
        taken += len(ids)
        yield ids


def _encode(tokenizer: Tokenizer, documents: list[str], batch: int = 256) -> Iterator[TokenIds]:
    end = tokenizer.token_to_id(END_OF_TEXT)
    for start in range(0, len(documents), batch):
        for encoding in tokenizer.encode_batch_fast(documents[start : start + batch]):
            yield np.array([*encoding.ids, end], dtype=np.uint16)
