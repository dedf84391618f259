"""The packages go by their own names in a wheel, in an editable install, and in the checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("routing", "trace", "predictor", "runtime", "exports")

# Prints, as JSON, the folder that each package is found in.
FIND_PACKAGES = f"""
import importlib.util, json, os
specs = [importlib.util.find_spec(name) for name in {PACKAGES}]
print(json.dumps(sorted({{os.path.dirname(os.path.dirname(spec.origin)) for spec in specs}})))
"""

USE_STANDARD_TRACE = """
import json, pickle, trace
from trace import *
assert set(trace.__all__) <= set(globals())
assert trace.Trace is Trace and Trace.__module__ == "trace"
assert type(pickle.loads(pickle.dumps(CoverageResults()))) is CoverageResults
tracer = trace.Trace(countfuncs=True)
tracer.runfunc(json.dumps, {})
assert "dumps" in {function for _, _, function in tracer.results().calledfuncs}
"""

SPAWN_WORKERS = f"""
import multiprocessing

def find(name):
    return __import__(name).__file__

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.map(find, {PACKAGES})
    assert found == [find(name) for name in {PACKAGES}], found
"""

TEST_FILE = f"""
import importlib.util, trace

def test_names():
    assert trace.Trace
    for name in {PACKAGES}:
        assert importlib.util.find_spec(name).origin.startswith(FOLDER)
