"""The architecture: what may import what, how large a room may be, and that it is documented.

    routing  <-  trace | predictor | runtime   the stages, which never import each other
                 runtime/                      floors, low to high; nothing imports a higher one
    exports, benchmarks                        use all of them

Every import counts: those inside functions and those for types only, too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("trace", "predictor", "runtime")
PACKAGES = ("routing", *STAGES, "exports", "benchmarks")
MOST_MODULES = 12
MOST_LINES = 300
LONGEST_FUNCTION = 60
QUESTIONS = ("What", "Who", "Whose", "How", "Which", "Whether", "Where", "When", "Why")

FLOORS = (
    ("weights", "kv"),
    ("sizing", "cpu"),
    ("cache",),
    ("prediction",),
    ("engine", "simulation"),
    ("cuda",),
    ("loading", "offloaded_model"),
    ("serving", "conversion"),
    ("server", "batch", "simulate", "plan", "prepare", "comparison", "replay"),
)
"""The rooms of runtime/, low to high: packages, and the modules that lie beside them."""

UPWARD = {
    ("runtime.engine.engine", "runtime.serving"): "`engine.serve` is the engine's public face; "
    "serving is imported when it is first called",
}
"""Imports of a higher floor that stay on purpose, and why."""


class Import(NamedTuple):
    """Module `source` imports module `target`."""

    source: str
    target: str


def files() -> Iterator[Path]:
    """Every source file of the packages."""
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


@cache
def trees() -> dict[str, ast.Module]:
    return {module_of(path): ast.parse(path.read_text()) for path in files()}


@cache
def imports() -> list[Import]:
    """All imports between the project's own modules."""
    found = []
    for source, tree in trees().items():
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [Import(source, target) for target in map(own_module, names) if target]
    return [found_one for found_one in found if found_one.source != found_one.target]


def own_module(name: str) -> str | None:
    """The module of ours that an imported name is, or is in."""
    while name:
        if name in trees():
            return name
        name = name.rpartition(".")[0]
    return None


def test_stages_never_import_each_other() -> None:
    stage_of = {module: module.partition(".")[0] for module in trees()}
    crossing = [
        one
        for one in imports()
        if stage_of[one.source] in STAGES and stage_of[one.target] in STAGES
        and stage_of[one.source] != stage_of[one.target]
    ]  # fmt: skip
    assert crossing == []


def test_what_the_stages_share_imports_no_stage() -> None:
    assert [one for one in imports() if one.source.startswith("routing")
            and not one.target.startswith("routing")] == []  # fmt: skip


def test_nothing_in_the_runtime_imports_a_higher_floor() -> None:
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

    def floor(module: str) -> int | None:
        """None for the runtime's face, which only hands out what it is asked for."""
        parts = module.split(".")
        return floor_of[parts[1]] if len(parts) > 1 and parts[0] == "runtime" else None

    upward = []
    for source, target in imports():
        low, high = floor(source), floor(target)
        allowed = (source, ".".join(target.split(".")[:2])) in UPWARD
        if low is not None and high is not None and high > low and not allowed:
            upward.append((source, target))
    assert upward == []


def test_no_imports_run_in_a_circle() -> None:
    graph: dict[str, set[str]] = {module: set() for module in trees()}
    for source, target in imports():
        if (source, ".".join(target.split(".")[:2])) not in UPWARD:
            graph[source].add(target)
    assert circles(graph) == []


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other, found by peeling off all that end somewhere."""
    left = {module: set(targets) for module, targets in graph.items()}
    while ends := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in ends:
            del left[module]
    while starts := [m for m in left if not any(m in targets for targets in left.values())]:
        for module in starts:
            del left[module]
    return [sorted(left)] if left else []


@pytest.mark.parametrize("folder", sorted({path.parent for path in files()}), ids=str)
def test_a_folder_has_at_most_twelve_modules(folder: Path) -> None:
    modules = [path.name for path in folder.glob("*.py") if not path.name.startswith("__")]
    assert len(modules) <= MOST_MODULES, modules


def test_every_folder_says_what_is_in_it() -> None:
    silent = [
        module for module, tree in trees().items()
        if (ROOT / module.replace(".", "/")).is_dir() and not ast.get_docstring(tree)
    ]  # fmt: skip
    folders = {path.parent for path in files()} - {ROOT / "trace" / "__pycache__"}
    without = [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").exists()]
    assert silent == []
    assert without == []


def test_no_file_is_longer_than_three_hundred_lines() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files()}
    assert {path: n for path, n in lengths.items() if n > MOST_LINES} == {}


def test_no_function_is_longer_than_sixty_lines() -> None:
    """Its docstring not counted."""
    long = {
        f"{module}.{function.name}": length
        for module, tree in trees().items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := own_lines(function)) > LONGEST_FUNCTION
    }
    assert long == {}


def own_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    assert function.end_lineno is not None and first.end_lineno is not None
    documented = first.end_lineno - first.lineno + 1 if is_docstring else 0
    return function.end_lineno - function.lineno + 1 - documented


def test_every_public_function_and_class_is_documented() -> None:
    silent = [
        f"{module}.{node.name}"
        for module, tree in trees().items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_") and not ast.get_docstring(node)
    ]  # fmt: skip
    assert silent == []


def test_a_modules_docstring_says_what_it_is() -> None:
    """A noun or a verb, not a question."""
    asking = [
        module for module, tree in trees().items()
        if (ast.get_docstring(tree) or "What").split()[0] in QUESTIONS
    ]  # fmt: skip
    assert asking == []
