"""The settings of `predictor.train` that ship with it, by name: `--config small`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
OPTIONS = ("--config", "-c")


def names() -> list[str]:
    """The names of the shipped configurations."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_config(name: str) -> str:
    """The path of a configuration: a file of one's own, or a shipped one by its name.

    Raises ValueError for what is neither, and lists the shipped ones.
    """
    if name in names() and not Path(name).is_file():
        return str(FOLDER / f"{name}.yaml")
    if not Path(name).is_file():
        raise ValueError(
            f"--config {name}: there is no such file, and the configurations that ship are "
            f"{', '.join(names())}"
        )
    return name


def with_paths(words: Sequence[str]) -> list[str]:
    """The words of a command line, the values of `--config` as paths. Raises ValueError."""
    found: list[str] = []
    for word in words:
        option, equals, value = word.partition("=")
        if found and found[-1] in OPTIONS:
            found.append(find_config(word))
        elif option in OPTIONS and equals:
            found.append(f"{option}={find_config(value)}")
        else:
            found.append(word)
    return found
