"""runtime.simulate: the same loads as in a live run over the same tokens; its command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import runtime
from routing.cli import run
from routing.inspect_model import topology_of
from routing.layers import MoELayer, find_moe_layers, read_routes
from routing.shards import GENERATED, PROMPT, Document, TraceReader, stored_experts
from routing.writer import TraceWriter
from runtime.simulate import main
from runtime.simulation.settings import SimulateSettings
from tests.helpers.onnx_predictor import write_predictor
from tests.helpers.tiny import KINDS, save_tiny, tiny_model
from tests.routing.test_shards import PROVENANCE, a_document, a_topology
from trace.collect import collect
from trace.settings import CollectSettings

ROOT = Path(__file__).parents[2]
CAUSAL = [kind for kind in KINDS if kind != "switch_transformers"]
POLICIES = ["lru", "lfu", "predicted", "belady"]
MORE_RULES = ["class-lru", "lfru", "reuse", "hot-set"]
SIMULATED_ONLY = ["arc", "s3-fifo", "lfru-layers"]
RESIDENCY = [0.125, 0.25, 0.5, 1.0]
NEW_TOKENS = 10
PROMPTS = [list(range(2, 16)), [77, 5, 200], [9], list(range(90, 130, 5))]


def generate(model: Any) -> Iterable[Tensor]:
    """Continue every prompt, one after the other."""
    for prompt in PROMPTS:
        yield model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )


def teacher_forced(model: Any, documents: Iterable[Document], *, decode_all: bool = False) -> None:
    """Run documents again: the prompt in one step, then one step a token."""
    for document in documents:
        token_ids = torch.from_numpy(np.array(document.token_ids_T, np.int64))[None]
        num_prompt = 1 if decode_all else int((document.phase_T == PROMPT).sum())
        with torch.inference_mode():
            cache = model(token_ids[:, :num_prompt], use_cache=True).past_key_values
            for t in range(num_prompt, token_ids.shape[1]):
                model(token_ids[:, t : t + 1], past_key_values=cache)


def record(kind: str, directory: Path) -> Path:
    """Generate with the stock model, and write the trace of its expert calls."""
    model: Any = tiny_model(kind)
    layers, topology = find_moe_layers(model), topology_of(model)
    calls: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}

    def hook(layer: MoELayer) -> Any:
        def see(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[layer.name].append(read_routes(layer, args, kwargs).experts_TK)

        return see

    for layer in layers:
        layer.module.register_forward_pre_hook(hook(layer), with_kwargs=True)
    with TraceWriter(directory, topology, provenance=PROVENANCE) as writer:
        for prompt, sequence in zip(PROMPTS, generate(model), strict=True):
            experts_TLK = torch.stack([torch.cat(calls[layer.name]) for layer in layers], 1)
            token_ids_T = sequence[0, : len(experts_TLK)].numpy()  # the last token never ran
            phase_T = np.where(np.arange(len(token_ids_T)) < len(prompt), PROMPT, GENERATED)
            stored = stored_experts(experts_TLK.numpy(), topology.stack().num_experts)
            writer.add({"decoder": Document(token_ids_T, stored, phase_T, "text")})
            for seen in calls.values():
                seen.clear()
    return directory


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`traced(kind)`: the trace of that tiny model, recorded once."""
    made: dict[str, Path] = {}

    def directory(kind: str) -> Path:
        if kind not in made:
            made[kind] = record(kind, tmp_path_factory.mktemp("trace") / kind)
        return made[kind]

    return directory


@pytest.fixture(scope="module")
def predictors(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[str, bool], Path] = {}

    def path(kind: str, cache: bool = True) -> Path:
        if (kind, cache) not in made:
            target = tmp_path_factory.mktemp("predictor") / "predictor.onnx"
            topology = topology_of(tiny_model(kind))
            made[kind, cache] = write_predictor(target, topology, window=6, cache=cache)
        return made[kind, cache]

    return path


def simulate(trace: Path, out: Path, **options: Any) -> dict[tuple[str, float], dict[str, Any]]:
    """The results that the command writes, by policy and residency."""
    main(SimulateSettings(trace=trace, json=out / "results.json", residency=RESIDENCY, **options))
    results = json.loads((out / "results.json").read_text())["results"]
    return {(result["policy"], result["residency"]): result for result in results}


