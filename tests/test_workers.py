"""Work over Ray actors, on a Ray of two local workers: the same results as in one process."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from routing.shards import TraceReader
from routing.writer import TraceWriter
from runtime.batch.command import EXIT_ROWS_FAILED, main
from runtime.server.settings import ServerSettings
from runtime.serving.batch.journal import Journal
from runtime.serving.batch.ray_workers import Crew
from runtime.serving.batch.settings import BatchSettings
from tests.helpers.serving import greedy
from tests.helpers.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.helpers.tracing import assert_same_documents, trace

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")

Directory = Callable[[str], Path]
ROWS = [{"prompt": f"row {i} " * (i % 3 + 1), "max_tokens": 3 + i % 4} for i in range(10)]


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def batch(tiny_directory: Directory, tmp_path: Path) -> Callable[..., bytes]:
    """`batch(workers)` runs the command and returns what it wrote."""
    dataset = tmp_path / "rows.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"no": "prompt"}]))

    def start(workers: int, out: str = "", **options: Any) -> bytes:
        path = tmp_path / (out or f"{workers}.jsonl")
        small: dict[str, Any] = {"memory": "0.5", "context": 64, "batch": 2, "rows": 4}
        settings = BatchSettings(
            model=str(tiny_directory("olmoe")),
            dataset=str(dataset),
            out=path,
            workers=workers,
            **(small | options),
        )
        with pytest.raises(SystemExit) as ended:  # a row has failed
            main(settings)
        assert ended.value.code == EXIT_ROWS_FAILED
        return path.read_bytes()

    return start


def test_a_batch_over_workers_writes_what_one_process_writes(
    batch: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert batch(2) == batch(0)
    said = capsys.readouterr().err
    assert "row 10 (line 11): the row has neither a prompt" in said
    assert said.count("hit rate") >= 3  # a line for each engine


def test_what_is_in_the_partial_file_is_not_asked_of_a_worker_again(
    batch: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Journal, index: int, line: dict[str, Any], *, failed: bool) -> None:
        if len(self.done) == 4:
            raise KeyboardInterrupt
        add(self, index, line, failed=failed)

    add = Journal.add
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            batch(0, out="1.jsonl")
    assert batch(1) == batch(0)  # Journal.add asserts that no index comes twice


def test_what_a_dead_worker_held_goes_to_the_one_in_its_place(
    batch: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve(self: Crew, requests: Any) -> Any:
        for number, served in enumerate(serve_all(self, requests)):
            if number == 1:
                ray.kill(self._workers[0], no_restart=False)
            yield served

    serve_all = Crew.serve
    monkeypatch.setattr(Crew, "serve", serve)
    assert batch(1, lookahead=3) == batch(0)


def test_what_a_worker_raises_is_raised_here(batch: Callable[..., bytes]) -> None:
    with pytest.raises(ValueError, match="memory"):
        batch(1, memory="nonsense")


def test_more_workers_than_cores_are_refused(batch: Callable[..., bytes]) -> None:
    with pytest.raises(ValueError, match="3 workers of 1 CPUs each need more than the 2 CPUs"):
        batch(3)


def test_a_trace_over_workers_is_the_trace_of_one_process(
    tiny_directory: Directory, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"batch_tokens": 64, "shard_tokens": 100, "generate": 4, "seed": 3}
    model = tiny_directory("olmoe")
    trace(model, data, tmp_path / "alone", sample=True, **options)

    def interrupted(self: TraceWriter, documents: Any) -> None:
        if self.num_documents >= 4:
            raise KeyboardInterrupt
        add(self, documents)

    add = TraceWriter.add
    with monkeypatch.context() as patched:
        patched.setattr(TraceWriter, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trace(model, data, tmp_path / "spread", sample=True, **options)
    trace(model, data, tmp_path / "spread", sample=True, workers=2, **options)
    alone, spread = (TraceReader(tmp_path / name, verify=True) for name in ("alone", "spread"))
    assert_same_documents([*spread.documents()], [*alone.documents()])
    assert manifest(tmp_path / "spread") == manifest(tmp_path / "alone")


def manifest(directory: Path) -> Any:
    """Without the checksums: safetensors writes a file's metadata in any order."""
    read = json.loads((directory / "manifest.json").read_text())
    for shard in read["shards"]["decoder"]:
        del shard["sha256"]
    return read


def test_replicas_answer_as_the_model_alone(tmp_path: Path) -> None:
    from ray import serve

    from runtime.server.replicas import start

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    model = save_tiny(tmp_path / "tiny", "olmoe")
    start(ServerSettings(model=str(model), port=port, context=64, replicas=2), blocking=False)
    try:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
            asked: dict[str, Any] = {"model": "tiny", "max_tokens": 5, "temperature": 0}
            for prompt in ("abc", "hello", "q", "zz"):
                tokens = greedy(tiny_model("olmoe"), tiny_tokenizer()(prompt).input_ids, 5)
                text = tiny_tokenizer().decode(list(tokens), skip_special_tokens=True)
                whole = client.completions.create(prompt=prompt, **asked)
                assert whole.choices[0].text == text
                pieces = client.completions.create(prompt=prompt, stream=True, **asked)
                assert "".join(c.text for piece in pieces for c in piece.choices) == text
    finally:
        serve.shutdown()
