"""Command lines from settings dataclasses: one syntax, one way to fail."""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

Settings = TypeVar("Settings")

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def run(
    main: Callable[[Settings], None],
    settings: type[Settings],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    positional: Sequence[str] = (),
) -> None:
    """Parse `argv` (default: sys.argv) into `settings` and call `main` with it.

    Fields become `--options`, attribute docstrings their help; lists take several values
    (`--dataset a b c`), a flag needs none, and leading words without an option go to the fields
    named by `positional`. A ValueError or an OSError is the user's: it becomes one line on stderr
    and exit code 2. Ctrl-C exits with 130.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for index, name in enumerate(positional):
        if index < len(words) and not words[index].startswith("-"):
            words[index] = f"--{name}={words[index]}"
    with friendly_errors(prog):
        main(parse(settings, words, prog=prog))


@contextmanager
def friendly_errors(prog: str) -> Iterator[None]:
    """Turn ValueError and OSError into one line on stderr and exit code 2."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    except (ValueError, OSError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from None


def parse(settings: type[Settings], argv: Sequence[str], *, prog: str) -> Settings:
    """Parse `argv` into an instance of the dataclass `settings`. Raises ValueError."""
    from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    description = (settings.__doc__ or "").strip()
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with these options.")
    parser.add_class_arguments(settings, as_positional=False)
    try:
        parsed = parser.parse_args(_join_words(settings, list(argv)))
    except ArgumentError as error:
        raise ValueError(f"{error} (--help shows the options)") from error
    values = {f.name: getattr(parsed, f.name) for f in dataclasses.fields(settings) if f.init}  # type: ignore[arg-type]
    return settings(**values)


def _join_words(settings: type[Any], argv: list[str]) -> list[str]:
    """Rewrite `--files a b c` to `--files=["a", "b", "c"]` and a bare `--flag` to `--flag=true`."""
    hints = {f"--{name}": hint for name, hint in typing.get_type_hints(settings).items()}
    joined: list[str] = []
    while argv:
        word = argv.pop(0)
        option, _, value = word.partition("=")
        if _is_list(hints.get(option)) and not value.startswith("["):
            values = [value] if value else []
            while argv and not argv[0].startswith("--"):
                values.append(argv.pop(0))
            word = f"{option}={json.dumps(values)}"
        elif hints.get(word) is bool and (not argv or argv[0].startswith("--")):
            word = f"{word}=true"
        joined.append(word)
    return joined


def _is_list(hint: Any) -> bool:
    members = (hint, *typing.get_args(hint))
    return any(typing.get_origin(member) in (list, tuple) for member in members)