def offload(
    kind: str, share: float, policy: str, trace: Path, predictor: Path | None = None
) -> Any:
    return runtime.load(
        tiny_model(kind),
        predictor if policy == "predicted" else None,
        memory=share,
        policy=policy,
        replay=trace if policy in ("belady", "hot-set") else None,
    )


def assert_same_counts(model: Any, simulated: dict[str, Any]) -> None:
    model.expertflow.check_integrity()
    stats = model.expertflow.stats()
    assert stats.num_slots == simulated["slots"]
    assert stats.hits + stats.misses == simulated["requests"]
    assert stats.misses == simulated["loads"]
    assert stats.hit_rate == pytest.approx(simulated["hit_rate"], abs=1e-12)


# ---------------------------------------------------------------------- live


@pytest.mark.sampled(3)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", CAUSAL)
def test_a_generation_loads_what_the_simulation_of_its_trace_loads(
    kind: str,
    policy: str,
    traced: Callable[[str], Path],
    predictors: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """The prompts have several lengths; some need more distinct experts than there are slots."""
    simulated = simulate(traced(kind), tmp_path, predictor=predictors(kind))
    for share in RESIDENCY:
        model = offload(kind, share, policy, traced(kind), predictors(kind))
        for _ in generate(model):
            pass
        assert_same_counts(model, simulated[policy, share])
        assert model.expertflow.stats().tokens == TraceReader(traced(kind)).num_tokens
    assert simulated[policy, 0.125]["loads"] > simulated[policy, 1.0]["loads"]


def test_a_generation_with_a_stateless_predictor_loads_what_its_simulation_loads(
    traced: Callable[[str], Path], predictors: Callable[..., Path], tmp_path: Path
) -> None:
    predictor = predictors("olmoe", cache=False)
    simulated = simulate(traced("olmoe"), tmp_path, predictor=predictor)
    for share in RESIDENCY:
        model = offload("olmoe", share, "predicted", traced("olmoe"), predictor)
        for _ in generate(model):
            pass
        assert_same_counts(model, simulated["predicted", share])


@pytest.mark.parametrize("policy", MORE_RULES)
def test_a_generation_under_a_rivals_rule_loads_what_its_simulation_loads(
    policy: str, traced: Callable[[str], Path], tmp_path: Path
) -> None:
    trace = traced("olmoe")
    simulated = simulate(trace, tmp_path, fit_trace=trace)
    for share in (0.25, 0.5):
        model = offload("olmoe", share, policy, trace)
        for _ in generate(model):
            pass
        assert_same_counts(model, simulated[policy, share])


@pytest.mark.parametrize("policy", POLICIES)
def test_prompts_replayed_token_by_token_load_what_a_live_run_token_by_token_loads(
    policy: str, traced: Callable[[str], Path], predictors: Callable[..., Path], tmp_path: Path
) -> None:
    trace, predictor = traced("olmoe"), predictors("olmoe")
    simulated = simulate(trace, tmp_path, predictor=predictor, decode_all=True)
    for share in RESIDENCY:
        model = offload("olmoe", share, policy, trace, predictor)
        if policy == "belady":  # it replays whole prompts
            with pytest.raises(ValueError, match="differs from the recorded trace"):
                teacher_forced(model, TraceReader(trace).documents(), decode_all=True)
            continue
        teacher_forced(model, TraceReader(trace).documents(), decode_all=True)
        assert_same_counts(model, simulated[policy, share])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_trace_of_trace_collect_is_simulated_as_the_model_runs_it(
    policy: str, predictors: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("the first\n<|endoftext|>\nand the second document\n")
    collect(
        CollectSettings(
            model=str(save_tiny(tmp_path / "model", "olmoe")),
            dataset=[str(tmp_path / "a.txt")],
            out=str(tmp_path / "trace"),
            generate=6,
        )
    )
    trace, predictor = tmp_path / "trace", predictors("olmoe")
    simulated = simulate(trace, tmp_path, predictor=predictor)
    model = offload("olmoe", 0.25, policy, trace, predictor)
    teacher_forced(model, TraceReader(trace).documents())
    assert_same_counts(model, simulated[policy, 0.25])


def test_policies_differ_and_none_beats_belady_with_bypass(
    traced: Callable[[str], Path], predictors: Callable[..., Path], tmp_path: Path
) -> None:
    simulated = simulate(traced("olmoe"), tmp_path, predictor=predictors("olmoe"))
    for share in RESIDENCY:
        loads = {policy: simulated[policy, share]["loads"] for policy in POLICIES}
        assert min(loads.values()) >= simulated["belady+bypass", share]["loads"]
        assert share != 0.5 or len(set(loads.values())) == len(POLICIES)


# ---------------------------------------------------------------------- command line


def command(*argv: object) -> None:
    run(main, SimulateSettings, [str(word) for word in argv], prog="python -m runtime.simulate")


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line on stderr of a command that exits with code 2."""
    with pytest.raises(SystemExit) as caught:
        command(*argv)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.startswith("python -m runtime.simulate: error: ") and err.count("\n") == 1
    return err


def test_the_command_prints_a_table_and_writes_json_and_a_plot(
    traced: Callable[[str], Path], predictors: Callable[..., Path], tmp_path: Path
) -> None:
    options = {
        "--trace": traced("olmoe"),
        "--predictor": predictors("olmoe"),
        "--json": tmp_path / "results.json",
        "--plot": tmp_path / "hits.png",
    }
    words = [str(word) for pair in options.items() for word in pair]
    result = subprocess.run(
        [sys.executable, "-m", "runtime.simulate", *words, "--residency", "0.25", "0.5"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    shown = [*POLICIES, "class-lru", "lfru", "reuse", *SIMULATED_ONLY, "belady+bypass"]
    for text in (*shown, "share of", "25 %", "50 %", "62 tokens of 4"):
        assert text in result.stdout
    for text in ("best free rule", "gap closed, LRU", "gap closed, best free rule"):
        assert text in result.stdout
    written = json.loads((tmp_path / "results.json").read_text())
    assert [r["residency"] for r in written["results"]] == [0.25] * 12 + [0.5] * 12
    for row in written["results"]:
        assert row["hit_rate"] == pytest.approx(1 - row["loads"] / row["requests"])
        assert row["loads_per_token"] == pytest.approx(row["loads"] / 62)
        assert f"{row['hit_rate']:.3f}" in result.stdout
    assert written["settings"]["trace"] == str(traced("olmoe"))
    assert (tmp_path / "hits.png").read_bytes().startswith(b"\x89PNG")


def test_tokens_are_limited_in_total_and_per_document(
    traced: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command("--trace", traced("olmoe"), "--max_tokens", 20, "--document_tokens", 8)
    assert "20 tokens of 3 documents" in capsys.readouterr().out


def test_a_directory_that_is_no_trace_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert f"{tmp_path} is not a trace" in refused(capsys, "--trace", tmp_path)


def test_an_empty_trace_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    TraceWriter(tmp_path, a_topology(), provenance=PROVENANCE).close()
    assert f"{tmp_path} holds no documents" in refused(capsys, "--trace", tmp_path)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_trace_is_refused_and_left_as_it_was(
    damage: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with TraceWriter(tmp_path, a_topology(), provenance=PROVENANCE) as writer:
        writer.add({"decoder": a_document(0)})
    shard = tmp_path / "decoder-00000.safetensors"
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-4])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert f"{shard} is {damage}" in refused(capsys, "--trace", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_predictor_of_another_model_is_refused_naming_both(
    traced: Callable[[str], Path],
    predictors: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    trace, predictor = traced("olmoe"), predictors("mixtral")
    message = refused(capsys, "--trace", trace, "--predictor", predictor)
    assert f"the trace {trace} is for olmoe" in message
    assert f"the predictor {predictor} is for mixtral" in message


def test_a_file_that_is_no_predictor_is_refused(
    traced: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "predictor.onnx").write_text("nothing")
    argv = ("--trace", traced("olmoe"), "--predictor", tmp_path / "predictor.onnx")
    assert "predictor.onnx is not a readable ONNX file" in refused(capsys, *argv)


@pytest.mark.parametrize("residency", [("0",), ("0.5", "1.5"), ("-1",), ("x",)])
def test_a_cache_size_that_is_no_fraction_is_refused(
    residency: tuple[str, ...],
    traced: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = refused(capsys, "--trace", traced("olmoe"), "--residency", *residency)
    assert "residency" in message and residency[-1] in message


def test_an_encoder_decoder_trace_is_refused(tmp_path: Path) -> None:
    model = topology_of(tiny_model("switch_transformers"))
    with TraceWriter(tmp_path, model, provenance={}):
        pass
    with pytest.raises(ValueError, match="only decoders are simulated"):
        main(SimulateSettings(trace=tmp_path))
