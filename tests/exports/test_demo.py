"""exports.demo: the report in words, commands that fit the terminal, a quick help."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from exports.comparison import Run
from exports.demo import SEPARATOR, WIDTH, DemoSettings, hold_back, print_next_steps, wrapped
from exports.demo_generation import LiveResult, Speeds
from exports.demo_report import draw, print_report, save

ROOT = Path(__file__).parents[2]
LOADS = {"lru": 1000, "lfu": 900, "predicted": 700, "belady": 500}


def live(recall: float = 0.75, **loads: int) -> LiveResult:
    """A report's input with the given loads by policy."""
    runs = [
        Run(
            policy=policy,
            residency=0.25,
            slots=64,
            identical=True,
            hit_rate=1 - count / 2000,
            requests=2000,
            loads=count,
            bytes_loaded=count * 24 * 2**10,
            tokens=100,
            seconds=2.0,
            recall=recall if policy == "predicted" else math.nan,
            prediction_ms=0.5 if policy == "predicted" else math.nan,
        )
        for policy, count in (LOADS | loads).items()
    ]
    return LiveResult(
        runs=runs,
        new_tokens=50,
        speeds=Speeds(resident=100.0, offloaded=25.0),
        domain="math_qa",
        prompt="Q: one\n" + "and more " * 30,
        continuation="A: two\n" + "and three " * 30,
    )


def said(result: LiveResult, capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_report(result, width=WIDTH)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "nan" not in "\n".join(lines)
    return lines


def test_the_report_has_every_policy_with_its_gap_and_both_speeds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = said(live(), capsys)
    cells = {
        line.split()[0]: line.split() for line in lines if line.startswith("  ") and line.split()
    }
    assert cells["ExpertFlow"] == [
        "ExpertFlow", "0.650", "700", "-30.0%", "60%", "50%", "16.4", "yes"
    ]  # fmt: skip
    assert cells["LRU"][3:5] == ["+0.0%", "0%"] and cells["Belady"][4] == "100%"
    assert cells["LFU"][4:6] == ["20%", "0%"]
    assert any("the best rule without a predictor, LFU." in line for line in lines)
    speeds = "100 tokens/s with every expert resident, 25 offloaded"
    assert any(speeds in line for line in lines)


def test_the_report_says_why_a_cpu_saves_no_time_and_shows_a_line_of_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = said(live(), capsys)
    assert any(line.startswith("On a CPU this saves bytes and not time") for line in lines)
    assert any(line.strip().startswith("generated:  A: two⏎ and three") for line in lines)


def test_a_report_without_loads_or_predictions_has_no_nan(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said(live(recall=math.nan, lru=0, lfu=0, predicted=0, belady=0), capsys)


def test_the_bars_are_drawn(tmp_path: Path) -> None:
    draw(live().runs, tmp_path / "policies.png")
    assert (tmp_path / "policies.png").stat().st_size > 5000


def test_the_figures_are_kept_as_json_and_what_was_not_measured_is_null(tmp_path: Path) -> None:
    save(live(), file := tmp_path / "policies.json")
    kept = json.loads(file.read_text())
    assert {run["policy"]: run["loads"] for run in kept["runs"]} == LOADS
    assert kept["new_tokens"] == 50 and kept["speeds"] == {"resident": 100.0, "offloaded": 25.0}
    recalls = {run["policy"]: run["recall"] for run in kept["runs"]}
    assert recalls["predicted"] == 0.75 and recalls["lru"] is None


def test_a_wrapped_command_is_the_same_command() -> None:
    words = ["python", "-m", "x", *(w for n in range(20) for w in (f"--option_{n}", "some value"))]
    lines = wrapped(words).splitlines()
    assert len(lines) > 1 and max(map(len, lines)) <= WIDTH
    assert shlex.split("".join(line.removesuffix("\\") for line in lines))[1:] == words


def test_the_next_steps_are_three_commands(capsys: pytest.CaptureFixture[str]) -> None:
    print_next_steps()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    commands = [line.split()[1] for line in lines if line.strip().startswith("expertflow ")]
    assert commands == ["trace", "train", "export"]


def test_a_prompt_of_every_domain_is_held_back_from_the_trace(tmp_path: Path) -> None:
    settings = DemoSettings(out=tmp_path / "demo", quick=True)
    prompts = hold_back(settings)
    assert list(prompts) == ["code_c", "code_rust", "math_qa"]
    for file in settings.domains:
        whole = file.read_text(encoding="utf-8")
        rest = (settings.directory / "text" / file.name).read_text(encoding="utf-8")
        assert len(whole.split(SEPARATOR)) == len(rest.split(SEPARATOR)) + 1
        assert whole.strip().startswith(prompts[file.stem])


def test_the_help_loads_no_heavy_library() -> None:
    code = (
        "import sys\nfrom exports.demo import DemoSettings\nfrom routing.cli import parse\n"
        "try: parse(DemoSettings, ['--help'], prog='demo')\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers', 'lightning', 'runtime'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr
