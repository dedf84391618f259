"""benchmarks.serving: every request replays its own record, whatever runs beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import runtime
from benchmarks.replay.recorded_requests import Recorded, recorded_requests
from benchmarks.replay.row_replay import ReplayingRunner, RowReplay
from benchmarks.serving import agreement
from benchmarks.serving.arm import ServingArm
from routing.shards import TraceReader, signed_experts
from routing.writer import TraceWriter
from runtime.engine.engine import Engine
from runtime.serving.model_runner import CapturedRunner
from runtime.serving.request import Logprob, Request, Result
from runtime.serving.serving_loop import ServingLoop
from runtime.serving.settings import ServeSettings
from tests.helpers.fake_cuda import fake_cuda, load_fake
from tests.helpers.tiny import tiny_model
from tests.routing.test_shards import PROVENANCE, a_document, a_topology

SMALL: dict[str, Any] = {"batch": 2, "rows": 3, "context": 24, "chunk": 7, "scheduler": "fifo"}


def workload(count: int) -> tuple[list[Request], dict[str, Recorded]]:
    random, requests, recorded = np.random.default_rng(4), [], {}
    for number in range(count):
        tokens_T = random.integers(2, 256, 9 + number)
        experts_TLK = np.argsort(random.random((len(tokens_T), 4, 8)))[..., :2].astype(np.int16)
        recorded[str(number)] = Recorded(tokens_T, experts_TLK)
        prompt = tokens_T[:6].tolist()
        requests.append(
            Request(id=str(number), prompt=prompt, ignore_eos=True, max_tokens=len(tokens_T) - 6)
        )
    return requests, recorded


def assert_replayed(engine: Engine, replay: RowReplay, folder: Path) -> None:
    requests, recorded = workload(4)
    with replay.installed():
        loop: Any = ServingLoop(engine, None, ServeSettings(**SMALL))
        replay.cache, loop._runner = loop._cache, ReplayingRunner(loop._runner, replay)
        for request in requests:
            loop.submit(request)
        results = []
        while not loop.is_idle:
            results += loop.step()
    engine.detach()
    for result in results:
        assert result.token_ids == tuple(recorded[result.id].token_ids_T[6:].tolist())
    ran = {len(d.token_ids_T): d for d in TraceReader(folder).documents()}
    for said, experts_TLK in recorded.values():
        document = ran[len(said) - 1]  # the last token never runs
        assert np.array_equal(document.token_ids_T, said[:-1])
        assert np.array_equal(signed_experts(document.experts_TLK, 8), experts_TLK[:-1])


def test_requests_are_replayed_on_the_generic_path(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    replay = RowReplay(model, workload(4)[1], 3, torch.device("cpu"))
    engine = runtime.load(model, memory=0.5, record=tmp_path / "r").expertflow
    assert_replayed(engine, replay, tmp_path / "r")


def test_requests_are_replayed_in_captured_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    with fake_cuda(monkeypatch):
        model = tiny_model("olmoe")
        replay = RowReplay(model, workload(4)[1], 3, torch.device("cpu"))
        engine = load_fake(model, memory=0.5, batch=3, record=tmp_path / "r").expertflow
        assert isinstance(ServingLoop(engine, None, ServeSettings(**SMALL))._runner, CapturedRunner)
        assert_replayed(engine, replay, tmp_path / "r")


def test_requests_are_cut_out_of_a_trace_once_each(tmp_path: Path) -> None:
    topology = a_topology()
    with TraceWriter(tmp_path / "t", topology, provenance=PROVENANCE) as writer:
        for length in (5, 12, 30):
            writer.add({"decoder": a_document(length, length)})
    sizes: dict[str, Any] = {"prompt_tokens": [2, 6], "output_tokens": [1, 4], "seed": 0}
    requests, recorded = recorded_requests(tmp_path / "t", 4, **sizes)
    assert sorted(request.id for request in requests) == ["0", "1", "2", "3"]
    for request in requests:
        said = recorded[request.id].token_ids_T.tolist()
        assert request.prompt == said[: len(request.prompt)]
        assert len(request.prompt) + request.max_tokens == len(said)
    with pytest.raises(ValueError, match="4 passages of 10 tokens, not 5"):
        recorded_requests(tmp_path / "t", 5, **sizes)


def test_an_arm_names_its_scheduler_and_options() -> None:
    arm = ServingArm.parse("predicted,policy=lru,extra=0.01,rows=8")
    assert arm[1:] == ("predicted", "lru", 0.01, {"rows": 8})


def result(tokens: Sequence[int], gap: float = 0.5) -> Result:
    logprobs = tuple(Logprob(t, -1.0, ((t, -1.0), (t + 1, -1.0 - gap))) for t in tokens)
    return Result(
        id="a", text="", token_ids=tuple(tokens), num_prompt=1, finish="length", logprobs=logprobs
    )


def test_requests_that_differ_are_counted_with_the_margin_of_the_choice() -> None:
    alone = [result([1, 2, 3, 4]), result([5, 6, 7, 8], gap=0.25)]
    told = agreement.compare(alone, [result([1, 2, 3, 4]), result([5, 9, 7, 8])])
    assert told == {
        "requests": 2, "same": 0.5, "same_tokens": 5 / 8, "differ_at": [1], "margins": [0.25],
    }  # fmt: skip


def test_agreement_serves_the_embedded_model_alone_and_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exports = Path(__file__).parents[2] / "exports"
    out = tmp_path / "agreement.json"
    agreement.main(
        agreement.AgreementSettings(
            model=exports / "moe-8x32",
            text=exports / "sample",
            schedulers=["fifo"],
            requests=6,
            alone=4,
            output_tokens=[3, 5],
            dtype="float32",
            device="cpu",
            batch=3,
            rows=4,
            out=out,
        )
    )
    row = json.loads(out.read_text())["rows"][0]
    assert (row["requests"], row["same"]) == (4, 1.0)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == [row]
