"""A model on the Hub: judged by its small files before its weights are fetched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

import runtime
from runtime.plan import plan
from runtime.prepare import prepare
from runtime.weights.files import read_header
from tests.helpers.quantised import write_quantised
from tests.helpers.tiny import save_tiny

NAME = "somebody/some-model"
UNWANTED = [
    "original/model.safetensors", "original/params.json", "metal/model.bin", "README.md",
    "consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin",
]  # fmt: skip


class FakeHub:
    """A hub with one repository, that keeps what was fetched from it."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache = repository, cache
        self.fetched: list[str] = []
        self.options: list[dict[str, Any]] = []

    def snapshot_download(
        self, name: str, *, allow_patterns: Any, ignore_patterns: Any, **options: Any
    ) -> str:
        assert name == NAME
        files = [str(f.relative_to(self.repository)) for f in self.repository.rglob("*")]
        for file in filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            if (self.repository / file).is_file():
                (self.cache / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.repository / file, self.cache / file)
                self.fetched.append(file)
        self.options.append(options)
        return str(self.cache)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    repository = save_tiny(tmp_path / "repository", "olmoe")
    for name in UNWANTED:
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("{}")
    fake = FakeHub(repository, tmp_path / "cache" / ("a" * 40))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def weights(fetched: list[str]) -> list[str]:
    return [name for name in fetched if not name.endswith((".json", ".txt", ".jinja"))]


def test_only_the_weights_that_are_needed_are_fetched(hub: FakeHub) -> None:
    runtime.load(NAME)
    assert weights(hub.fetched) == ["model.safetensors"]
    assert not set(hub.fetched) & set(UNWANTED)


def test_the_shards_are_those_of_the_index(hub: FakeHub) -> None:
    from tests.helpers.tiny import tiny_model

    (hub.repository / "model.safetensors").unlink()
    tiny_model("olmoe").save_pretrained(hub.repository, max_shard_size="60KB")  # type: ignore[operator]
    (hub.repository / "model-00001-of-00099.safetensors").write_text("of another conversion")
    runtime.load(NAME)
    index = json.loads((hub.repository / "model.safetensors.index.json").read_text())
    assert set(weights(hub.fetched)) == set(index["weight_map"].values())


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization_config": {"quant_method": "aqlm"}}, {"model_type": "tomorrow"},
        {"architectures": None}, {"architectures": ["Tomorrow"]},
    ],
)  # fmt: skip
def test_what_is_refused_is_refused_before_its_weights_are_fetched(
    fields: dict[str, Any], hub: FakeHub, tmp_path: Path
) -> None:
    path = hub.repository / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    for use in (runtime.load, lambda name: prepare(name, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"."):
            use(NAME)
    assert weights(hub.fetched) == []


def test_a_predictor_of_another_model_is_refused_before_weights_are_fetched(
    hub: FakeHub, tiny_predictor: Any
) -> None:
    with pytest.raises(ValueError, match=r"the model is for olmoe.*but the predictor"):
        runtime.load(NAME, tiny_predictor("mixtral"))
    assert weights(hub.fetched) == []


def test_revision_token_and_cache_are_passed_on_and_the_commit_is_kept(hub: FakeHub) -> None:
    runtime.load(NAME, revision="v1", token="secret", cache_dir="/cache")
    small, large = hub.options
    assert small == {"revision": "v1", "token": "secret", "cache_dir": "/cache"}
    assert large == small | {"revision": "a" * 40}


def test_the_attention_is_passed_on(tiny_directory: Any) -> None:
    model: Any = runtime.load(tiny_directory("olmoe"), attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_attention_that_is_code_on_the_hub_is_refused(tiny_directory: Any) -> None:
    with pytest.raises(ValueError, match="names code on the hub, which is never run"):
        runtime.load(tiny_directory("olmoe"), attn_implementation="kernels-community/flash-attn2")


def test_options_of_the_hub_are_refused_for_a_model_in_memory() -> None:
    from tests.helpers.tiny import tiny_model

    with pytest.raises(ValueError, match="revision=, attn_implementation=: the model is in memory"):
        runtime.load(tiny_model("olmoe"), revision="v1", attn_implementation="eager")


@pytest.mark.parametrize("path", ["models/org/name", "~/nowhere", "../nowhere", Path("a/b")])
def test_a_mistyped_path_is_not_looked_up(path: Any, hub: FakeHub) -> None:
    with pytest.raises(ValueError, match="there is no model directory"):
        runtime.load(path)
    assert hub.options == []


def error_of(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "said\nby the library")
    return error


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("GatedRepoError", "accept its terms at https://huggingface.co/somebody/some-model"),
        ("RepositoryNotFoundError", "look at its spelling; a private one needs token="),
        ("RevisionNotFoundError", "has no revision 'v9'"),
        ("LocalEntryNotFoundError", "not all of it is in the cache"),
        ("OfflineModeIsEnabled", "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_model_that_the_hub_does_not_hand_out_is_refused_with_the_remedy(
    kind: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise error_of(getattr(huggingface_hub.errors, kind))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=NAME) as caught:
        runtime.load(NAME, revision="v9")
    assert remedy in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------------- directories


def said_of(directory: Path) -> str:
    with pytest.raises(ValueError, match=str(directory)) as caught:
        runtime.load(directory)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.gguf", "is a GGUF file"), ("pytorch_model.bin", "is pickled"),
        ("model.fp16.safetensors", "is a variant"), ("consolidated.00.pth", "publisher's own"),
        ("model-00001-of-00002.safetensors", "its index may be missing"),
    ],
)  # fmt: skip
def test_a_directory_of_other_weights_is_told_what_it_holds(
    name: str, reason: str, tmp_path: Path
) -> None:
    directory = save_tiny(tmp_path, "olmoe")
    (directory / "model.safetensors").rename(directory / name)
    assert f"{name} {reason}" in said_of(directory) or reason in said_of(directory)
    (directory / "config.json").unlink()
    assert "it has no config.json" in said_of(directory)


