"""Command lines from settings dataclasses: one syntax, one way to fail."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import sys
import textwrap
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from routing.process.exits import friendly_errors as friendly_errors

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

Settings = TypeVar("Settings")

EXAMPLES = "examples:"

_called_as: list[str] = []
"""The name of the command in front of the running one, if there is one."""


class _HelpTexts(NamedTuple):
    """What a help says beside the fields."""

    positional: Sequence[str] = ()
    first: Sequence[str] = ()
    examples: Sequence[str] = ()


def run(
    main: Callable[[Settings], None],
    settings: type[Settings],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    positional: Sequence[str] = (),
    first: Sequence[str] = (),
    examples: Sequence[str] = (),
) -> None:
    """Parse `argv` (default: sys.argv) into `settings` and call `main` with it.

    Fields become `--options`, written with underscores or dashes, and attribute docstrings their
    help; lists take several values (`--dataset a b c`), a flag needs none, and leading words
    without an option go to the fields named by `positional`. A ValueError or an OSError is the
    user's: it becomes one line on stderr and exit code 2. Ctrl-C exits with 130.

    prog: the name in messages, unless the command was started by another (`called_as`).
    first: the fields that the help lists first.
    examples: arguments that work as they stand, shown below the help.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for index, name in enumerate(positional):
        if index < len(words) and not words[index].startswith("-"):
            words[index] = f"--{name}={words[index]}"
    prog = program(prog)
    help_texts = _HelpTexts(positional, first, examples)
    with friendly_errors(prog):
        main(parse(settings, words, prog=prog, help_texts=help_texts))


@contextmanager
def called_as(name: str) -> Iterator[None]:
    """Within it, commands go by `name` in usage lines and errors."""
    before = _called_as[:]
    _called_as[:] = [name]
    try:
        yield
    finally:
        _called_as[:] = before


def program(prog: str) -> str:
    """The name that the running command was called by; `prog` where it was not by another one."""
    return _called_as[0] if _called_as else prog


def print_help(text: str, prog: str) -> None:
    """Print a help and exit, where the command line asks for one at once or says nothing.

    text: `{prog}` in it becomes the name that the command was called by, by default `prog`.
    """
    if sys.argv[1:2] in ([], ["-h"], ["--help"]):
        print(text.format(prog=program(prog)).rstrip())
        raise SystemExit(0)


def with_underscores(words: Sequence[str], names: Collection[str] | None = None) -> list[str]:
    """The words, their options' dashes as underscores: `--max-tokens=5` is `--max_tokens=5`.

    names: rewrite only what becomes one of these (`max_tokens`); by default every option.
    """
    rewritten = []
    for word in words:
        option, equals, value = word.partition("=")
        name = option[2:].replace("-", "_")
        if option.startswith("--") and name and (names is None or name in names):
            word = f"--{name}{equals}{value}"
        rewritten.append(word)
    return rewritten


def parse(
    settings: type[Settings],
    argv: Sequence[str],
    *,
    prog: str,
    help_texts: _HelpTexts = _HelpTexts(),  # noqa: B008 - immutable
) -> Settings:
    """Parse `argv` into an instance of the dataclass `settings`. Raises ValueError."""
    from jsonargparse import ArgumentError

    parser = _parser(settings, prog, help_texts)
    names = [f.name for f in dataclasses.fields(settings) if f.init]  # type: ignore[arg-type]
    words = with_underscores(argv, names)
    try:
        parsed = parser.parse_args(_join_words(settings, words))
    except ArgumentError as error:
        raise ValueError(f"{error} (--help shows the options)") from error
    return settings(**{name: getattr(parsed, name) for name in names})


def _parser(settings: type[Any], prog: str, texts: _HelpTexts) -> ArgumentParser:
    """A parser of the fields.

    jsonargparse could take the class as a whole, but would then import what its module imports for
    types only: torch, for a `--help`.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=prog,
        usage=_usage(settings, prog, texts),
        description=inspect.cleandoc(settings.__doc__ or ""),
        epilog=_epilog(prog, texts.examples),
        formatter_class=_formatter(),
        exit_on_error=False,
    )
    fields = {f.name: f for f in dataclasses.fields(settings) if f.init}
    hints, docs = typing.get_type_hints(settings), attribute_docstrings(settings)
    for name in _order(settings, texts.first):
        parser.add_argument(
            f"--{name}", type=hints[name], help=docs.get(name), **_default(fields[name])
        )
    parser.add_argument("--config", action="config", help="YAML file with these options.")
    return parser


def _default(field: dataclasses.Field[Any]) -> dict[str, Any]:
    if field.default is not dataclasses.MISSING:
        return {"default": field.default}
    if field.default_factory is not dataclasses.MISSING:
        return {"default": field.default_factory()}
    return {"required": True}


def attribute_docstrings(settings: type[Any]) -> dict[str, str]:
    """The docstring under each field of a dataclass and its bases, as one line."""
    docs: dict[str, str] = {}
    for base in reversed(settings.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in pairwise(tree.body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs


def _order(settings: type[Any], first: Sequence[str]) -> list[str]:
    """The fields as the help lists them: `first`, those without a default, then the others.

    A class's own fields come before those that it inherits.
    """
    names = {f.name for f in dataclasses.fields(settings) if f.init}
    own = [name for base in settings.__mro__ for name in vars(base).get("__annotations__", ())]
    order = [*first, *_required(settings), *own]
    return [name for name in dict.fromkeys(order) if name in names]


def _required(settings: type[Any]) -> list[str]:
    fields = dataclasses.fields(settings)
    return [f.name for f in fields if f.init and "required" in _default(f)]


def _usage(settings: type[Any], prog: str, texts: _HelpTexts) -> str:
    """What must be given, the words without an option first."""
    hints = typing.get_type_hints(settings)
    required = _required(settings)
    words = [name.upper() if name in required else f"[{name.upper()}]" for name in texts.positional]
    for name in _order(settings, texts.first):
        if name in required and name not in texts.positional:
            words.append(f"--{name} {name.upper()}{' ...' if _is_list(hints[name]) else ''}")
    return " ".join([prog, *words, "[options]"])


def _epilog(prog: str, examples: Sequence[str]) -> str:
    dashes = "Options may be written with dashes too: --max-tokens is --max_tokens."
    if not examples:
        return dashes
    return "\n".join([dashes, "", EXAMPLES, *(f"  {prog} {words}" for words in examples)])


def _formatter() -> type[DefaultHelpFormatter]:
    """A help formatter that keeps paragraphs, and examples as they are."""
    from jsonargparse import DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        def _fill_text(self, text: str, width: int, indent: str) -> str:
            fill = super()._fill_text
            return "\n\n".join(
                part if part.startswith(EXAMPLES) else fill(part, width, indent)
                for part in text.split("\n\n")
            )

    return Formatter


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
        elif _is_flag(hints.get(word)) and (not argv or argv[0].startswith("--")):
            word = f"{word}=true"
        joined.append(word)
    return joined


def _is_flag(hint: Any) -> bool:
    return hint is bool or bool in typing.get_args(hint)


def _is_list(hint: Any) -> bool:
    members = (hint, *typing.get_args(hint))
    return any(typing.get_origin(member) in (list, tuple) for member in members)
