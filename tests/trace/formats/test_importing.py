"""Foreign traces: read as what they say, or refused by one message."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from predictor.training.data import open_traces
from routing.shards import GENERATED, PROMPT, Document, TraceReader, signed_experts
from routing.topology import NO_EXPERT, Layer, Stack
from routing.writer import TraceWriter
from runtime.simulate import main as simulate
from runtime.simulation.settings import SimulateSettings
from tests.helpers.foreign import (
    WITH_IDS,
    WRITERS,
    encoded_npy,
    passes,
    sglang_answer,
    vllm_answer,
    vllm_output,
    with_dense_layers,
    write_lines,
)
from tests.helpers.onnx_predictor import write_predictor
from tests.helpers.predicting import NUM_EXPERTS, TOP_K, TOPOLOGY, write_labelled
from trace.formats.importing import import_trace
from trace.formats.settings import ImportSettings

PROMPT_TOKENS = 5
FORMATS = list(WRITERS)
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> TraceReader:
    """Documents of a prompt of five tokens and an answer, under two labels."""
    directory = tmp_path_factory.mktemp("ours") / "trace"
    return write_labelled(directory, range(12, 36, 3), PROMPT_TOKENS)


def imported(path: Path, name: Any, tmp_path: Path, **options: Any) -> TraceReader:
    topology = tmp_path / "topology.json"
    topology.write_text(json.dumps(options.pop("topology", TOPOLOGY).to_json()))
    out = tmp_path / "imported"
    import_trace(ImportSettings(files=[path], format=name, model=str(topology), out=out, **options))
    return TraceReader(out, verify=True)


def routes(document: Document) -> np.ndarray:
    """Signed ids, ascending: some formats keep no order."""
    return np.sort(signed_experts(document.experts_TLK, NUM_EXPERTS), axis=-1)


def only(reader: TraceReader) -> Document:
    (document,) = reader.documents()
    return document


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_routes_and_phases_that_were_recorded(
    name: str, ours: TraceReader, tmp_path: Path
) -> None:
    write, file = WRITERS[name]
    theirs = imported(write(ours, tmp_path / file), name, tmp_path)
    assert theirs.doc_lengths.tolist() == ours.doc_lengths.tolist()
    for one, other in zip(ours.documents(), theirs.documents(), strict=True):
        assert np.array_equal(routes(one), routes(other))
        assert np.array_equal(one.phase_T, other.phase_T)
    assert theirs.extras.token_ids == (name in WITH_IDS)
    if name in WITH_IDS:
        pairs = zip(ours.documents(), theirs.documents(), strict=True)
        assert all(np.array_equal(a.token_ids_T, b.token_ids_T) for a, b in pairs)


@pytest.mark.parametrize("name", FORMATS)
def test_a_replay_of_an_imported_trace_has_the_figures_of_our_own(
    name: str, ours: TraceReader, tmp_path: Path
) -> None:
    write, file = WRITERS[name]
    theirs = imported(write(ours, tmp_path / file), name, tmp_path, label="odd")
    figures = []
    for number, directory in enumerate((relabelled(ours, tmp_path / "one"), theirs.directory)):
        result = tmp_path / f"{number}.json"
        simulate(SimulateSettings(trace=directory, residency=[0.25, 0.5], json=result))
        figures.append(json.loads(result.read_text())["results"])
    assert figures[0] == figures[1]


def relabelled(reader: TraceReader, directory: Path) -> Path:
    """The trace under one label, as the formats without labels give it."""
    with TraceWriter(directory, reader.topology, provenance={"model": "rules"}) as writer:
        for document in reader.documents():
            writer.add({"decoder": document._replace(label="odd")})
    return directory


def test_labels_of_records_are_kept_unless_one_is_given(ours: TraceReader, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [vllm_answer(d) for d in ours.documents()])
    assert imported(path, "vllm", tmp_path).labels == ["odd", "even"]
    other = tmp_path / "again"
    other.mkdir()
    assert imported(path, "vllm", other, label="mine").labels == ["mine"]


@pytest.mark.parametrize("record", [vllm_answer, vllm_output])
def test_vllm_is_read_with_prompt_and_answer_together_and_apart(
    record: Callable[[Document], dict[str, Any]], ours: TraceReader, tmp_path: Path
) -> None:
    document = ours.document(3)
    path = tmp_path / "answer.json"
    path.write_text(json.dumps([record(document)]))
    theirs = only(imported(path, "vllm", tmp_path))
    assert np.array_equal(theirs.experts_TLK, document.experts_TLK)
    assert np.array_equal(theirs.token_ids_T, document.token_ids_T)
    assert (theirs.phase_T == PROMPT).sum() == PROMPT_TOKENS


def test_vllm_npz_files_hold_one_request(ours: TraceReader, tmp_path: Path) -> None:
    document = ours.document(2)
    parts = np.split(document.experts_TLK.astype(np.int16), [PROMPT_TOKENS])
    np.savez(
        tmp_path / "request.npz",
        prompt_token_ids=document.token_ids_T[:PROMPT_TOKENS],
        token_ids=document.token_ids_T[PROMPT_TOKENS:],
        prompt_routed_experts=parts[0],
        routed_experts=parts[1],
    )
    theirs = only(imported(tmp_path / "request.npz", "vllm", tmp_path))
    assert np.array_equal(theirs.experts_TLK, document.experts_TLK)
    assert np.array_equal(theirs.token_ids_T, document.token_ids_T)


def sparse_topology() -> Any:
    """The same model with its experts in layers 1, 2 and 4 of six."""
    layers = tuple(Layer(f"model.layers.{n}.mlp.experts", NUM_EXPERTS, TOP_K) for n in (1, 2, 4))
    return replace(TOPOLOGY, stacks=(Stack(name="decoder", layers=layers),))


@pytest.mark.parametrize("name", ["vllm", "sglang", "npy"])
def test_rows_of_dense_layers_are_left_out_by_the_layers_numbers(
    name: str, ours: TraceReader, tmp_path: Path
) -> None:
    document = ours.document(1)
    full = document._replace(experts_TLK=with_dense_layers(document.experts_TLK, [1, 2, 4], 6))
    path = tmp_path / "answer.json"
    if name == "npy":
        path = tmp_path / "routes.npy"
        np.save(path, full.experts_TLK)
    else:
        path.write_text(json.dumps((vllm_answer if name == "vllm" else sglang_answer)(full)))
    options = {"layout": "NLK"} if name == "npy" else {}
    theirs = imported(path, name, tmp_path, topology=sparse_topology(), **options)
    assert np.array_equal(only(theirs).experts_TLK, document.experts_TLK)


def test_sglang_ids_are_read_from_logprobs_too(ours: TraceReader, tmp_path: Path) -> None:
    document, answer = ours.document(0), sglang_answer(ours.document(0))
    for key, name in (
        ("input_ids", "input_token_logprobs"),
        ("output_ids", "output_token_logprobs"),
    ):
        answer["meta_info"][name] = [[-1.0, token, None] for token in answer.pop(key)]
    theirs = only(imported(write_lines(tmp_path / "a.jsonl", [answer]), "sglang", tmp_path))
    assert np.array_equal(theirs.token_ids_T, document.token_ids_T)


def test_sglang_choices_of_the_openai_endpoints_are_documents(
    ours: TraceReader, tmp_path: Path
) -> None:
    answer = sglang_answer(ours.document(0))
    routed = answer["meta_info"]["routed_experts"]
    path = tmp_path / "answer.json"
    usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": len(answer["output_ids"])}
    path.write_text(
        json.dumps({"choices": [{"sgl_ext": {"routed_experts": routed}}], "usage": usage})
    )
    theirs = imported(path, "sglang", tmp_path)
    assert np.array_equal(only(theirs).experts_TLK, ours.document(0).experts_TLK)
    assert not theirs.extras.token_ids
    assert (only(theirs).phase_T == PROMPT).sum() == PROMPT_TOKENS


def test_the_forks_rows_with_positions_are_read(ours: TraceReader, tmp_path: Path) -> None:
    document, lines = ours.document(2), []
    for span in passes(document):
        for layer in range(3):
            for number, row in enumerate(document.experts_TLK[span, layer].tolist()):
                prompt = span.stop - span.start > 1
                at = number - span.stop if prompt else span.start - PROMPT_TOKENS
                lines.append(",".join(map(str, [at, layer, *row])))
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(lines))
    theirs = only(imported(path, "llama.cpp", tmp_path))
    assert np.array_equal(theirs.experts_TLK, document.experts_TLK)
    assert np.array_equal(theirs.phase_T, document.phase_T)


def test_the_last_layer_of_llama_cpps_prompts_has_its_last_token_only(
    ours: TraceReader, tmp_path: Path
) -> None:
    document = ours.document(0)
    lines = [
        f"{layer},{expert}"
        for span in passes(document)
        for layer in range(3)
        for expert in document.experts_TLK[span, layer][-1 if layer == 2 else 0 :].reshape(-1)
    ]
    path = tmp_path / "trace.csv"
    path.write_text("layer,expert\n" + "\n".join(lines))
    theirs = signed_experts(only(imported(path, "llama.cpp", tmp_path)).experts_TLK, NUM_EXPERTS)
    assert (theirs[: PROMPT_TOKENS - 1, 2] == NO_EXPERT).all()
    assert np.array_equal(theirs[PROMPT_TOKENS - 1 :], document.experts_TLK[PROMPT_TOKENS - 1 :])
    again = tmp_path / "again"
    again.mkdir()
    answer = only(imported(path, "llama.cpp", again, generated_only=True))
    assert np.array_equal(answer.experts_TLK, document.experts_TLK[PROMPT_TOKENS:])
    assert (answer.phase_T == GENERATED).all()


def test_megatrons_ranks_are_read_one_by_one_without_multi_token_prediction(
    ours: TraceReader, tmp_path: Path
) -> None:
    run = WRITERS["megatron"][0](ours, tmp_path / "run")
    first = run / "router_trace_rank0.jsonl"
    extra = json.loads(first.read_text().splitlines()[0]) | {"block": "mtp", "mtp_idx": 0}
    (run / "router_trace_rank1.jsonl").write_text(first.read_text() + json.dumps(extra) + "\n")
    theirs = imported(run, "megatron", tmp_path)
    assert len(theirs) == 2 * len(ours)
    for number in range(len(ours)):
        assert np.array_equal(routes(theirs.document(number)), routes(ours.document(number)))


@pytest.mark.parametrize("axes", ["LNK", "NLK"])
def test_npy_axes_are_told_apart_by_the_number_of_layers(
    axes: str, ours: TraceReader, tmp_path: Path
) -> None:
    experts_NLK = ours.document(4).experts_TLK
    np.save(tmp_path / "r.npy", experts_NLK if axes == "NLK" else experts_NLK.swapaxes(0, 1))
    theirs = imported(tmp_path / "r.npy", "npy", tmp_path)
    assert np.array_equal(only(theirs).experts_TLK, experts_NLK)


def test_npy_axes_that_cannot_be_told_apart_have_to_be_named(
    ours: TraceReader, tmp_path: Path
) -> None:
    experts_NLK = ours.document(4).experts_TLK[:3]
    np.save(tmp_path / "r.npy", experts_NLK)
    with pytest.raises(ValueError, match="give --layout LNK or --layout NLK"):
        imported(tmp_path / "r.npy", "npy", tmp_path)
    theirs = imported(tmp_path / "r.npy", "npy", tmp_path, layout="NLK")
    assert np.array_equal(only(theirs).experts_TLK, experts_NLK)


# --------------------------------------------------------------------- without token ids


def test_a_trace_without_ids_is_refused_by_whatever_needs_them(
    ours: TraceReader, tmp_path: Path
) -> None:
    path = WRITERS["llama.cpp"][0](ours, tmp_path / "trace.csv")
    theirs = imported(path, "llama.cpp", tmp_path)
    predictor = write_predictor(tmp_path / "p.onnx", TOPOLOGY)
    with pytest.raises(ValueError, match=r"a predictor needs token ids.*--token-ids"):
        open_traces([theirs.directory], "decoder")
    with pytest.raises(ValueError, match=r"p\.onnx needs token ids"):
        simulate(SimulateSettings(trace=theirs.directory, predictor=predictor))
    with pytest.raises(ValueError, match="the token table of --all needs token ids"):
        simulate(SimulateSettings(trace=theirs.directory, all=True, fit_trace=ours.directory))


def test_token_ids_from_a_file_make_it_a_trace_for_predictors(
    ours: TraceReader, tmp_path: Path
) -> None:
    path = WRITERS["megatron"][0](ours, tmp_path / "run")
    ids = np.concatenate([document.token_ids_T for document in ours.documents()])
    np.save(tmp_path / "ids.npy", ids)
    theirs = imported(path, "megatron", tmp_path, token_ids=tmp_path / "ids.npy")
    found = np.concatenate([document.token_ids_T for document in theirs.documents()])
    assert np.array_equal(found, ids)
    assert open_traces([theirs.directory], "decoder")
    np.save(tmp_path / "ids.npy", ids[1:])
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ValueError, match=r"ids\.npy has \d+ ids for the \d+ tokens traced"):
        imported(path, "megatron", other, token_ids=tmp_path / "ids.npy")


# --------------------------------------------------------------------------------- refusals


def routed(answer: dict[str, Any], change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the routes of a vLLM answer."""
    choice = answer["choices"][0]
    raw = base64.b64decode(choice["routed_experts"])
    experts = np.load(__import__("io").BytesIO(raw))
    choice["routed_experts"] = encoded_npy(change(experts))


