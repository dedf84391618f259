"""Record the routing of a mixture-of-experts model.

python -m trace.collect --model DIR_OR_ID --dataset NAME_OR_FILES ... --out DIR
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routing.cli import run
from trace.settings import CollectSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from routing.shards import Document
    from routing.writer import TraceWriter
    from trace.runner import Runner
    from trace.sources import Prompt


def collect(settings: CollectSettings) -> None:
    """Trace the data sets of `settings` into its directory, or what is left of them.

    Raises ValueError or OSError for every mistake of the user's, and leaves what is there intact.
    """
    from routing.lookahead import GATE
    from routing.topology import topology_of
    from routing.writer import TraceWriter
    from trace.runner import Runner
    from trace.sources import read_texts, tokenize

    texts = read_texts(settings)
    first = next(texts, None)  # a mistake in the data sets shows before the model is loaded
    if first is None:
        raise ValueError(f"{', '.join(settings.dataset)}: no document with any text")
    model, tokenizer = load_model(settings)
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
    runner = Runner(
        model,
        generate=settings.generate,
        sample=settings.sample,
        weights=settings.weights,
        lookahead=settings.lookahead,
    )
    prompts = tokenize(
        chain([first], texts),
        tokenizer,
        max_tokens=context(model, settings),
        chat_template=settings.chat_template,
        answer=settings.generate > 0,
    )
    with writer:
        cuts = _trace(islice(prompts, settings.max_documents), runner, writer, settings)
    print(f"traced {writer.num_documents:,} documents into {settings.out}")
    if cuts:
        print(f"{len(cuts):,} of them were cut to fit: {sum(cuts):,} tokens left out")


def load_model(settings: CollectSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in eval mode on its device, and its tokenizer. Raises ValueError or OSError."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from routing.architecture import model_class

    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {settings.device}: torch sees no CUDA device here")
    if settings.model.startswith((".", "/", "~")) and not Path(settings.model).is_dir():
        raise ValueError(f"--model {settings.model}: there is no such directory")
    config = AutoConfig.from_pretrained(settings.model)
    model = model_class(config).from_pretrained(settings.model, dtype=settings.dtype)
    model.eval().to(settings.device)
    return model, AutoTokenizer.from_pretrained(settings.model)


def context(model: Any, settings: CollectSettings) -> int:
    """The most tokens of a document that fit the model beside the tokens to be generated."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or model.config.is_encoder_decoder:
        return settings.max_tokens
    if settings.generate >= positions:
        raise ValueError(
            f"--generate {settings.generate} leaves no room for a prompt in the model's context of "
            f"{positions} tokens"
        )
    return min(settings.max_tokens, positions - settings.generate)


def _trace(
    prompts: Iterable[Prompt], runner: Runner, writer: TraceWriter, settings: CollectSettings
) -> list[int]:
    """Write every document that is not yet in the trace; how many tokens each cut one has lost."""
    from tqdm.auto import tqdm

    done = writer.num_documents
    if done:
        print(f"resuming {settings.out} after {done:,} documents")
    cuts = []
    with tqdm(unit="tok", unit_scale=True, desc="tracing", smoothing=0.05) as progress:
        for prompt, documents in _traced(prompts, runner, done, settings, progress):
            writer.add(documents)
            if prompt.num_cut:
                cuts.append(prompt.num_cut)
    return cuts


def _traced(
    prompts: Iterable[Prompt], runner: Runner, done: int, settings: CollectSettings, progress: Any
) -> Iterator[tuple[Prompt, dict[str, Document]]]:
    """Every document from number `done` on, in order, with its trace."""
    from trace.batches import WINDOW_BATCHES, batches, windows
    from trace.recorder import Recorder

    with Recorder(runner.model, lookahead=runner.lookahead) as recorder:
        for window in windows(prompts, WINDOW_BATCHES * settings.batch_tokens):
            finished: dict[int, tuple[Prompt, dict[str, Document]]] = {}
            for batch in batches(window, settings.batch_tokens, answer=settings.generate):
                if max(prompt.number for prompt in batch) < done:
                    continue
                traced = runner.run(recorder, batch, seed=settings.seed + batch[0].number)
                finished |= {p.number: (p, docs) for p, docs in zip(batch, traced, strict=True)}
                progress.update(sum(len(d.token_ids_T) for docs in traced for d in docs.values()))
            yield from (finished[number] for number in sorted(finished) if number >= done)


if __name__ == "__main__":
    run(collect, CollectSettings, prog="python -m trace.collect")
