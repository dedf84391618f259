"""trace.collect: interruptions, refusals and broken inputs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from routing.cli import run
from routing.shards import MANIFEST, PROMPT, TraceReader, read_manifest
from routing.writer import TraceWriter
from tests.helpers.tiny import tiny_tokenizer
from tests.helpers.tracing import Directory, assert_same_documents, decode, trace, write_texts
from trace.collect import collect
from trace.settings import CollectSettings
from trace.sources import SEPARATOR

ROOT = Path(__file__).parents[2]


def test_an_interrupted_trace_resumes_without_losing_a_document(
    tiny_directory: Directory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    texts = [f"{'word ' * (n % 13)}{n}" for n in range(500)]
    data = write_texts(tmp_path / "words.txt", texts)
    options = {"generate": 4, "batch_tokens": 128, "shard_tokens": 1000, "weights": True}
    model, out = tiny_directory("olmoe"), tmp_path / "killed"
    words = {"model": model, "dataset": data, "out": out} | options | {"weights": "true"}
    command = [sys.executable, "-m", "trace.collect"]
    command += [word for name, value in words.items() for word in (f"--{name}", str(value))]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_for_a_shard(out, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(TraceReader(out, verify=True))
    assert 0 < done < len(texts)
    resumed = trace(model, data, out, **options)
    assert [decode(d.token_ids_T[d.phase_T == PROMPT]) for d in resumed] == texts
    assert f"after {done} documents" in capsys.readouterr().out
    assert_same_documents(resumed, trace(model, data, tmp_path / "whole", **options))


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def wait_for_a_shard(out: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not ((out / MANIFEST).exists() and read_manifest(out)["num_documents"]):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_complete_trace_is_left_alone(
    tiny_directory: Directory, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace(tiny_directory("olmoe"), data, tmp_path / "out")
    before = contents(tmp_path / "out")
    trace(tiny_directory("olmoe"), data, tmp_path / "out")
    assert "already complete: 12 documents" in capsys.readouterr().out
    assert contents(tmp_path / "out") == before


def contents(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in directory.iterdir()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "mixtral"}, "olmoe .* but this model is for mixtral"),
        ({"max_tokens": 99}, "max_tokens: 2048 there, 99 here"),
        ({"weights": True}, "with_weights"),
    ],
)
def test_a_trace_of_something_else_is_not_appended_to(
    change: dict[str, Any], message: str, tiny_directory: Directory, data: Path, tmp_path: Path
) -> None:
    trace(tiny_directory("olmoe"), data, tmp_path / "out")
    before = contents(tmp_path / "out")
    options = {"model": "olmoe"} | change
    with pytest.raises(ValueError, match=message):
        trace(tiny_directory(options.pop("model")), data, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == before


def interrupted(model: Path, data: Path, out: Path, **options: Any) -> None:
    """A trace whose second shard was never written."""
    write = TraceWriter.flush

    def flush(writer: TraceWriter) -> None:
        if writer.num_documents:
            raise KeyboardInterrupt
        write(writer)

    with patch.object(TraceWriter, "flush", flush), pytest.raises(KeyboardInterrupt):
        trace(model, data, out, **options)


@pytest.mark.parametrize("kind", ["olmoe", "switch_transformers"])
def test_a_trace_is_not_resumed_with_data_sets_that_have_changed(
    kind: str, tiny_directory: Directory, tmp_path: Path
) -> None:
    texts = [f"text number {n}" for n in range(30)]
    data = write_texts(tmp_path / "texts.txt", texts)
    options = {"batch_tokens": 64, "shard_tokens": 100, "generate": 2}
    model, out = tiny_directory(kind), tmp_path / "out"
    interrupted(model, data, out, **options)
    write_texts(data, ["another first text", *texts[1:]])
    with pytest.raises(ValueError, match=r"data sets have changed since .* its document 0"):
        trace(model, data, out, **options)
    write_texts(data, texts)
    resumed = trace(model, data, out, **options)
    assert_same_documents(resumed, trace(model, data, tmp_path / "whole", **options))
    shards = [
        [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]
        for folder in (out, tmp_path / "whole")
    ]
    assert shards[0] == shards[1], "a resumed trace has the bytes of an uninterrupted one"


def test_a_chat_without_a_template_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text('{"conversations": [{"from": "human", "value": "hi"}]}')
    with pytest.raises(ValueError, match="its rows are chats, not text; give --chat_template true"):
        trace(tmp_path / "no-model", tmp_path / "chat.jsonl", tmp_path / "out")


def test_empty_and_repeated_documents_are_counted_in_the_end(
    tiny_directory: Directory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_texts(tmp_path / "texts.txt", ["one", " ", "one", "two"])
    assert len(trace(tiny_directory("olmoe"), data, tmp_path / "out")) == 3
    printed = capsys.readouterr().out
    assert "documents without any text, left out: 1" in printed
    assert "documents that repeat an earlier one token by token, traced all the same: 1" in printed


def test_nan_in_router_weights_names_layer_and_document_and_keeps_the_shards(
    tiny_directory: Directory, tmp_path: Path
) -> None:
    texts = [f"plain text {n}" for n in range(60)]
    texts[40] = "here is a Z"
    model = AutoModelForCausalLM.from_pretrained(tiny_directory("olmoe"))
    token = tiny_tokenizer().convert_tokens_to_ids("Z")
    model.model.embed_tokens.weight.data[token] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    data = write_texts(tmp_path / "texts.txt", texts)
    options = {"batch_tokens": 16, "shard_tokens": 64}
    with pytest.raises(ValueError, match=r"NaN in model.layers.0.mlp.experts, in document 40"):
        trace(tmp_path / "broken", data, tmp_path / "out", **options)
    kept = list(TraceReader(tmp_path / "out", verify=True).documents())
    whole = trace(tiny_directory("olmoe"), data, tmp_path / "whole", **options)
    assert 0 < len(kept) <= 40
    assert_same_documents(kept, whole[: len(kept)])


def test_a_model_without_experts_is_refused(data: Path, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no MoE layers"):
        trace(tmp_path / "dense", data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_encoder_decoder_model_needs_generate(
    tiny_directory: Directory, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="give --generate N"):
        trace(tiny_directory("switch_transformers"), data, tmp_path / "out")


def test_a_mistake_on_the_command_line_is_one_line(
    tiny_directory: Directory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text(f"\n{SEPARATOR}\n  \n")
    argv = ["--model", str(tiny_directory("olmoe")), "--out", str(tmp_path / "out")]
    argv += ["--dataset", str(tmp_path / "empty.txt"), "--max_tokens", "9"]
    with pytest.raises(SystemExit) as exit_:
        run(collect, CollectSettings, argv, prog="collect")
    assert exit_.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("collect: error:")
    assert line.endswith("empty.txt: no document with any text")
    assert not (tmp_path / "out").exists()