def test_directories_without_a_model_are_told_apart(tmp_path: Path) -> None:
    assert "it is empty" in said_of(tmp_path)
    save_tiny(tmp_path / "checkpoint-10", "olmoe")
    assert "checkpoint-10/ in it has one" in said_of(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is an adapter and no model" in said_of(tmp_path)


def test_quantisation_described_in_a_file_of_its_own_is_refused(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "olmoe")
    (directory / "hf_quant_config.json").write_text("{}")
    assert "is quantised (modelopt), as its configuration says, but none of" in said_of(directory)


def test_a_gguf_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "model.gguf is a GGUF file: only safetensors" in said_of(tmp_path / "model.gguf")


def test_generation_settings_that_cannot_be_used_are_refused_by_name(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "olmoe")
    (directory / "generation_config.json").write_text("{")
    assert "generation_config.json cannot be used" in said_of(directory)


def test_a_plan_of_quantised_weights_reads_their_headers_only(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = save_tiny(tmp_path / "plain", "olmoe")
    coded = write_quantised(plain, tmp_path / "coded", "fp8 one scale")
    shutil.copytree(coded, hub.repository, dirs_exist_ok=True)
    asked: list[dict[str, Any]] = []

    def headers(name: str, **options: Any) -> Any:
        asked.append(options)
        path = hub.repository / "model.safetensors"
        tensors = {
            key: SimpleNamespace(dtype=e.dtype, shape=list(e.shape), data_offsets=(e.start, e.stop))
            for key, e in read_header(path).items()
        }
        return SimpleNamespace(files_metadata={path.name: SimpleNamespace(tensors=tensors)})

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", headers)
    assert plan(NAME, token="secret").stored_bytes == plan(coded).stored_bytes
    assert asked == [{"token": "secret", "revision": "a" * 40}]
    assert weights(hub.fetched) == []
    monkeypatch.delattr(huggingface_hub, "get_safetensors_metadata")
    found = plan(NAME)
    assert found.stored_bytes == found.expert_bytes == plan(plain).expert_bytes