def with_expert(expert: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(experts: np.ndarray) -> np.ndarray:
        experts[3, 1, 0] = expert
        return experts

    return change


VLLM: dict[str, tuple[Edit, str]] = {
    "wrong top-k": (lambda a: routed(a, lambda e: e[:, :, :1]), r"3 layers of 1 .* has 3 of 2"),
    "a layer too few": (lambda a: routed(a, lambda e: e[:, :2]), r"2 layers.*missing: layers\.2"),
    "an expert too many": (
        lambda a: routed(a, with_expert(9)), r"token 3 uses expert 9 of layers\.1, which has 8",
    ),
    "an expert below none": (
        lambda a: routed(a, lambda e: with_expert(-3)(e.astype(np.int16))), "uses expert -3",
    ),
    "a layer that was not recorded": (lambda a: routed(a, lambda e: 0 * e), "expert 0 of .* twice"),
    "a token too few": (lambda a: routed(a, lambda e: e[1:-1]), r"the routes of \d+ tokens, but"),
    "no integers": (lambda a: routed(a, lambda e: e.astype(np.float32)), "float32"),
    "two axes": (lambda a: routed(a, lambda e: e[0]), r"uint8 \[3, 2\]"),
    "cut base64": (
        lambda a: a["choices"][0].update(routed_experts=a["choices"][0]["routed_experts"][:-3]),
        "base64",
    ),
    "cut npy": (
        lambda a: a["choices"][0].update(
            routed_experts=a["choices"][0]["routed_experts"][:240]
        ),
        "routed_experts is no numpy file, or is cut",
    ),
    "base64 of something else": (
        lambda a: a["choices"][0].update(routed_experts="aGVsbG8="), "is no .npy file",
    ),
    "no routes": (lambda a: a["choices"][0].pop("routed_experts"), "enable-return-routed-experts"),
    "ragged lists": (
        lambda a: a["choices"][0].update(routed_experts=[[[1, 2], [3]]]), "differ in length",
    ),
    "ids that are no list": (lambda a: a["choices"][0].update(token_ids="abc"), "no list of int"),
    "ids outside the vocabulary": (
        lambda a: a["choices"][0]["prompt_token_ids"].__setitem__(0, 99), "outside the vocabulary",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(VLLM))
def test_a_malformed_vllm_file_is_refused_in_one_sentence(
    case: str, ours: TraceReader, tmp_path: Path
) -> None:
    edit, message = VLLM[case]
    answers = [vllm_answer(ours.document(0)), vllm_answer(ours.document(1))]
    edit(answers[1])
    path = write_lines(tmp_path / "a.jsonl", answers)
    with pytest.raises(ValueError, match=message) as refused:
        imported(path, "vllm", tmp_path)
    assert "a.jsonl, line 2" in str(refused.value)
    assert not (tmp_path / "imported").exists()  # nothing half-imported is left


def damaged_routes(text: str) -> Edit:
    return lambda answer: answer["meta_info"].update(routed_experts=text)


def cut_routes(count: int) -> Edit:
    def edit(answer: dict[str, Any]) -> None:
        raw = base64.b64decode(answer["meta_info"]["routed_experts"])
        damaged_routes(base64.b64encode(raw[:-count]).decode())(answer)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (damaged_routes("AAA"), "cut or damaged base64"),
        (cut_routes(2), "cut: .* bytes"),
        (cut_routes(4), "not those of .* tokens"),
        (cut_routes(24), "not those of .* tokens"),
        (lambda answer: answer["meta_info"].pop("routed_experts"), "return_routed_experts"),
    ],
)
def test_a_malformed_sglang_file_is_refused_in_one_sentence(
    edit: Edit, message: str, ours: TraceReader, tmp_path: Path
) -> None:
    answer = sglang_answer(ours.document(0))
    edit(answer)
    with pytest.raises(ValueError, match=message):
        imported(write_lines(tmp_path / "a.jsonl", [answer]), "sglang", tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: lines.pop(1), r"missing: layers\.1"),
        (lambda lines: lines[1].update(topk=3), "num_tokens and topk say"),
        (lambda lines: lines[1].update(top_indices=[[1, 2], [3]]), "no lists of 2 integers"),
        (lambda lines: lines[1].pop("layer"), "it lacks layer"),
        (lambda lines: lines[4]["top_indices"][0].__setitem__(0, 80), "uses expert 80"),
    ],
)
def test_a_malformed_megatron_file_is_refused_in_one_sentence(
    edit: Callable[[list[dict[str, Any]]], object], message: str, ours: TraceReader, tmp_path: Path
) -> None:
    path = WRITERS["megatron"][0](ours, tmp_path / "run") / "router_trace_rank0.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    edit(lines)
    with pytest.raises(ValueError, match=message):
        imported(write_lines(path, lines), "megatron", tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: lines.pop(3), "no whole tokens of 2 experts"),
        (lambda lines: lines.__setitem__(5, "1,x"), "line 6: '1,x' is no row of llama-moe-trace"),
        (lambda lines: lines.__setitem__(5, "1,2,3"), "line 6: 3 cells, but 2"),
        (lambda lines: lines.__setitem__(0, "0,55"), "uses expert 55"),
        (lambda lines: lines.__setitem__(5, "1," + "9" * 30), "line 6: .* is no row"),
        (lambda lines: lines.__delitem__(slice(10, 20)), r"missing: layers\.1"),
        (lambda lines: lines.__delitem__(slice(10, 12)), r"4 tokens in layers\.1, but 5"),
        (lambda lines: lines.clear(), "no document"),
    ],
)
def test_a_malformed_llama_cpp_file_is_refused_in_one_sentence(
    edit: Callable[[list[str]], object], message: str, ours: TraceReader, tmp_path: Path
) -> None:
    path = WRITERS["llama.cpp"][0](ours, tmp_path / "trace.csv")
    lines = path.read_text().splitlines()
    edit(lines)
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        imported(path, "llama.cpp", tmp_path)


