"""Foreign routing traces written as trace directories.

python -m trace.formats import FILE ... --format vllm --model DIR_OR_TOPOLOGY --out DIR
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from routing.cli import run
from trace.formats.settings import ImportSettings

if TYPE_CHECKING:
    from routing.shards import Document
    from routing.topology import Stack, Topology
    from trace.formats.document import ForeignDocument, Read


def import_trace(settings: ImportSettings) -> None:
    """Write the files as a trace. Raises ValueError, and then leaves no directory behind."""
    from routing.trace_format.extras import Extras
    from routing.writer import TraceWriter

    topology = read_topology(settings.model)
    documents = iter(list(_documents(settings, topology)))
    first = next(documents, None)
    if first is None:
        raise ValueError(f"{', '.join(map(str, settings.files))}: no document with any token")
    has_ids = first[1]
    writer = TraceWriter(
        settings.out,
        topology,
        provenance=settings.provenance(),
        extras=Extras(token_ids=has_ids),
    )
    if writer.num_documents or writer.complete:
        writer.release()
        raise ValueError(f"{settings.out} already holds a trace: name another --out")
    num_tokens = 0
    with writer:
        for document, _ in chain([first], documents):
            writer.add({"decoder": document})
            num_tokens += len(document.token_ids_T)
    print(f"imported {num_tokens:,} tokens of {writer.num_documents:,} documents: {settings.out}")
    if not has_ids:
        print(
            "it has no token ids: rules can be compared on it, but predictors refuse it; "
            "--token-ids FILE.npy gives it the ids"
        )


def _documents(settings: ImportSettings, topology: Topology) -> Iterator[tuple[Document, bool]]:
    """Each document, and whether its token ids are known. Raises ValueError where only some are."""
    from trace.formats.document import document_of

    stack, known = topology.stack(), None
    for path, found in _with_ids(_read_all(settings, stack), settings):
        has_ids = found.token_ids_T is not None
        if known is not None and known != has_ids:
            raise ValueError(
                f"{found.where}: token ids are {'known' if has_ids else 'missing'} here, but not "
                "so in the documents before: import them apart"
            )
        known = has_ids
        label = settings.label or path.stem
        document = document_of(found, stack, topology.vocab_size, label)
        if settings.label is not None:
            document = document._replace(label=settings.label)
        if settings.generated_only:
            document = _answer(document, found.num_prompt)
        if len(document.token_ids_T):
            yield document, has_ids


def _answer(document: Document, num_prompt: int) -> Document:
    return document._replace(
        token_ids_T=document.token_ids_T[num_prompt:],
        experts_TLK=document.experts_TLK[num_prompt:],
        phase_T=document.phase_T[num_prompt:],
    )


def _read_all(settings: ImportSettings, stack: Stack) -> Iterator[tuple[Path, ForeignDocument]]:
    read = reader_of(settings.format)
    for path in settings.files:
        if not path.exists():
            raise ValueError(f"{path}: there is no such file")
        yield from ((path, document) for document in read(path, stack, settings))


def reader_of(name: str) -> Read:
    """The reader of the format `name`."""
    from trace.formats import llama_cpp, megatron, npy, sglang, vllm

    readers: dict[str, Read] = {
        "vllm": vllm.read,
        "sglang": sglang.read,
        "megatron": megatron.read,
        "llama.cpp": llama_cpp.read,
        "npy": npy.read,
    }
    return readers[name]


def _with_ids(
    found: Iterable[tuple[Path, ForeignDocument]], settings: ImportSettings
) -> Iterator[tuple[Path, ForeignDocument]]:
    """The documents with the ids of --token-ids, if that is given. Raises ValueError."""
    if settings.token_ids is None:
        yield from found
        return
    from trace.formats.arrays import load_numpy

    found_ids = load_numpy(settings.token_ids, str(settings.token_ids))
    ids_N = found_ids.get("experts", np.zeros(0))  # the name of a .npy file's only array
    if ids_N.ndim != 1 or ids_N.dtype.kind not in "iu":
        raise ValueError(
            f"{settings.token_ids} is {ids_N.dtype} {list(ids_N.shape)}, not one row of token ids"
        )
    used = 0
    for path, document in found:
        span = slice(used, used + len(document.experts_TLK))
        used = span.stop
        if used <= len(ids_N):
            yield path, document._replace(token_ids_T=ids_N[span])
    if used != len(ids_N):
        raise ValueError(f"{settings.token_ids} has {len(ids_N)} ids for the {used} tokens traced")


def read_topology(source: str) -> Topology:
    """The topology of a model, out of a JSON file, or of a trace. Raises ValueError or OSError.

    Encoder-decoder models are refused: foreign formats know one stack.
    """
    topology = _topology(source)
    if len(topology.stacks) > 1:
        raise ValueError(f"{source} is an encoder-decoder model, which no foreign format describes")
    return topology


def _topology(source: str) -> Topology:
    from routing.topology import Topology
    from routing.trace_format.manifest import MANIFEST, read_manifest

    path = Path(source)
    if (path / MANIFEST).is_file():
        return Topology.from_json(read_manifest(path)["topology"])
    if path.is_file() and path.name != "config.json":
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON file with a routing topology ({error})") from error
        return Topology.from_json(data if isinstance(data, dict) else {"stacks": data})
    return _topology_of_model(source)


def _topology_of_model(source: str) -> Topology:
    import torch

    from routing.inspect_model import topology_of
    from routing.pretrained import model_class, read_config, read_tokenizer

    config = read_config(source)
    with torch.device("meta"):
        model = model_class(config)(config)
    topology = topology_of(model)
    try:
        return replace(topology, tokenizer=topology_of(model, read_tokenizer(source)).tokenizer)
    except (ValueError, OSError):
        return topology


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. The files come first, without `--files`."""
    run(
        import_trace,
        ImportSettings,
        argv,
        prog="python -m trace.formats import",
        positional=["files"],
        first=("format", "model", "out"),
        examples=[
            "answers.jsonl --format vllm --model DIR --out trace",
            "routes.npy --format npy --layout LNK --model topology.json --out trace",
            "run/ --format megatron --model DIR --token-ids ids.npy --out trace",
        ],
    )


if __name__ == "__main__":
    main()
