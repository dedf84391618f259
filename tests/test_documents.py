"""The documents: every block of code in them runs as it stands, every link and module is there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md",
    ROOT / "exports" / "README.md", *sorted((ROOT / "docs").glob("*.md")),
]  # fmt: skip
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
"""They are run by `make notebooks`."""
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS_A_GPU = 'device="cuda"'


class Block(NamedTuple):
    """A fenced block: `python` and `bash` are run; `sh` installs or takes minutes."""

    document: Path
    language: str
    text: str


def blocks(language: str) -> list[Block]:
    return [
        Block(document, found, text)
        for document in DOCUMENTS
        for found, text in BLOCK.findall(document.read_text())
        if found == language
    ]


def name_of(block: Block) -> str:
    return f"{block.document.stem}: {block.text.splitlines()[0][:40]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout, in which blocks may write; one after the other, as they stand."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "exports").symlink_to(ROOT / "exports")
    (folder / "runs").mkdir()
    return folder


def run(command: list[str], folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("block", blocks("python"), ids=name_of)
def test_a_block_of_python_runs_as_it_stands(block: Block, folder: Path) -> None:
    if NEEDS_A_GPU in block.text:
        pytest.skip("needs a CUDA device")
    run([sys.executable, "-c", block.text], folder)


@pytest.mark.parametrize("block", blocks("bash"), ids=name_of)
def test_a_block_of_commands_runs_as_it_stands(block: Block, folder: Path) -> None:
    command = f"{sys.executable} -m expertflow"
    script = re.sub(r"^expertflow", command, block.text, flags=re.MULTILINE)
    run(["bash", "-euc", script], folder)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_links_lead_to_files_that_are_there(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_modules_and_files_that_are_named_are_there(document: Path) -> None:
    text = BLOCK.sub("", document.read_text())
    files = re.findall(r"`((?:runtime|routing|predictor|trace|tests|exports)/[\w/.-]+)`", text)
    assert [name for name in files if not (ROOT / name).exists()] == []
    modules = re.findall(r"python -m ((?:runtime|predictor|trace|exports|benchmarks)[\w.]*)", text)
    assert [name for name in modules if not is_command(name)] == []


def is_command(module: str) -> bool:
    path = ROOT / module.rstrip(".").replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs_and_its_links_lead_somewhere(notebook: Path) -> None:
    cells = json.loads(notebook.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    text = "".join(line for cell in cells if cell["cell_type"] == "markdown"
                   for line in cell["source"])  # fmt: skip
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    assert [target for target in targets if not (notebook.parent / target).exists()] == []


def test_the_readme_is_read_once() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100