@pytest.mark.parametrize("pickled", [True, False])
def test_a_file_of_objects_is_never_read_nor_recommended(pickled: bool, tmp_path: Path) -> None:
    path = tmp_path / "routes.npy"
    if pickled:
        np.save(path, np.array([{"experts": 1}]), allow_pickle=True)
    else:
        path.write_text("# routes")
    with pytest.raises(ValueError, match=r"routes.npy is no numpy file.* with numpy.save") as found:
        imported(path, "npy", tmp_path)
    assert "allow_pickle" not in str(found.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"routes": np.zeros((3, 4, 2), int)}, "has no array `experts`, but routes"),
        ({"experts": np.zeros((3, 4))}, r"float64 \[3, 4\]"),
        ({"experts": np.zeros((4, 5, 2), int)}, "does not show which axis"),
        (
            {"experts": np.tile([0, 1], (3, 4, 1)), "token_ids": np.zeros(3, int)},
            r"3 token ids \(int64\) for 4",
        ),
        ({"experts": np.tile([0, 1], (3, 4, 1)), "doc_offsets": np.array([0, 3])}, "doc_offsets"),
    ],
)
def test_a_malformed_npy_file_is_refused_in_one_sentence(
    arrays: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "r.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        imported(tmp_path / "r.npz", "npy", tmp_path)


@pytest.mark.parametrize("name", ["r.npy", "a.npz"])
def test_a_cut_file_is_refused_by_name(name: str, ours: TraceReader, tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", experts=ours.document(0).experts_TLK)
    (tmp_path / name).write_bytes((tmp_path / "whole.npz").read_bytes()[:90])
    with pytest.raises(ValueError, match=rf"{name} is no numpy file"):
        imported(tmp_path / name, "npy" if name == "r.npy" else "vllm", tmp_path)


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_read_or_refused_by_its_name(
    name: str, ours: TraceReader, tmp_path: Path
) -> None:
    write, file = WRITERS[name]
    path = write(ours, tmp_path / file)
    path = path / "router_trace_rank0.jsonl" if path.is_dir() else path
    whole, random = path.read_bytes(), Random(name)
    refusals = []
    for number in range(40):
        data = bytearray(whole)
        start = random.randrange(len(data))
        if number % 2:
            data[start] = random.randrange(256)
        else:
            del data[start : start + random.choice((1, 20, len(data)))]
        path.write_bytes(data)
        out = tmp_path / str(number)
        out.mkdir()
        try:
            imported(path, name, out)
        except ValueError as error:
            refusals.append((str(error), (out / "imported").exists()))
    assert len(refusals) > 10
    for message, something_is_left in refusals:
        assert (str(path) in message or "no document" in message) and not something_is_left


def test_files_with_and_without_ids_are_not_mixed(ours: TraceReader, tmp_path: Path) -> None:
    with_ids, without = vllm_answer(ours.document(0)), vllm_answer(ours.document(1))
    without["choices"][0].pop("token_ids")
    path = write_lines(tmp_path / "a.jsonl", [with_ids, without])
    with pytest.raises(ValueError, match="line 2: token ids are missing here"):
        imported(path, "vllm", tmp_path)


def test_a_trace_is_not_imported_over_another(ours: TraceReader, tmp_path: Path) -> None:
    path = WRITERS["npy"][0](ours, tmp_path / "r.npz")
    imported(path, "npy", tmp_path)
    with pytest.raises(ValueError, match="already holds a trace"):
        imported(path, "npy", tmp_path)


# ------------------------------------------------------------------------- the model's topology


def test_the_topology_comes_from_a_model_a_file_or_a_trace(
    tiny_directory: Callable[[str], Path], ours: TraceReader, tmp_path: Path
) -> None:
    from routing.inspect_model import topology_of
    from tests.helpers.tiny import tiny_model
    from trace.formats.importing import read_topology

    model = read_topology(str(tiny_directory("qwen3_moe")))
    assert model.stacks == topology_of(tiny_model("qwen3_moe")).stacks
    assert model.tokenizer is not None
    assert read_topology(str(ours.directory)) == TOPOLOGY
    (tmp_path / "wrong.json").write_text("[1]")
    with pytest.raises(ValueError, match="not a routing topology"):
        read_topology(str(tmp_path / "wrong.json"))
    with pytest.raises(ValueError, match="encoder-decoder"):
        read_topology(str(tiny_directory("switch_transformers")))