"""


class Environment(NamedTuple):
    python: Path
    folder: Path  # of the packages, in this environment


def run(*command: str | Path, cwd: Path, fails: bool = False) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean, capture_output=True, text=True
    )
    assert (result.returncode != 0) == fails, result.stdout + result.stderr
    return result


def pip(*arguments: str | Path, python: Path | str = sys.executable) -> None:
    offline = ("--disable-pip-version-check", "--no-input")
    run(sys.executable, "-m", "pip", "--python", python, *offline, *arguments, cwd=ROOT)


def make_environment(folder: Path) -> Path:
    """The interpreter of a fresh environment that sees the libraries of the running one.

    A path in a .pth file is put on `sys.path` without running the .pth files that lie there, so an
    ExpertFlow that is installed in the running environment stays out of sight.
    """
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    (site_packages(folder) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def site_packages(environment: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))


def install(python: Path, *what: str | Path) -> None:
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    pip("install", *options, *what, python=python)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def from_wheel(tmp_path_factory, wheel) -> Environment:
    folder = tmp_path_factory.mktemp("from_wheel")
    python = make_environment(folder)
    install(python, wheel)
    return Environment(python, site_packages(folder) / "expertflow")


@pytest.fixture(scope="module")
def editable(tmp_path_factory) -> Environment:
    python = make_environment(tmp_path_factory.mktemp("editable"))
    install(python, "--editable", ROOT)
    return Environment(python, ROOT)


@pytest.fixture(params=["from_wheel", "editable"])
def environment(request) -> Environment:
    return request.getfixturevalue(request.param)


@pytest.fixture
def bare(tmp_path) -> Path:
    """The interpreter of an environment without ExpertFlow."""
    return make_environment(tmp_path / "bare")


def find_packages(python: Path, *options: str, cwd: Path) -> list[str]:
    result = run(python, *options, "-c", FIND_PACKAGES, cwd=cwd)
    assert result.stderr == ""  # an interpreter reports a faulty .pth file there, and goes on
    return json.loads(result.stdout)


def test_the_wheel_carries_every_file_of_the_packages_and_no_other(wheel):
    files = (path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file())
    sources = {path.relative_to(ROOT) for path in files if path.parent.name != "__pycache__"}
    expected = {f"expertflow/{path.as_posix()}" for path in sources}
    expected |= {"expertflow/__init__.py", "expertflow/py.typed"}
    expected |= {"expertflow.pth", "expertflow.start"}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_installed_packages_are_found_from_any_folder(environment, tmp_path):
    assert find_packages(environment.python, cwd=tmp_path) == [str(environment.folder)]


def test_installed_packages_are_found_from_a_folder_of_the_checkout(environment):
    assert find_packages(environment.python, cwd=ROOT / "tests") == [str(environment.folder)]


def test_installed_packages_are_found_without_the_current_folder(environment):
    assert find_packages(environment.python, "-P", cwd=ROOT) == [str(environment.folder)]


def test_the_checkout_comes_before_an_installed_wheel_in_its_own_folder(from_wheel):
    assert set(find_packages(from_wheel.python, cwd=ROOT)) <= {"", str(ROOT)}


def test_the_checkout_needs_no_installation(bare):
    assert set(find_packages(bare, cwd=ROOT)) <= {"", str(ROOT)}
    run(bare, "-c", USE_STANDARD_TRACE, cwd=ROOT)
    assert "--count" in run(bare, "-m", "trace", "--help", cwd=ROOT).stdout
    assert "--dataset" in run(bare, "-m", "trace.collect", "--help", cwd=ROOT).stdout


def test_stages_run_by_their_names(environment, tmp_path):
    python = environment.python
    assert "--dataset" in run(python, "-m", "trace.collect", "--help", cwd=tmp_path).stdout
    assert "fit" in run(python, "-m", "predictor.train", "--help", cwd=tmp_path).stdout


def test_packages_import_without_an_onnxruntime(environment, tmp_path):
    script = "import sys; sys.modules['onnxruntime'] = None; import " + ", ".join(PACKAGES)
    run(environment.python, "-c", script, cwd=tmp_path)


def test_the_standard_trace_module_keeps_its_api(environment, tmp_path):
    run(environment.python, "-c", USE_STANDARD_TRACE, cwd=tmp_path)


def test_the_standard_trace_command_counts_the_lines_of_a_script(environment, tmp_path):
    (tmp_path / "script.py").write_text("import sys\nprint(__name__, sys.argv[1:])\n")
    command = ("-m", "trace", "--count", "--summary", "--coverdir", tmp_path, "script.py", "-x")
    printed = run(environment.python, *command, cwd=tmp_path).stdout
    assert "__main__ ['-x']" in printed
    assert "lines   cov%   module" in printed


def test_the_standard_trace_command_reports_mistakes_as_before(environment, bare, tmp_path):
    ours = run(environment.python, "-m", "trace", "--report", cwd=tmp_path, fails=True)
    theirs = run(bare, "-m", "trace", "--report", cwd=tmp_path, fails=True)
    assert ours.stderr == theirs.stderr
    assert ours.returncode == theirs.returncode


def test_importing_trace_loads_no_library_of_ours(environment, tmp_path):
    loaded = "import sys, trace; print({'torch', 'numpy', 'routing'} & set(sys.modules))"
    assert run(environment.python, "-c", loaded, cwd=tmp_path).stdout == "set()\n"


def test_spawned_workers_find_the_packages(environment, tmp_path):
    (tmp_path / "script.py").write_text(SPAWN_WORKERS)
    run(environment.python, "script.py", cwd=tmp_path)


@pytest.mark.parametrize("options", [(), ("-P",)], ids=["python -m pytest", "pytest"])
def test_pytest_finds_the_packages(environment, options, tmp_path):
    (tmp_path / "test_it.py").write_text(f"FOLDER = {str(environment.folder)!r}\n" + TEST_FILE)
    command = (*options, "-m", "pytest", "-p", "no:cacheprovider", "test_it.py")
    assert "1 passed" in run(environment.python, *command, cwd=tmp_path).stdout


def test_notebooks_find_the_packages(environment, tmp_path):
    source = USE_STANDARD_TRACE + "import routing, sys\n"
    source += f"assert sys.executable == {str(environment.python)!r}, sys.executable\n"
    source += f"assert routing.__file__.startswith({str(environment.folder)!r}), routing.__file__"
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": None}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}}
    (tmp_path / "it.ipynb").write_text(
        json.dumps(notebook | {"cells": [cell | {"source": source}]})
    )
    command = ("-m", "pytest", "-p", "no:cacheprovider", "--nbmake", "it.ipynb")
    assert "1 passed" in run(environment.python, *command, cwd=tmp_path).stdout


def test_the_current_folder_comes_before_the_installed_packages(environment, tmp_path):
    (tmp_path / "runtime.py").touch()
    found = run(environment.python, "-c", "import runtime; print(runtime.__file__)", cwd=tmp_path)
    assert found.stdout == f"{tmp_path / 'runtime.py'}\n"


def test_no_module_is_importable_under_a_second_name(environment, tmp_path):
    for name in PACKAGES:
        result = run(
            environment.python, "-c", f"import expertflow.{name}", cwd=tmp_path, fails=True
        )
        assert "ModuleNotFoundError" in result.stderr


def test_a_plain_folder_of_the_wheel_is_activated_by_hand(wheel, bare, tmp_path):
    install(bare, "--target", tmp_path / "folder", wheel)
    activate = f"import sys; sys.path.append({str(tmp_path / 'folder')!r})\n"
    activate += "import expertflow; expertflow.activate(); expertflow.activate()\n"
    activate += "assert len(sys.path) == len(set(sys.path)), sys.path\n"
    printed = run(bare, "-c", activate + FIND_PACKAGES, cwd=tmp_path).stdout
    assert json.loads(printed) == [str(tmp_path / "folder" / "expertflow")]


def test_uninstalling_leaves_the_standard_trace_module(wheel, bare, tmp_path):
    install(bare, wheel)
    pip("uninstall", "--yes", "moe-expertflow", python=bare)
    where = run(bare, "-c", "import trace; print(trace.__file__)", cwd=tmp_path).stdout.strip()
    assert Path(where) == Path(sysconfig.get_path("stdlib")) / "trace.py"
    assert list(site_packages(bare.parent.parent).glob("*expertflow*")) == []
