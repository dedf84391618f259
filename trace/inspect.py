"""Summary and picture of a trace: the expert usage of its layers and domains.

python -m trace.inspect DIR
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from routing.cli import run
from routing.names import print_whole
from trace.settings import InspectSettings

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from routing.shards import TraceReader
    from trace.usage import Usage


def inspect(settings: InspectSettings) -> None:
    """Print a summary of every stack of the trace, and draw its picture.

    Raises ValueError if the directory is no trace or a shard is damaged.
    """
    from rich.console import Console

    from routing.shards import TraceReader, read_manifest
    from routing.topology import Topology
    from trace.picture import draw_usage
    from trace.usage import measure_usage

    directory = Path(settings.directory)
    console = Console(highlight=False)
    for stack in Topology.from_json(read_manifest(directory)["topology"]).stacks:
        trace = TraceReader(directory, stack.name, verify=settings.verify)
        if not len(trace):
            raise ValueError(f"the trace in {directory} has no documents yet")
        usage = measure_usage(trace)
        print_usage(console, trace, usage)
        path = Path(settings.picture or directory / "usage.png")
        if stack.name != "decoder":
            path = path.with_stem(f"{path.stem}-{stack.name}")
        draw_usage(usage, path, title=f"Expert usage of {trace.topology.model_type}: {stack}")
        console.print(f"picture: {path}", soft_wrap=True)
    if settings.verify:
        console.print("every shard matches its checksum and holds what it may")


def print_usage(console: Console, trace: TraceReader, usage: Usage) -> None:
    """Print the facts of one stack, then a table of its labels and one of its layers."""
    for table in (_facts(trace, usage), _labels(usage), _layers(usage)):
        print_whole(table, console)


def _facts(trace: TraceReader, usage: Usage) -> Table:
    from rich.table import Table

    top_k = usage.stack.top_k
    answers = usage.num_tokens - usage.prompt_tokens
    unfinished = "" if trace.complete else " so far: the trace is not complete"
    facts = Table.grid(padding=(0, 2))
    facts.add_row("model", str(trace.provenance["model"]))
    facts.add_row("topology", str(trace.topology))
    facts.add_row("stack", str(usage.stack))
    facts.add_row("documents", f"{len(trace):,}{unfinished}")
    facts.add_row("tokens", f"{usage.prompt_tokens:,} of prompts, {answers:,} generated")
    facts.add_row(
        f"top {top_k}",
        f"the {top_k} most used experts of a layer take {usage.top_share_L.mean():.3f} of its uses",
    )
    facts.add_row(
        "previous",
        f"{usage.overlap_L.mean():.3f} of a token's experts were used by the previous token too",
    )
    facts.add_row("entropy", f"{usage.entropy_L.mean():.2f} bits, of the expert usage of a layer")
    return facts


def _labels(usage: Usage) -> Table:
    table = _table("label", "documents", "tokens", f"top {usage.stack.top_k}")
    rows = zip(usage.labels, usage.documents_D, usage.tokens_D, usage.top_share_D, strict=True)
    for label, documents, tokens, share in rows:
        table.add_row(label, f"{documents:,}", f"{tokens:,}", f"{share:.3f}")
    return table


def _layers(usage: Usage) -> Table:
    table = _table("layer", "experts", "entropy", f"top {usage.stack.top_k}", "previous")
    numbers = zip(
        usage.entropy_L, usage.max_entropy_L, usage.top_share_L, usage.overlap_L, strict=True
    )
    for layer, (entropy, most, share, overlap) in zip(usage.stack.layers, numbers, strict=True):
        table.add_row(
            layer.name,
            f"{layer.top_k} of {layer.num_experts}",
            f"{entropy:.2f} of {most:.2f}",
            f"{share:.3f}",
            f"{overlap:.3f}",
        )
    return table


def _table(first: str, *numbers: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. The directory comes first, without `--directory`."""
    run(
        inspect,
        InspectSettings,
        argv,
        prog="python -m trace.inspect",
        positional=["directory"],
        examples=["trace", "trace --picture usage.png"],
    )


if __name__ == "__main__":
    main()
