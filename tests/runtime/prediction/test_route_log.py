"""runtime.load(record=): a trace of everything that ran, bounded, private and durable."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import runtime
from predictor.training.data import TraceData
from routing.inspect_model import topology_of
from routing.layers import find_moe_layers, read_routes
from routing.shards import GENERATED, PROMPT, Document, TraceReader, signed_experts
from runtime.prediction.route_log import RouteLog
from runtime.serving.request import Request
from tests.helpers.fake_cuda import fake_cuda, load_fake
from tests.helpers.onnx_predictor import write_predictor
from tests.helpers.serving import SMALL, prompts
from tests.helpers.tiny import PAD, save_tiny, tiny_model
from trace.inspect import inspect
from trace.settings import InspectSettings


def truth(model: nn.Module, tokens_T: np.ndarray) -> np.ndarray:
    """Routes [T, L, K] of a sequence in one forward pass of the model."""
    layers, found = find_moe_layers(model), []

    def keep(layer: Any) -> Any:
        return lambda _, args, kwargs: found.append(read_routes(layer, args, kwargs).experts_TK)

    hooks = [x.module.register_forward_pre_hook(keep(x), with_kwargs=True) for x in layers]
    with torch.no_grad():
        model(torch.from_numpy(tokens_T.astype(np.int64))[None])
    for hook in hooks:
        hook.remove()
    return torch.stack(found, 1).numpy()


def read(folder: Path) -> list[Document]:
    return list(TraceReader(folder, verify=True).documents())


def assert_true(document: Document, model: nn.Module, num_experts: int = 8) -> None:
    experts_TLK = signed_experts(document.experts_TLK, num_experts)
    want_TLK = truth(model, document.token_ids_T)
    assert np.array_equal(np.sort(experts_TLK, -1), np.sort(want_TLK, -1))


def generate(model: Any, ids: list[list[int]], **options: Any) -> torch.Tensor:
    """Greedy tokens after prompts that are padded at the left."""
    longest = max(map(len, ids))
    padded_BT = torch.tensor([[PAD] * (longest - len(row)) + row for row in ids])
    mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD} | options
    tokens: torch.Tensor = model.generate(padded_BT, attention_mask=mask_BT, **settings)
    return tokens


@pytest.mark.parametrize("kind", ["olmoe", "qwen3_moe"])
def test_generated_tokens_are_recorded_as_the_model_routes_them(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    ids = prompts(1, 3)
    engine = runtime.load(model, memory=0.5, record=tmp_path / "r").expertflow
    out_BT = generate(model, ids)
    generate(model, ids[:1])
    engine.detach()
    documents = read(tmp_path / "r")
    assert len(documents) == 4
    for row, document in enumerate(documents[:3]):
        ran = [*ids[row], *out_BT[row, -5:-1].tolist()]  # the last token never ran
        assert document.token_ids_T.tolist() == ran
        assert document.phase_T.tolist() == [PROMPT] * len(ids[row]) + [GENERATED] * 4
        assert_true(document, model)
    assert documents[3].token_ids_T.tolist() == documents[0].token_ids_T.tolist()


def test_nothing_is_recorded_after_a_sequence_has_ended(tmp_path: Path) -> None:
    model: Any = tiny_model("olmoe")
    ids = prompts(1, 2)
    first = generate(model, ids, eos_token_id=None)[0, -4].item()  # what row 0 says second
    model.generation_config.eos_token_id = first
    engine = runtime.load(model, memory=0.5, record=tmp_path / "r").expertflow
    out_BT = generate(model, ids)
    engine.detach()
    ended = read(tmp_path / "r")[0].token_ids_T.tolist()
    assert out_BT[0, -1] == PAD, "row 0 is over before row 1"
    assert ended[len(ids[0]) :].count(first) == 1
    assert ended[-1] == first


def test_captured_steps_are_recorded_as_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    ids = prompts(1, 3, longest=9)
    plain = runtime.load(tiny_model("olmoe"), memory=0.5, record=tmp_path / "plain")
    generate(plain, ids)
    plain.expertflow.detach()
    with fake_cuda(monkeypatch):
        model: Any = tiny_model("olmoe")
        predictor = write_predictor(tmp_path / "predictor.onnx", topology_of(model))
        load_fake(model, predictor, memory=0.75, batch=4, record=tmp_path / "captured")
        generate(model, ids)
        assert model.expertflow.decode_path == "graph"
        model.expertflow.detach()
    for ours, theirs in zip(read(tmp_path / "captured"), read(tmp_path / "plain"), strict=True):
        assert ours.token_ids_T.tolist() == theirs.token_ids_T.tolist()
        assert ours.phase_T.tolist() == theirs.phase_T.tolist()
        assert np.array_equal(np.sort(ours.experts_TLK, -1), np.sort(theirs.experts_TLK, -1))


@pytest.mark.parametrize("predicts", [False, True])
def test_served_sequences_are_recorded(predicts: bool, tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    ids = prompts(2, 6)
    predictor = write_predictor(tmp_path / "p.onnx", topology_of(model)) if predicts else None
    engine = runtime.load(model, predictor, memory=0.5, record=tmp_path / "r").expertflow
    asked = [Request(prompt=p, max_tokens=4, ignore_eos=True) for p in ids]
    results = {r.id: r for r in engine.serve(asked, **SMALL)}
    engine.detach()
    ran = sorted([*r.prompt, *results[r.id].token_ids[:-1]] for r in asked)
    documents = read(tmp_path / "r")
    assert sorted(document.token_ids_T.tolist() for document in documents) == ran
    for document in documents:
        assert_true(document, model)


def test_a_recording_continues_in_the_next_run_and_survives_an_exit(tmp_path: Path) -> None:
    program = (
        "import sys, torch, runtime\n"
        "model = runtime.load(sys.argv[1], memory=0.5, record=sys.argv[2], device='cpu')\n"
        "model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)\n"
    )
    folder = save_tiny(tmp_path / "model", "olmoe")
    command = [sys.executable, "-c", program, str(folder), str(tmp_path / "r")]
    for count in (1, 2):
        subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[3])
        assert len(read(tmp_path / "r")) == count


def test_a_recording_is_a_trace_to_inspect_and_to_train_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("olmoe")
    engine = runtime.load(model, memory=0.5, record=tmp_path / "r").expertflow
    generate(model, prompts(1, 5, longest=40), max_new_tokens=40, eos_token_id=None)
    engine.detach()
    inspect(InspectSettings(directory=str(tmp_path / "r")))
    assert "recorded" in capsys.readouterr().out
    data = TraceData(trace=[str(tmp_path / "r")], val_fraction=0.2, test_fraction=0.2)
    data.setup("fit")
    assert next(iter(data.train_dataloader())) is not None


def test_only_the_owner_may_read_a_recording(tmp_path: Path) -> None:
    RouteLog(tmp_path / "r", topology_of(tiny_model("olmoe"))).close()
    assert (tmp_path / "r").stat().st_mode & 0o077 == 0


def test_a_recording_ends_at_its_limit_and_generation_goes_on(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    engine = runtime.load(model, memory=0.5, record=tmp_path / "r", record_limit="4KB").expertflow

    def fill() -> torch.Tensor:
        return [generate(model, prompts(1, 1, longest=40)) for _ in range(40)][-1]

    with pytest.warns(UserWarning, match="limit of 4,000 bytes") as caught:
        want = fill()
    assert len(caught) == 1
    engine.detach()
    assert torch.equal(generate(model, prompts(1, 1, longest=40)), want)
    documents = read(tmp_path / "r")
    assert 0 < sum(5 * len(d.token_ids_T) + d.experts_TLK.nbytes for d in documents) <= 4000


def test_a_full_disk_ends_the_recording_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("olmoe")
    engine = runtime.load(model, memory=0.5, record=tmp_path / "r").expertflow
    generate(model, prompts(1, 1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("routing.writer.write_atomically", full)
    with pytest.warns(UserWarning, match="No space left"):
        engine.detach()


def test_sequences_without_their_start_are_left_out(tmp_path: Path) -> None:
    route_log = RouteLog(tmp_path / "r", topology_of(tiny_model("olmoe")))
    routes_BTLK = np.zeros((1, 3, 4, 2), np.int64)
    tokens_BT = np.arange(3)[None]
    route_log.extend(tokens_BT, tokens_BT, 7, routes_BTLK)
    route_log.extend(tokens_BT, tokens_BT, 0, routes_BTLK)
    route_log.extend(tokens_BT, tokens_BT, 4, routes_BTLK)  # a token is missing in between
    route_log.close()
    assert [d.token_ids_T.tolist() for d in read(tmp_path / "r")] == [[0, 1, 2]]


@pytest.mark.parametrize("limit", ["much", 0.5, 0, "-3MB", True])
def test_a_limit_is_a_size(limit: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"record_limit=.*is no size"):
        runtime.load(tiny_model("olmoe"), record=tmp_path / "r", record_limit=limit)


def test_unsupported_models_and_foreign_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="decoder-only"):
        runtime.load(tiny_model("switch_transformers"), record=tmp_path / "r")
    other = runtime.load(tiny_model("mixtral"), record=tmp_path / "other")
    generate(other, prompts(1, 1))
    other.expertflow.detach()
    with pytest.raises(ValueError, match="not empty and holds no trace"):
        runtime.load(tiny_model("olmoe"), record=tmp_path)
    with pytest.raises(ValueError, match=r"the trace in .*other"):
        runtime.load(tiny_model("olmoe"), record=tmp_path / "other")
