"""Recording of a model's routing: which experts every token of a data set used.

python -m trace.collect --model DIR_OR_ID --dataset NAME_OR_FILES ... --out DIR

With `--workers N`, N models on the hosts of a Ray cluster share the batches (`trace.workers`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from routing.cli import run
from routing.process.cores import wait_passively
from trace.settings import CollectSettings

if TYPE_CHECKING:
    from routing.shards import Document
    from routing.writer import TraceWriter
    from trace.runner import BatchTracer, Runner
    from trace.sources import Prompt

LOG_SECONDS = 30.0
"""Time between two progress lines where stderr is not a terminal."""


class Traced(NamedTuple):
    """What one run added to a trace."""

    num_tokens: int
    num_cut_documents: int
    num_cut_tokens: int
    has_more: bool
    """Whether some of the cut text was never turned into tokens."""


def collect(settings: CollectSettings) -> None:
    """Trace the data sets of `settings` into its directory; an incomplete trace is resumed.

    Raises ValueError or OSError for a mistake of the user, and leaves an existing trace intact.
    """
    wait_passively()
    from routing.inspect_model import topology_of
    from routing.lookahead import GATE
    from routing.writer import TraceWriter
    from trace.models import build_runner, context, load_model_and_tokenizer
    from trace.sources import Tally, read_texts, tokenize

    tally = Tally()
    texts = read_texts(settings, tally)
    first = next(texts, None)  # shows a mistake in the data sets before the model is loaded
    if first is None:
        raise ValueError(f"{', '.join(settings.dataset)}: no document with any text")
    model, tokenizer = load_model_and_tokenizer(settings)
    runner = build_runner(model, settings)
    writer = TraceWriter(
        settings.out,
        topology_of(model, tokenizer),
        provenance=settings.provenance(),
        with_weights=settings.weights,
        lookahead={GATE: settings.lookahead} if settings.lookahead else None,
        extras=runner.extras,
        shard_tokens=settings.shard_tokens,
    )
    if writer.complete:
        print(f"{settings.out} is already complete: {writer.num_documents:,} documents")
        return
    prompts = tokenize(
        chain([first], texts),
        tokenizer,
        max_tokens=context(model, settings),
        chat_template=settings.chat_template,
        answer=settings.generate > 0,
        tally=tally,
    )
    start = time.perf_counter()
    with writer, _batch_tracer(settings, runner) as trace_batches:
        traced = _trace(islice(prompts, settings.max_documents), trace_batches, writer, settings)
    print(
        f"traced {traced.num_tokens:,} tokens in {time.perf_counter() - start:.1f} s; "
        f"{settings.out} has {writer.num_documents:,} documents"
    )
    if traced.num_cut_documents:
        print(
            f"documents cut to fit: {traced.num_cut_documents:,}, "
            f"by {'more than ' * traced.has_more}{traced.num_cut_tokens:,} tokens in all"
        )
    for line in tally.lines():
        print(line)


def _batch_tracer(settings: CollectSettings, runner: Runner) -> AbstractContextManager[BatchTracer]:
    if not settings.workers:
        return _local(runner, settings.seed)
    from trace.workers import ray_workers

    return ray_workers(settings)


@contextmanager
def _local(runner: Runner, seed: int) -> Iterator[BatchTracer]:
    """A tracer of batches in this process."""
    from trace.recorder import Recorder

    with Recorder(runner.model, lookahead=runner.lookahead, extras=runner.extras) as recorder:
        yield lambda batches: (
            (batch, runner.run(recorder, batch, seed=seed + batch[0].number)) for batch in batches
        )


def _trace(
    prompts: Iterable[Prompt],
    trace_batches: BatchTracer,
    writer: TraceWriter,
    settings: CollectSettings,
) -> Traced:
    """Write every document that is not yet in the trace."""
    from tqdm.auto import tqdm

    done = writer.num_documents
    if done:
        print(f"resuming {settings.out} after {done:,} documents")
        prompts = _unchanged(prompts, settings.out, done)
    num_tokens, cuts = 0, []
    pace = 0.1 if sys.stderr.isatty() else LOG_SECONDS
    with tqdm(
        unit=" tokens", unit_scale=True, desc="tracing", smoothing=0.05, leave=False,
        mininterval=pace, delay=pace,
    ) as progress:  # fmt: skip
        traced = trace_batches(_batches(prompts, done, settings))
        for prompt, documents in _in_order(traced, done):
            tokens = sum(len(document.token_ids_T) for document in documents.values())
            progress.update(tokens)
            num_tokens += tokens
            writer.add(documents)
            if prompt.num_cut:
                cuts.append(prompt)
    cut = sum(prompt.num_cut for prompt in cuts)
    return Traced(num_tokens, len(cuts), cut, any(prompt.has_more for prompt in cuts))


def _unchanged(prompts: Iterable[Prompt], out: str, done: int) -> Iterator[Prompt]:
    """The same prompts. Raises ValueError where the first `done` are not those of the trace.

    Data sets that changed since would otherwise leave documents out, or trace some twice.
    """
    from routing.shards import PROMPT, TraceReader
    from routing.topology import Topology
    from routing.trace_format.manifest import read_manifest

    topology = Topology.from_json(read_manifest(Path(out))["topology"])
    names = [stack.name for stack in topology.stacks]
    traced = TraceReader(out, "encoder" if "encoder" in names else names[0])
    for prompt in prompts:
        if prompt.number < done:
            document = traced.document(prompt.number)
            ids = document.token_ids_T[document.phase_T == PROMPT].tolist()
            if ids != prompt.ids or document.label != prompt.label:
                raise ValueError(
                    f"the data sets have changed since {out} was begun: its document "
                    f"{prompt.number} (label {document.label}) is another one now (label "
                    f"{prompt.label}); restore them, or trace into another directory"
                )
        yield prompt


def _batches(
    prompts: Iterable[Prompt], done: int, settings: CollectSettings
) -> Iterator[list[Prompt]]:
    """The batches that contain documents from number `done` on."""
    from trace.batches import WINDOW_BATCHES, batches, windows

    for window in windows(prompts, WINDOW_BATCHES * settings.batch_tokens):
        for batch in batches(window, settings.batch_tokens, answer=settings.generate):
            if max(prompt.number for prompt in batch) >= done:
                yield batch


def _in_order(
    traced: Iterable[tuple[list[Prompt], list[dict[str, Document]]]], done: int
) -> Iterator[tuple[Prompt, dict[str, Document]]]:
    """The documents from number `done` on, each as soon as all its predecessors are traced."""
    finished: dict[int, tuple[Prompt, dict[str, Document]]] = {}
    for batch, documents in traced:
        finished |= {p.number: (p, docs) for p, docs in zip(batch, documents, strict=True)}
        while done in finished:
            yield finished.pop(done)
            done += 1


if __name__ == "__main__":
    run(
        collect,
        CollectSettings,
        prog="python -m trace.collect",
        first=("model", "dataset", "out", "max_documents", "max_tokens", "generate", "device"),
        examples=[
            "--model DIR --dataset text.txt more/ --out trace",
            "--model allenai/OLMoE-1B-7B-0924 --dataset wikitext:wikitext-103-v1 --out trace "
            "--max-documents 1000 --device cuda",
            "--model DIR --dataset prompts.jsonl --out trace --generate 64",
        ],
    )
