"""The command `expertflow`: it lists the stages' commands, and runs them by short names.

The stages are named by strings: nothing of theirs is imported before one of them is run.
"""

from __future__ import annotations

import difflib
import runpy
import sys
from collections.abc import Sequence
from typing import NamedTuple

from routing.cli import called_as
from routing.process.exits import EXIT_BAD_INPUT, quiet_exits

PROG = "expertflow"


class Stage(NamedTuple):
    """One command of a stage."""

    module: str
    """Its module: `python -m MODULE` is the same command."""
    summary: str


GROUPS: dict[str, dict[str, Stage]] = {
    "run a model": {
        "plan": Stage("runtime.plan", "whether a model fits a memory budget, before it is loaded"),
        "serve": Stage("runtime.server", "serve a model over HTTP, as OpenAI's API does"),
        "batch": Stage("runtime.batch", "continue every prompt of a data set"),
        "prepare": Stage("runtime.prepare", "rewrite a model's experts into contiguous blocks"),
    },
    "predict its routing": {
        "trace": Stage("trace.collect", "record which experts every token of a text uses"),
        "import": Stage("trace.formats.importing", "read the routing trace of vLLM, SGLang, ..."),
        "tabulate": Stage(
            "trace.formats.exporting", "write a trace as Parquet or a `datasets` set"
        ),
        "inspect": Stage("trace.inspect", "summarise a trace and draw its expert usage"),
        "train": Stage("predictor.train", "train a route predictor on traces"),
        "adapt": Stage("exports.adaptation", "train a predictor further on recorded routes"),
        "export": Stage("predictor.export", "write a trained predictor as an ONNX file"),
        "evaluate": Stage("predictor.evaluate", "score predictors on held-out documents"),
        "simulate": Stage("runtime.simulate", "replay a trace through every cache policy"),
        "replay": Stage("runtime.replay", "write a recorded run as one HTML page, token by token"),
        "compare": Stage("runtime.comparison", "every rule and predictor on one trace, by label"),
        "leaderboard": Stage(
            "runtime.comparison.leaderboard_command", "merge and print figures of many contenders"
        ),
    },
    "see all of it": {
        "build": Stage("exports.build", "build a model of the published figures, from packages"),
        "demo": Stage("exports.demo", "run the whole pipeline on the embedded model, in minutes"),
    },
}
"""The commands by what they are for, in the order in which they are listed."""

STAGES = {name: stage for group in GROUPS.values() for name, stage in group.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage that `argv` (default: sys.argv) names, or list the stages.

    An unknown name exits with code 2 and suggests the nearest one.
    """
    with quiet_exits(PROG):
        _run(list(sys.argv[1:] if argv is None else argv) or ["--help"])


def _run(words: Sequence[str]) -> None:
    name, *others = words
    if name in ("-h", "--help", "help"):
        print(overview())
    elif name in ("-V", "--version"):
        import expertflow

        print(f"{PROG} {expertflow.__version__}")
    elif name in STAGES:
        run_stage(name, others)
    else:
        print(f"{PROG}: error: {unknown(name)}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT)


def run_stage(name: str, words: Sequence[str]) -> None:
    """Run a stage's module as `python -m` does, with these words as its command line."""
    sys.argv[1:] = words
    with called_as(f"{PROG} {name}"):
        runpy.run_module(STAGES[name].module, run_name="__main__", alter_sys=True)


def overview() -> str:
    """The stages, grouped, a line each."""
    width = max(map(len, STAGES))
    lines = [
        f"usage: {PROG} STAGE [options]",
        "",
        "Run mixture-of-experts models with most of their experts outside GPU memory.",
    ]
    for title, group in GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [f"  {stage:{width}}  {about.summary}" for stage, about in group.items()]
    lines += [
        "",
        f"`{PROG} STAGE --help` shows the options of a stage, and examples.",
        f"`{PROG} --version` shows the version.",
        "",
        "examples:",
        f"  {PROG} plan allenai/OLMoE-1B-7B-0924 --memory 8GiB",
        f"  {PROG} serve --model DIR --predictor predictor.onnx --memory 8GiB",
        f"  {PROG} demo --quick",
    ]
    return "\n".join(lines)


def unknown(name: str) -> str:
    """The message for a name that is no stage's."""
    near = difflib.get_close_matches(name, STAGES, n=1, cutoff=0.5)
    if near:
        return f"there is no stage {name!r}; did you mean {near[0]!r}? ({PROG} --help lists all)"
    return f"there is no stage {name!r}: the stages are {', '.join(STAGES)}"
