"""benchmarks.replay: the text and the routes that every arm is given."""

from __future__ import annotations

import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.replay.passages import EvenText, Passages, RandomText, TracedText, passage_calls
from benchmarks.replay.relabel_predictor import relabel_predictor
from benchmarks.replay.text_replay import CHOSEN_LOGIT, TextReplay
from benchmarks.replay.trace_slice import SliceSettings
from benchmarks.replay.trace_slice import main as cut
from benchmarks.systems.clock import Clock, Enough, LogitsRecorder
from benchmarks.systems.workload import Workload
from routing.inspect_model import topology_of
from routing.layers import find_moe_layers, read_routes
from routing.predictor_file.reader import open_predictor
from routing.shards import Document, TraceReader
from routing.writer import TraceWriter
from tests.helpers.onnx_predictor import write_predictor
from tests.helpers.tiny import KINDS, VOCAB_SIZE, tiny_model

CPU = torch.device("cpu")


def write_trace(directory: Path, model: nn.Module, lengths: list[int]) -> Path:
    """A trace of random tokens and random distinct experts, labels a and b in turn."""
    topology, generator = topology_of(model), np.random.default_rng(0)
    stack = topology.stack()
    with TraceWriter(directory, topology, provenance={"seed": 0}) as writer:
        for index, length in enumerate(lengths):
            order = generator.random((length, stack.num_layers, stack.num_experts)).argsort(-1)
            document = Document(
                generator.integers(VOCAB_SIZE, size=length).astype(np.int32),
                order[..., : stack.top_k].astype(np.uint8),
                np.zeros(length, np.uint8),
                "ab"[index % 2],
            )
            writer.add({"decoder": document})
    return directory


def traced(tmp_path: Path, model: nn.Module, lengths: list[int]) -> TracedText:
    path = write_trace(tmp_path / "trace", model, lengths)
    return TracedText(path, topology_of(model).stack(), VOCAB_SIZE)


def run_in_steps(model: nn.Module, passages: Passages, edges: list[int]) -> np.ndarray:
    """Experts that the model's containers were called with, [B, T, L, K]."""
    calls: dict[int, list[torch.Tensor]] = {}

    def record(index: int, layer: object) -> object:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            calls.setdefault(index, []).append(read_routes(layer, args, kwargs).experts_TK)  # type: ignore[arg-type]

        return hook

    hooks = [
        layer.module.register_forward_pre_hook(record(index, layer), with_kwargs=True)  # type: ignore[arg-type]
        for index, layer in enumerate(find_moe_layers(model))
    ]
    cache, batch = None, len(passages.token_ids_BT)
    with torch.no_grad():
        for start, stop in pairwise(edges):
            ids = passages.token_ids_BT[:, start:stop]
            cache = model(ids, past_key_values=cache, use_cache=True).past_key_values
    for hook in hooks:
        hook.remove()
    layers = [
        torch.cat([c.view(batch, -1, c.shape[-1]) for c in calls[index]], 1) for index in calls
    ]
    return torch.stack(layers, 2).numpy()


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("batch", [1, 3])
def test_replayed_experts_are_the_traces_at_every_position(
    kind: str, batch: int, tmp_path: Path
) -> None:
    model = tiny_model(kind)
    passages = traced(tmp_path, model, [12, 9, 14]).passages(batch, 8, first=0)
    replay = TextReplay(model, batch, 8, CPU, routes=True)
    replay.start(passages)
    with replay.installed():
        got_BTLK = run_in_steps(model, passages, [0, 5, 6, 7, 8])
    assert replay.position == 8
    np.testing.assert_array_equal(got_BTLK, passages.experts_BTLK)


