"""Record the routing of a mixture-of-experts model.

python -m trace.collect --model DIR_OR_ID --dataset NAME_OR_FILES ... --out DIR

With `--workers N` the batches go to N models over the hosts of a Ray cluster (`trace.workers`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain, islice
from typing import TYPE_CHECKING

from routing.cli import run
from trace.settings import CollectSettings

if TYPE_CHECKING:
    from routing.shards import Document
    from routing.writer import TraceWriter
    from trace.runner import Run, Runner
    from trace.sources import Prompt


def collect(settings: CollectSettings) -> None:
    """Trace the data sets of `settings` into its directory, or what is left of them.

    Raises ValueError or OSError for every mistake of the user's, and leaves what is there intact.
    """
    from routing.inspect_model import topology_of
    from routing.lookahead import GATE
    from routing.writer import TraceWriter
    from trace.models import build_runner, context, load_model_and_tokenizer
    from trace.sources import read_texts, tokenize

    texts = read_texts(settings)
    first = next(texts, None)  # a mistake in the data sets shows before the model is loaded
    if first is None:
        raise ValueError(f"{', '.join(settings.dataset)}: no document with any text")
    model, tokenizer = load_model_and_tokenizer(settings)
    writer = TraceWriter(
        settings.out,
        topology_of(model, tokenizer),
        provenance=settings.provenance(),
        with_weights=settings.weights,
        lookahead={GATE: settings.lookahead} if settings.lookahead else None,
        shard_tokens=settings.shard_tokens,
    )
    if writer.complete:
        print(f"{settings.out} is already complete: {writer.num_documents:,} documents")
        return
    runner = build_runner(model, settings)
    prompts = tokenize(
        chain([first], texts),
        tokenizer,
        max_tokens=context(model, settings),
        chat_template=settings.chat_template,
        answer=settings.generate > 0,
    )
    with writer, _crew(settings, runner) as run:
        cuts = _trace(islice(prompts, settings.max_documents), run, writer, settings)
    print(f"traced {writer.num_documents:,} documents into {settings.out}")
    if cuts:
        print(f"{len(cuts):,} of them were cut to fit: {sum(cuts):,} tokens left out")


def _crew(settings: CollectSettings, runner: Runner) -> AbstractContextManager[Run]:
    if not settings.workers:
        return _alone(runner, settings.seed)
    from trace.workers import crew

    return crew(settings)


@contextmanager
def _alone(runner: Runner, seed: int) -> Iterator[Run]:
    """Runs batches in this process."""
    from trace.recorder import Recorder

    with Recorder(runner.model, lookahead=runner.lookahead) as recorder:
        yield lambda batches: (
            (batch, runner.run(recorder, batch, seed=seed + batch[0].number)) for batch in batches
        )


def _trace(
    prompts: Iterable[Prompt], run: Run, writer: TraceWriter, settings: CollectSettings
) -> list[int]:
    """Write every document that is not yet in the trace; how many tokens each cut one has lost."""
    from tqdm.auto import tqdm

    done = writer.num_documents
    if done:
        print(f"resuming {settings.out} after {done:,} documents")
    cuts = []
    with tqdm(unit="tok", unit_scale=True, desc="tracing", smoothing=0.05) as progress:
        for prompt, documents in _in_order(run(_batches(prompts, done, settings)), done):
            progress.update(sum(len(document.token_ids_T) for document in documents.values()))
            writer.add(documents)
            if prompt.num_cut:
                cuts.append(prompt.num_cut)
    return cuts


def _batches(
    prompts: Iterable[Prompt], done: int, settings: CollectSettings
) -> Iterator[list[Prompt]]:
    """The batches that hold documents from number `done` on."""
    from trace.batches import WINDOW_BATCHES, batches, windows

    for window in windows(prompts, WINDOW_BATCHES * settings.batch_tokens):
        for batch in batches(window, settings.batch_tokens, answer=settings.generate):
            if max(prompt.number for prompt in batch) >= done:
                yield batch


def _in_order(
    traced: Iterable[tuple[list[Prompt], list[dict[str, Document]]]], done: int
) -> Iterator[tuple[Prompt, dict[str, Document]]]:
    """Every document from number `done` on, each as soon as all before it are there."""
    finished: dict[int, tuple[Prompt, dict[str, Document]]] = {}
    for batch, documents in traced:
        finished |= {p.number: (p, docs) for p, docs in zip(batch, documents, strict=True)}
        while done in finished:
            yield finished.pop(done)
            done += 1


if __name__ == "__main__":
    run(collect, CollectSettings, prog="python -m trace.collect")
