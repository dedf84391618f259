"""Leaderboard files checked, merged and printed.

python -m runtime.comparison.leaderboard_command BOARD --add OTHER ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from routing.cli import run
from runtime.comparison.settings import LeaderboardSettings

if TYPE_CHECKING:
    from rich.table import Table

    from runtime.comparison.leaderboard import Entry


def leaderboard(settings: LeaderboardSettings) -> None:
    """Check the board, add the others to it, and print it.

    Raises ValueError for files that are no leaderboards or contradict each other; the board is then
    as it was.
    """
    from routing.names import print_whole
    from runtime.comparison.leaderboard import read_board, with_entries, write_board

    board = read_board(settings.board, new=bool(settings.add))
    for path in settings.add:
        board = with_entries(board, read_board(path), str(path))
    if settings.add:
        write_board(settings.board, board)
        print(f"{settings.board}: {len(board):,} entries")
    shown = [entry for entry in board if entry["label"] == settings.label]
    if not shown:
        labels = sorted({entry["label"] for entry in board})
        raise ValueError(
            f"{settings.board} has no entries of the label {settings.label!r}, but of: "
            f"{', '.join(labels) or 'none'}"
        )
    for trial in dict.fromkeys(_trial(entry) for entry in shown):
        print_whole(_table([entry for entry in shown if _trial(entry) == trial]))


def _trial(entry: Entry) -> tuple[Any, ...]:
    from runtime.comparison.leaderboard import TRIAL

    return tuple(entry[name] for name in TRIAL)


def _table(entries: Sequence[Entry]) -> Table:
    """One trial's entries, the best first."""
    from rich.table import Table

    first = entries[0]
    table = Table(
        title=f"{first['model']}, routes {first['routes'][:16]}, {first['tokens']:,} tokens, "
        f"{first['residency']:.4g} resident, cache {first['cache']}, warm-up {first['warm_up']}",
        title_justify="left",
    )
    for name in ("contender", "by", "hits", "gap, best free", "recall@C", "MB/token"):
        table.add_column(name, justify="left" if name in ("contender", "by") else "right")
    for entry in sorted(entries, key=lambda entry: -entry["hit_rate"]):
        gap, recall = entry["gap_best"], entry["recall_at_c"]
        table.add_row(
            entry["contender"],
            entry["by"],
            f"{entry['hit_rate']:.3f}",
            "" if gap is None else f"{gap:.0%}",
            "" if recall is None else f"{recall:.3f}",
            f"{entry['mb_per_token']:.1f}",
        )
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. The board comes first, without `--board`."""
    run(
        leaderboard,
        LeaderboardSettings,
        argv,
        prog="python -m runtime.comparison.leaderboard_command",
        positional=["board"],
        examples=["board.json", "board.json --add theirs.csv more.json"],
    )


if __name__ == "__main__":
    main()