def test_replay_starts_anew_and_the_model_gets_its_own_choices_back(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    text = traced(tmp_path, model, [12, 9])
    replay = TextReplay(model, 1, 9, CPU, routes=True)
    own = run_in_steps(model, text.passages(1, 6, first=0), [0, 6])
    for first in (0, 1):
        passages = text.passages(1, 6, first=first)
        replay.start(passages)
        with replay.installed():
            got = run_in_steps(model, passages, [0, 4, 5, 6])
        np.testing.assert_array_equal(got, passages.experts_BTLK)
    np.testing.assert_array_equal(run_in_steps(model, text.passages(1, 6, first=0), [0, 6]), own)


def started(tmp_path: Path, length: int) -> tuple[nn.Module, Passages, TextReplay]:
    """A model, 8 tokens of a document, and their replay from tables of `length`."""
    model = tiny_model("olmoe")
    passages = traced(tmp_path, model, [12]).passages(1, 8, first=0)
    replay = TextReplay(model, 1, length, CPU, routes=True)
    replay.start(passages)
    return model, passages, replay


def test_replay_past_the_end_of_the_table_begins_again(tmp_path: Path) -> None:
    model, passages, replay = started(tmp_path, 8)
    with replay.installed():
        run_in_steps(model, passages, [0, 8])
        again = run_in_steps(model, passages, [0, 8])
    np.testing.assert_array_equal(again, passages.experts_BTLK)


def test_a_step_that_runs_twice_is_no_step_further(tmp_path: Path) -> None:
    """As while it is captured."""
    model, passages, replay = started(tmp_path, 12)
    with replay.installed():
        run_in_steps(model, passages, [0, 5])
        for _ in range(2):
            model(passages.token_ids_BT[:, 5:6], position_ids=torch.tensor([[5]]))
            assert replay.position == 6


def test_a_long_passage_joins_documents(tmp_path: Path) -> None:
    text = traced(tmp_path, tiny_model("olmoe"), [5, 4, 6])
    reader = TraceReader(tmp_path / "trace")
    passages = text.passages(2, 13, first=1)
    tokens = [reader.document(index).token_ids_T for index in (1, 2, 0)]
    np.testing.assert_array_equal(passages.token_ids_BT[0], np.concatenate(tokens)[:13])
    assert passages.token_ids_BT.shape == (2, 13)
    assert passages.experts_BTLK is not None
    assert passages.experts_BTLK.shape[:2] == (2, 13)


def test_a_trace_of_other_layers_is_refused(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "trace", tiny_model("mixtral"), [5])
    with pytest.raises(ValueError, match="does not fit"):
        TracedText(path, topology_of(tiny_model("olmoe")).stack(), VOCAB_SIZE)


def test_random_text_is_the_same_every_time_and_leaves_routing_to_the_model() -> None:
    text = RandomText(50)
    first, again = text.passages(2, 7, first=3), text.passages(2, 7, first=3)
    assert torch.equal(first.token_ids_BT, again.token_ids_BT)
    assert not torch.equal(first.token_ids_BT[0], first.token_ids_BT[1])
    assert first.experts_BTLK is None


def test_even_text_uses_every_expert_alike_and_none_twice_for_a_token() -> None:
    stack = topology_of(tiny_model("olmoe")).stack()
    text = EvenText(50, stack)
    first, again = text.passages(2, 400, first=3), text.passages(2, 400, first=3)
    assert first.experts_BTLK is not None and again.experts_BTLK is not None
    np.testing.assert_array_equal(first.experts_BTLK, again.experts_BTLK)
    assert first.experts_BTLK.shape == (2, 400, stack.num_layers, stack.top_k)
    ordered = np.sort(first.experts_BTLK, axis=-1)
    assert (ordered[..., 1:] > ordered[..., :-1]).all()
    uses = np.bincount(first.experts_BTLK.reshape(-1), minlength=stack.num_experts)
    assert uses.min() > 0.9 * uses.mean() and uses.max() < 1.1 * uses.mean()


def test_the_calls_of_a_passage_are_its_prompt_at_once_and_then_token_by_token(
    tmp_path: Path,
) -> None:
    passages = traced(tmp_path, tiny_model("olmoe"), [9, 9]).passages(2, 6, first=0)
    assert passages.experts_BTLK is not None
    calls = passage_calls(passages, 4)
    assert [layer for layer, _ in calls] == [0, 1, 2, 3] * 3
    np.testing.assert_array_equal(calls[1][1], np.unique(passages.experts_BTLK[:, :4, 1]))
    np.testing.assert_array_equal(calls[-1][1], np.unique(passages.experts_BTLK[:, 5, 3]))


@pytest.mark.parametrize("routes", [False, True])
def test_generate_returns_the_text_whatever_the_model_chooses(routes: bool, tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    passages = traced(tmp_path, model, [12, 11]).passages(2, 10, first=0)
    text_BT, replay = passages.token_ids_BT, TextReplay(model, 2, 10, CPU, routes=routes)
    replay.start(passages)
    clock, route_log = Clock(), LogitsRecorder()
    with replay.installed():
        output = model.generate(  # type: ignore[operator]
            text_BT[:, :4],
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            streamer=clock,
            logits_processor=[route_log],
        )
    assert torch.equal(output, text_BT)
    assert replay.position == 9
    assert (len(clock.seconds), len(clock.step_s), len(route_log.logits)) == (6, 5, 6)
    for step, logits_BV in enumerate(route_log.logits):
        chosen_B1 = text_BT[:, 4 + step : 5 + step]
        assert torch.all(logits_BV.gather(1, chosen_B1) == CHOSEN_LOGIT)
        assert int((logits_BV == CHOSEN_LOGIT).sum()) == 2


def test_the_models_other_logits_are_its_own(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    passages = traced(tmp_path, model, [12]).passages(1, 6, first=0)
    replay = TextReplay(model, 1, 6, CPU, routes=False)
    replay.start(passages)
    expected = model(passages.token_ids_BT[:, :5]).logits
    with replay.installed(), torch.no_grad():
        got = model(passages.token_ids_BT[:, :5]).logits
    differs = (got != expected).nonzero().tolist()
    assert differs == [[0, 4, int(passages.token_ids_BT[0, 5])]]


def test_the_text_is_replayed_too_if_an_engine_computes_the_head_itself(tmp_path: Path) -> None:
    model: Any = tiny_model("olmoe")
    passages = traced(tmp_path, model, [12]).passages(1, 6, first=0)
    replay = TextReplay(model, 1, 6, CPU, routes=False)
    replay.start(passages)
    with replay.installed(), torch.no_grad():
        model.lm_head.forward = partial(nn.Linear.forward, model.lm_head)
        said = model(passages.token_ids_BT[:, :5]).logits[0, -1].argmax()
        del model.lm_head.forward
    assert said == passages.token_ids_BT[0, 5]


def test_a_generation_ends_early_after_enough_tokens() -> None:
    clock = Clock(max_tokens=2)
    clock.put(torch.zeros(1, 5))
    clock.put(torch.zeros(1))
    with pytest.raises(Enough):
        clock.put(torch.zeros(1))
    assert len(clock.step_s) == 1 and clock.was_cut


def test_what_ran_is_compared_with_what_was_replayed_but_for_a_step_under_way() -> None:
    replay = SimpleNamespace(position=9)
    workload = Workload(device=CPU, prompt=5, replay=cast(TextReplay, replay))
    clock = Clock()
    clock.seconds = [0.0] * 4  # the prompt's pass and three steps
    with pytest.raises(RuntimeError, match="8 tokens ran, but 9 were replayed"):
        workload._check_position(clock)
    clock.was_cut = True
    workload._check_position(clock)
    replay.position = 10
    with pytest.raises(RuntimeError, match="8 tokens ran, but 10 were replayed"):
        workload._check_position(clock)


def test_what_happens_at_the_first_token_is_in_no_step() -> None:
    clock = Clock(on_first=lambda: time.sleep(0.05))
    for _ in range(3):
        clock.put(torch.zeros(1))
    assert clock.on_first_s >= 0.05
    assert 0 <= clock.step_s[0] < 0.05


def test_a_relabelled_predictor_is_the_same_graph_for_another_model(tmp_path: Path) -> None:
    small = topology_of(tiny_model("olmoe"))
    large = topology_of(tiny_model("olmoe", hidden_size=64))
    path = write_predictor(tmp_path / "small.onnx", small)
    copy = open_predictor(relabel_predictor(path, large, tmp_path / "new" / "large.onnx"))
    original = open_predictor(path)
    assert copy.topology == large
    assert copy[2:] == original[2:]
    assert original.topology == small


def test_a_predictor_of_other_layers_is_not_relabelled(tmp_path: Path) -> None:
    path = write_predictor(tmp_path / "small.onnx", topology_of(tiny_model("olmoe")))
    with pytest.raises(ValueError, match="predicts decoder 4 x 8"):
        relabel_predictor(path, topology_of(tiny_model("mixtral")), tmp_path / "large.onnx")


def test_a_slice_keeps_the_beginnings_of_long_documents_of_every_label(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace", tiny_model("olmoe"), [9, 9, 3, 9, 9, 9])
    cut(SliceSettings(trace=trace, out=tmp_path / "slice", documents=4, tokens=5))
    whole, kept = TraceReader(trace), TraceReader(tmp_path / "slice")
    assert kept.doc_lengths.tolist() == [5] * 4
    assert [kept.document(i).label for i in range(4)] == ["a", "b", "a", "b"]
    for index, source in enumerate([0, 1, 4, 3]):
        for got, expected in zip(kept.document(index)[:2], whole.document(source)[:2], strict=True):
            np.testing.assert_array_equal(got, expected[:5])
    with pytest.raises(ValueError, match="5 documents of 5 tokens, not 6"):
        cut(SliceSettings(trace=trace, out=tmp_path / "more", documents=6, tokens=5))
