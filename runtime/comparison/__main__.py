"""All contenders compared on one trace: `python -m runtime.comparison TRACE`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from routing.cli import run
from runtime.comparison.settings import CompareSettings


def compare_trace(settings: CompareSettings) -> None:
    """Compare, print, draw, and write the files that were asked for.

    Raises ValueError for a trace or a predictor that cannot be compared; a leaderboard that the
    figures contradict is refused before anything is written to it.
    """
    from routing.shards import TraceReader
    from runtime.comparison.contenders import field_of
    from runtime.comparison.figures import compare, detailed
    from runtime.comparison.leaderboard import entries_of, read_board, with_entries, write_board
    from runtime.comparison.picture import draw
    from runtime.comparison.split import digest, split_trace
    from runtime.comparison.table import print_figures

    reader = TraceReader(settings.trace)
    if len(reader.topology.stacks) > 1:
        raise ValueError(f"{settings.trace} is of an encoder-decoder model: give one of a decoder")
    board = None if settings.leaderboard is None else read_board(settings.leaderboard, new=True)
    with split_trace(reader, settings) as split:
        field = field_of(split, settings)
        routes = digest(split.compared.documents(), reader)
    figures = list(compare(field, settings))
    print_figures(figures, detailed(figures, settings))
    print("\n".join([*split.remarks, f"routes compared on: {routes[:16]}"]))
    picture = settings.plot or Path(settings.trace) / "comparison.png"
    draw(figures, picture, f"{settings.trace}: {figures[0].tokens:,} tokens of {reader.topology}")
    print(f"picture: {picture}")
    entries = entries_of(figures, reader.topology, routes, settings)
    if settings.json is not None:
        result = {"command": sys.argv, "remarks": split.remarks, "entries": entries}
        settings.json.write_text(json.dumps(result, indent=1) + "\n")
    if settings.leaderboard is not None and board is not None:
        write_board(settings.leaderboard, with_entries(board, entries, str(settings.trace)))
        print(f"leaderboard: {settings.leaderboard}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. The trace comes first, without `--trace`."""
    run(
        compare_trace,
        CompareSettings,
        argv,
        prog="python -m runtime.comparison",
        positional=["trace"],
        examples=[
            "trace --predictors predictor.onnx",
            "trace --fit-trace other --residency 0.125 0.25 --leaderboard board.json --by me",
        ],
    )


if __name__ == "__main__":
    main()
