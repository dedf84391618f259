"""routing.cli: command lines from dataclasses, and how they fail."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from routing.cli import parse, run

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Do the thing."""

    files: list[str]
    """Where the words are."""
    shares: list[float] = field(default_factory=lambda: [0.5])
    """How much of each."""
    label: str | None = None
    """What to call it."""
    count: int = 3
    """How often."""
    loud: bool = False
    """Whether to shout."""
    out: Path | None = None
    """Where to put it."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"--count must be at least 1, not {self.count}")


def parsed(*argv: str) -> Settings:
    return parse(Settings, argv, prog="thing")


def fail(capsys: pytest.CaptureFixture[str], main: object, *argv: str) -> tuple[int, str]:
    """The exit code and what stderr says."""
    with pytest.raises(SystemExit) as caught:
        run(main, Settings, argv, prog="thing")  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    assert out == ""
    return int(caught.value.code or 0), err


@pytest.mark.parametrize(
    "argv",
    [
        ("--files", "a", "b", "--count", "2"),
        ("--count", "2", "--files", "a", "b"),
        ("--count=2", '--files=["a", "b"]'),
    ],
)
def test_a_list_takes_several_values(argv: tuple[str, ...]) -> None:
    assert parsed(*argv) == Settings(files=["a", "b"], count=2)


def test_a_list_takes_a_single_value() -> None:
    assert parsed("--files", "a").files == ["a"]
    assert parsed("--files=a").files == ["a"]


def test_lists_of_numbers_hold_numbers() -> None:
    assert parsed("--files", "a", "--shares", "0.25", "1").shares == [0.25, 1.0]


@pytest.mark.parametrize("name", ["12", "true", "null", "a b", "ä", '"', "[x]", "{a: 1}", "x,y"])
def test_a_name_that_looks_like_something_else_stays_a_name(name: str) -> None:
    assert parsed("--files", name, "b").files == [name, "b"]


def test_every_type_of_field_is_parsed() -> None:
    settings = parsed("--files", "a", "--label", "x", "--loud", "true", "--out", "b/c")
    assert settings == Settings(files=["a"], label="x", loud=True, out=Path("b/c"))


def test_options_may_come_from_a_file_and_the_command_line_wins(tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("files: [a, b]\ncount: 5\nlabel: x\n")
    settings = parsed("--config", str(tmp_path / "options.yaml"), "--count", "7")
    assert settings == Settings(files=["a", "b"], count=7, label="x")


def test_help_shows_what_the_docstrings_under_the_fields_say(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(print, Settings, ["--help"], prog="thing")
    out = capsys.readouterr().out
    assert caught.value.code == 0
    for text in ("usage: thing", "Do the thing.", "Where the words are.", "How much of each."):
        assert text in out
    assert "default: 3" in out


def test_main_gets_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Settings] = []
    run(seen.append, Settings, ["--files", "a"], prog="thing")
    assert seen == [Settings(files=["a"])]


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, PermissionError])
def test_a_users_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], error: type[Exception]
) -> None:
    def main(_: Settings) -> None:
        raise error("the shard\nis missing")

    assert fail(capsys, main, "--files", "a") == (2, "thing: error: the shard is missing\n")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--bogus", "3", "--files", "a"), "--bogus"),
        ((), "files"),
        (("--files", "a", "--count", "x"), "count"),
        (("--files", "a", "--shares", "x"), "shares"),
        (("--files", "a", "--count", "0"), "--count must be at least 1, not 0"),
        (("--files", "a", "--config", "nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_that_names_it_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], says: str
) -> None:
    code, err = fail(capsys, print, *argv)
    assert code == 2 and err.startswith("thing: error: ") and err.count("\n") == 1
    assert says in err


def test_our_own_errors_are_not_hidden() -> None:
    def main(_: Settings) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main, Settings, ["--files", "a"], prog="thing")


def test_an_interrupt_is_one_line_and_exit_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: Settings) -> None:
        raise KeyboardInterrupt

    assert fail(capsys, main, "--files", "a") == (130, "thing: interrupted\n")


def test_help_of_a_stage_loads_no_heavy_library() -> None:
    script = (
        "import sys, runpy; sys.argv = ['simulate', '--help']\n"
        "try: runpy.run_module('runtime.simulate', run_name='__main__', alter_sys=True)\n"
        "finally: print([m for m in ('matplotlib', 'onnxruntime', 'transformers') "
        "if m in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "--residency" in result.stdout and result.stderr.strip() == "[]"
