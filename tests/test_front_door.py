"""The front door: `import expertflow`, the command `expertflow`, and what they promise."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import expertflow
import runtime
from predictor.configs import find_config, names, with_paths
from routing.cli import with_underscores
from routing.command import GROUPS, STAGES
from routing.process.exits import EXIT_UNREAD

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "onnxruntime", "numpy", "lightning", "matplotlib")
PUBLIC = ("Engine", "OffloadedModel", "Request", "Result", "ServeSettings", "Stats", "load")
OWN = {"routing", "trace", "predictor", "runtime", "exports", "benchmarks", "expertflow", "tests"}
NAMES = {"yaml": "pyyaml", "huggingface_hub": "huggingface-hub", "onnxruntime": "onnxruntime"}
"""Distributions whose module has another name."""
OPTIONAL = {"accelerate", "moe_policylang"}
"""Other systems that a benchmark compares with, where they are installed."""


def expertflow_command(*words: str, fails: bool = False, first: Path | None = None) -> str:
    """What the command says. first: a folder whose modules go before all others."""
    folders = [str(first), str(ROOT)] if first else [str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders), "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-m", "expertflow", *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def loaded_by(statement: str) -> list[str]:
    """Which heavy libraries a statement loads in a fresh interpreter."""
    script = f"import sys\n{statement}\nprint([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded: list[str] = ast.literal_eval(done.stdout.splitlines()[-1])
    return loaded


@pytest.mark.parametrize("statement", ["import expertflow", "import runtime", "import predictor"])
def test_importing_a_package_loads_no_library(statement: str) -> None:
    assert loaded_by(statement) == []


@pytest.mark.parametrize("package", [expertflow, runtime])
@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_those_of_the_runtime(package: object, name: str) -> None:
    assert getattr(package, name) is getattr(runtime, name)
    assert name in dir(package)


def test_what_is_loaded_stays_callable_whatever_was_imported() -> None:
    import runtime.loading

    assert callable(runtime.load) and runtime.load is runtime.loading.load


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        expertflow.nonsense  # noqa: B018


def test_the_version_is_the_distributions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert expertflow.__version__ == project["version"]
    assert expertflow.__version__ == importlib.metadata.version("moe-expertflow")
    assert expertflow_command("--version").strip() == f"expertflow {project['version']}"


def test_the_command_lists_every_stage_by_purpose() -> None:
    shown = expertflow_command("--help")
    for title, stages in GROUPS.items():
        assert f"{title}:" in shown
        for name, stage in stages.items():
            assert re.search(rf"^  {name} +{re.escape(stage.summary)}$", shown, re.MULTILINE)
    assert expertflow_command() == shown


@pytest.fixture(scope="session")
def no_extras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that lets no module of the extras be imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    hidden_extras = ("cpu", "ray", "serve", "smol", "notebooks")
    needed = [word for name in hidden_extras for word in extras[name]]
    modules = [re.split(r"[\[<>=~; ]", word)[0].replace("-", "_") for word in needed]
    folder = tmp_path_factory.mktemp("no_extras")
    hidden = f"import sys\nsys.modules.update(dict.fromkeys({modules}))\n"
    (folder / "sitecustomize.py").write_text(hidden)
    return folder


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_a_help_with_examples_without_any_extra(name: str, no_extras: Path) -> None:
    shown = expertflow_command(name, "--help", first=no_extras)
    assert f"usage: expertflow {name}" in shown
    assert f"examples:\n  expertflow {name}" in shown


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"]], ids=" ".join)
def test_output_that_nobody_reads_ends_the_command_quietly(
    words: list[str], unbuffered: str
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "expertflow", *words], cwd=ROOT, stdout=writer,
        stderr=subprocess.PIPE, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (EXIT_UNREAD, "")


def test_output_to_a_full_disk_is_an_error_of_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "expertflow", "--help"], cwd=ROOT, stdout=full,
            stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "expertflow: error: [Errno 28] No space left on device\n"


def _heed_interrupts() -> None:
    """Jobs in the background of a shell ignore them, and so do their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_prints_no_traceback_even_while_libraries_are_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(60)"
    )
    folders = os.pathsep.join([str(tmp_path), str(ROOT)])
    process = subprocess.Popen(
        [sys.executable, "-m", "expertflow", "train", "fit"], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": folders},
        preexec_fn=_heed_interrupts,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert (process.returncode, said) == (130, "expertflow: interrupted\n")


def test_a_mistyped_stage_is_told_the_nearest() -> None:
    assert "did you mean 'simulate'?" in expertflow_command("simulat", fails=True)


def test_a_mistake_in_a_stage_goes_by_the_name_it_was_called_by() -> None:
    message = expertflow_command("plan", "no-such-folder/no-model", "--memory", "much", fails=True)
    assert message.startswith("expertflow plan: error: ")


def test_options_may_have_dashes_or_underscores() -> None:
    assert with_underscores(["--max-tokens", "5", "--out=a-b"]) == [
        "--max_tokens",
        "5",
        "--out=a-b",
    ]
    assert with_underscores(["--data.batch-size=3"]) == ["--data.batch_size=3"]


def test_shipped_configurations_are_found_by_name_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert names() == ["base", "medium", "small", "t5"]
    for name in names():
        assert Path(find_config(name)).is_file()
    assert with_paths(["fit", "--config", "small"])[2] == find_config("small")
    assert with_paths(["--config=t5"]) == [f"--config={find_config('t5')}"]
    (tmp_path / "own.yaml").write_text("{}")
    assert find_config("own.yaml") == "own.yaml"
    with pytest.raises(ValueError, match=r"no such file, .* base, medium, small, t5"):
        find_config("large")


def test_every_library_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    declared = {
        re.split(r"[\[<>=!~; ]", line)[0].lower().replace("_", "-")
        for line in (*project["dependencies"], *extras)
    }
    imported = {
        name.partition(".")[0]
        for package in ("routing", "trace", "predictor", "runtime", "exports", "benchmarks")
        for path in (ROOT / package).rglob("*.py")
        for name in imported_by(path)
    }
    foreign = imported - OWN - OPTIONAL - set(sys.stdlib_module_names)
    missing = {n for n in foreign if NAMES.get(n, n).replace("_", "-") not in declared}
    assert missing == set()


def imported_by(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found
