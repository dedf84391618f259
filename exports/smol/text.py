"""Text for the upcycling: domains of packages with permissive licences, as token ids.

    python -m exports.smol.text --out runs/smol

Writes OUT/text (DOMAIN.txt and val/DOMAIN.txt, with manifest.json and SOURCES.md) and
OUT/tokens.safetensors. Training text that shares passages with held-out text is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from exports.corpus.domains import Domain, read_domains
from exports.corpus.folder import build_folder
from exports.corpus.packages import PackageCache
from exports.smol.dense import find_gguf, read_dense_tokenizer
from exports.token_stream import END_OF_TEXT, read_documents
from routing.cli import run

TokenIds = npt.NDArray[np.uint16]

RESTRICTED = ("GPL", "GFDL", "CC-BY-SA", "non-commercial")
"""Parts of the names of licences that smol-moe is not trained under."""
LONG_LINE = 40
"""Bytes from which on a line that two documents share counts."""
MOST_SHARED = 0.1
"""Share of a document's bytes that may stand in lines of held-out text too."""


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Build and tokenise the text that smol-moe is trained on."""

    out: Path
    """Folder for text/ and tokens.safetensors."""
    cache: Path | None = None
    """Folder of the unpacked packages. Default: OUT/packages."""
    extra: list[Path] = field(default_factory=list)
    """Files DOMAIN.txt to train on besides."""
    held_out: list[Path] = field(default_factory=list)
    """Folders of DOMAIN.txt that are never trained on, and measured in place of the built ones."""
    exclude: list[Path] = field(default_factory=list)
    """Folders of .txt files that are never trained on, and not measured either."""
    tokens_per_domain: int = 750_000
    """Most tokens of a domain to train on."""
    held_out_tokens: int = 32_769
    """Most tokens of a domain to measure."""
    seed: int = 0
    """Seed of the order of the documents."""


@dataclass(frozen=True)
class DomainTokens:
    """Token ids of every domain, each document followed by the end of text."""

    train: dict[str, TokenIds]
    held_out: dict[str, TokenIds]

    def save(self, path: Path) -> None:
        """Write one safetensors file, uint16."""
        parts = {"train": self.train, "held_out": self.held_out}
        arrays = {
            f"{part}.{name}": ids for part, all_ in parts.items() for name, ids in all_.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, path)

    @classmethod
    def load(cls, path: Path) -> DomainTokens:
        """Read the file of `save`. Raises ValueError where there is none."""
        if not path.is_file():
            raise ValueError(f"{path} not found: python -m exports.smol.text writes it")
        parts: dict[str, dict[str, TokenIds]] = {"train": {}, "held_out": {}}
        for key, ids in load_file(path).items():
            part, _, name = key.partition(".")
            parts[part][name] = ids
        return cls(**parts)


def main(settings: TextSettings) -> None:
    """Write the text and its tokens."""
    text = settings.out / "text"
    packages = PackageCache(settings.cache or settings.out / "packages")
    domains = permissive(read_domains().values())
    build_folder(text, domains, packages)
    files = {domain.name: [text / f"{domain.name}.txt"] for domain in domains}
    for path in settings.extra:
        files.setdefault(path.stem, []).append(path)
    built = [text / "val" / f"{domain.name}.txt" for domain in domains]
    given = [path for folder in settings.held_out for path in sorted(folder.glob("*.txt"))]
    held_out = {path.stem: path for path in given or built}
    unwanted = long_lines(
        [*held_out.values(), *(p for f in settings.exclude for p in f.glob("*.txt"))]
    )
    tokenizer = read_dense_tokenizer(find_gguf(packages.folder))
    generator = np.random.default_rng(settings.seed)
    train = {}
    for name, paths in files.items():
        documents = [document for path in paths for document in read_documents(path)]
        kept = [document for document in documents if shared(document, unwanted) <= MOST_SHARED]
        generator.shuffle(kept)
        train[name] = encode(tokenizer, kept, settings.tokens_per_domain)
        print(f"{name}: {len(train[name])} tokens, {len(kept)} of {len(documents)} documents")
    measured = {
        name: encode(tokenizer, read_documents(path), settings.held_out_tokens)
        for name, path in held_out.items()
    }
    DomainTokens(train, measured).save(settings.out / "tokens.safetensors")


def permissive(domains: Iterable[Domain]) -> list[Domain]:
    """The domains that models are trained on, without the sources under restrictive licences."""
    kept = []
    for domain in domains:
        sources = tuple(s for s in domain.sources if not any(w in s.licence for w in RESTRICTED))
        if domain.role == "model" and sources:
            kept.append(replace(domain, sources=sources))
    return kept


def long_lines(paths: Iterable[Path]) -> set[str]:
    """Lines of at least LONG_LINE bytes."""
    lines = (line.strip() for path in paths for line in path.read_text("utf-8").splitlines())
    return {line for line in lines if len(line.encode()) >= LONG_LINE}


def shared(document: str, lines: set[str]) -> float:
    """Share of the bytes of a document that stand in `lines`."""
    sizes = [(line, len(line.encode())) for line in map(str.strip, document.splitlines())]
    return sum(size for line, size in sizes if line in lines) / max(1, sum(s for _, s in sizes))


def encode(tokenizer: Any, documents: Sequence[str], limit: int) -> TokenIds:
    """Token ids of the first documents, `limit` at most; the end of text follows each."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    parts: list[TokenIds] = []
    taken = 0
    for document in documents:
        if taken >= limit:
            break
        ids = tokenizer(document, add_special_tokens=False, verbose=False).input_ids
        parts.append(np.array([*ids, end], dtype=np.uint16))
        taken += len(parts[-1])
    return np.concatenate(parts)[:limit]


def windows(ids_N: TokenIds, context: int) -> npt.NDArray[np.int64]:
    """Windows of `context` + 1 tokens that overlap by one, int64 [windows, context + 1]."""
    count = (len(ids_N) - 1) // context
    starts_W = np.arange(count) * context
    return ids_N[starts_W[:, None] + np.arange(context + 1)].astype(np.int64)


def mixed_batches(
    train: Mapping[str, TokenIds], batch: int, context: int, seed: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Batches of windows [batch, context + 1] and the indices of their domains [batch], for ever.

    The domains take turns, so that each has as many windows as the others.
    """
    generator = np.random.default_rng(seed)
    streams = [_shuffled(ids_N, context, generator) for ids_N in train.values()]
    order: list[int] = []
    while True:
        while len(order) < batch:
            order += generator.permutation(len(streams)).tolist()
        chosen, order = order[:batch], order[batch:]
        yield np.stack([next(streams[domain]) for domain in chosen]), np.array(chosen)


def _shuffled(
    ids_N: TokenIds, context: int, generator: np.random.Generator
) -> Iterator[npt.NDArray[np.int64]]:
    """All windows of a text in random order, again and again, cut at another offset each time."""
    if len(ids_N) <= 2 * context:
        raise ValueError(f"a domain has only {len(ids_N)} tokens to train on: give more text")
    while True:
        cut_WT = windows(ids_N[int(generator.integers(context)) :], context)
        yield from cut_WT[generator.permutation(len(cut_WT))]


if __name__ == "__main__":
    run(
        main,
        TextSettings,
        prog="python -m exports.smol.text",
        examples=["--out runs/smol", "--out runs/smol --exclude exports/sample"],
    )
