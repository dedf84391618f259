"""Configurations and tokenizers: a repository's own code is never run, and nobody is asked."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import transformers

import runtime
from routing import pretrained
from routing.pretrained import model_class, read_config, read_tokenizer, supported_transformers
from runtime.plan import plan
from runtime.prepare import prepare
from tests.helpers.breaking import Panic
from tests.helpers.tiny import save_tiny
from tests.test_architecture import trees
from trace.models import load_model
from trace.settings import CollectSettings

CODE = "raise SystemExit('the code of the repository ran')\n"


@pytest.fixture
def no_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: Any) -> str:
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", ask)


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A model of an unknown type that brings code."""
    directory = save_tiny(tmp_path / "foreign", "olmoe")
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change(directory / "config.json", model_type="no_such_type", auto_map=auto_map)
    (directory / "own.py").write_text(CODE)
    return directory


Use = Callable[[Path], object]
USES: dict[str, Use] = {
    "load": runtime.load,
    "plan": plan,
    "prepare": lambda path: prepare(path, path.parent / "prepared"),
    "trace": lambda path: load_model(CollectSettings(model=str(path), dataset=["x"], out="x")),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.usefixtures("no_questions")
def test_a_model_type_that_brings_code_is_refused_without_a_question(
    use: str, foreign: Path
) -> None:
    with pytest.raises(ValueError, match=r"no_such_type.*never run") as caught:
        USES[use](foreign)
    assert "trust_remote_code" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_questions")
def test_a_known_model_type_is_loaded_by_the_librarys_code_beside_code(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "olmoe")
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change(directory / "config.json", auto_map=auto_map)
    (directory / "own.py").write_text(CODE)
    (directory / "custom_generate").mkdir()
    (directory / "custom_generate" / "generate.py").write_text(CODE)
    model: Any = runtime.load(directory)
    assert type(model) is transformers.OlmoeForCausalLM


@pytest.mark.parametrize("error", [Exception("no such type"), Panic("range end index 6")], ids=repr)
def test_a_damaged_tokenizer_is_refused_even_where_its_library_panics(
    error: BaseException, tmp_path: Path
) -> None:
    with (
        patch("transformers.AutoTokenizer.from_pretrained", side_effect=error),
        pytest.raises(ValueError, match=f"tokenizer in {tmp_path} cannot be used: {error}"),
    ):
        read_tokenizer(tmp_path)


@pytest.mark.usefixtures("no_questions")
def test_a_tokenizer_that_is_code_is_not_run(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "olmoe")
    own = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}, "tokenizer_class": "Own"}
    change(directory / "tokenizer_config.json", **own)
    (directory / "own.py").write_text(CODE)
    with suppress(ValueError):  # where the library has no tokenizer of its own for it
        assert "Own" not in type(read_tokenizer(directory)).__name__


def test_every_auto_class_is_told_to_run_no_code() -> None:
    trusting = [
        f"{module}:{call.lineno}"
        for module, tree in trees().items()
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "from_pretrained"
        and "Auto" in ast.unparse(call.func.value)
        and "trust_remote_code=False" not in ast.unparse(call)
    ]
    assert trusting == []


# ---------------------------------------------------------------------- error texts


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"), ("[]", "no JSON object"), ("3", "no JSON object"), ("{", "not JSON"),
        ("\ufeff{}", "not JSON"), ("{}", "no model_type"), ('{"model_type": 3}', "no model type 3"),
    ],
)  # fmt: skip
def test_what_is_no_configuration_is_refused_by_its_name(
    text: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=reason) as caught:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_newer_architecture_is_answered_within_the_supported_releases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(version: str | None) -> str:
        fields = {"model_type": "tomorrow", "transformers_version": version}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        with pytest.raises(ValueError, match="no model type 'tomorrow'") as caught:
            read_config(tmp_path)
        return str(caught.value)

    assert "transformers" in supported_transformers()
    needed = "transformers>=5.17,<5.24"
    monkeypatch.setattr(pretrained, "supported_transformers", lambda: needed)
    assert f"works with {needed}: it takes a later release" in said("5.24.0")
    assert "pip install 'transformers==5.23.99'" in said("5.23.99")
    assert f"pip install -U '{needed}'" in said(None) and f"'{needed}'" in said("5.1")
    assert "upgrade transformers" not in said(None) + said("6.0.0")


def test_a_configuration_without_architectures_is_told_the_line_to_add(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "olmoe")
    change(directory / "config.json", architectures=None)
    with pytest.raises(ValueError, match=r'add "architectures": \["OlmoeForCausalLM"\]'):
        runtime.load(directory)


@pytest.mark.parametrize("name", ["Trainer", "AutoTokenizer", "pipeline", "NoSuchModel"])
def test_an_architecture_that_is_no_model_class_is_refused(name: str, tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "olmoe")
    change(directory / "config.json", architectures=[name])
    with pytest.raises(ValueError, match=f"has no architecture {name}"):
        runtime.load(directory)


def test_an_architecture_of_another_model_type_is_refused(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "olmoe")
    change(directory / "config.json", architectures=["MixtralForCausalLM"])
    with pytest.raises(ValueError, match="belongs to model_type 'mixtral', but model_type is 'ol"):
        model_class(read_config(directory))
