"""The command, and the one file that it writes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from routing.cli import run
from routing.shards import TraceReader
from routing.topology import Layer, Stack, Topology
from routing.trace_format.extras import Extras
from routing.writer import TraceWriter
from runtime.replay.__main__ import main, write_page
from runtime.replay.bundle import FOLDERS, asset, html_page
from runtime.replay.settings import ReplaySettings
from tests.routing.test_shards import PROVENANCE, a_topology
from tests.runtime.replay.conftest import EVIL, Traced, a_document

UNSAFE = (
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|DOMParser|srcdoc"
)


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line on stderr of a command that exits with code 2."""
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and err.count("\n") == 1
    return err


def page_of(traced: Traced, out: Path, **options: object) -> str:
    write_page(ReplaySettings(trace=traced.trace, out=out, **options))  # type: ignore[arg-type]
    return out.read_text(encoding="utf-8")


def test_a_page_is_one_file_that_asks_for_nothing(traced: Traced, tmp_path: Path) -> None:
    page = page_of(traced, tmp_path / "new" / "page.html", predictor=traced.predictor)
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == set()
    assert set(re.findall(r"(?:src|href)=\"(.{5})", page)) == {"data:"}
    assert not re.search(UNSAFE, page)
    assert "import " not in page.split("<script>")[1], "modules were left apart"


def test_the_policy_admits_exactly_the_script_and_the_style_of_the_page(
    traced: Traced, tmp_path: Path
) -> None:
    page = page_of(traced, tmp_path / "page.html")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None and "default-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]
    for kind, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy[1]


def test_a_text_that_looks_like_html_stays_in_the_data(traced: Traced, tmp_path: Path) -> None:
    page = page_of(traced, tmp_path / "page.html", document=0)
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert "<img src=x" not in page and "<b>" not in page and "<!-- " not in page
    data = re.search(r'id="recording">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    recording = json.loads(data[1])
    assert "".join(recording["texts"]) == EVIL
    assert recording["label"] == "<b>evil</b>"
    assert str(tmp_path.parent) not in page, "a path of this machine"


def test_five_hundred_tokens_of_sixteen_layers_take_less_than_a_megabyte(tmp_path: Path) -> None:
    layers = tuple(Layer(f"layers.{n}", 64, 8) for n in range(16))
    stack = Stack(name="decoder", layers=layers)
    topology = Topology(model_type="olmoe", vocab_size=99, stacks=(stack,), model="0" * 16)
    with TraceWriter(tmp_path / "trace", topology, provenance=PROVENANCE) as writer:
        ids = np.random.default_rng(0).integers(0, 99, 520).tolist()
        writer.add({"decoder": a_document(ids, 520, "text", stack)})
    out = tmp_path / "page.html"
    write_page(ReplaySettings(trace=tmp_path / "trace", out=out))
    assert 100_000 < out.stat().st_size < 1_000_000


def test_a_page_without_its_data_is_small() -> None:
    assert len(html_page({}).encode()) < 150_000


def test_a_cut_document_and_a_missing_text_are_told(
    capsys: pytest.CaptureFixture[str], traced: Traced, tmp_path: Path
) -> None:
    page_of(traced, tmp_path / "page.html", max_tokens=5, document=2)
    told = capsys.readouterr().out
    whole = int(TraceReader(traced.trace).doc_lengths[2])
    assert f"the first 5 of {whole} tokens of document 2 are shown: --max_tokens shows more" in told
    assert f"page: {tmp_path / 'page.html'} (" in told


def test_routes_without_token_ids_are_numbered(
    capsys: pytest.CaptureFixture[str], traced: Traced, tmp_path: Path
) -> None:
    stack = traced.topology.stack()
    trace, extras = tmp_path / "trace", Extras(token_ids=False)
    with TraceWriter(trace, traced.topology, provenance=PROVENANCE, extras=extras) as writer:
        writer.add({"decoder": a_document([0] * 7, 7, "text", stack)})
    out = tmp_path / "page.html"
    write_page(ReplaySettings(trace=trace, out=out))
    assert "The trace has no token ids" in capsys.readouterr().out
    words = (trace, "--out", out, "--model", traced.model)
    assert "the text of --model needs token ids" in refused(capsys, *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--document", "3"], "holds documents 0 to 2"),
        (["--document", "-1"], "holds documents 0 to 2"),
        (["--max_tokens", "5001"], "a page shows 1 to 5,000 tokens"),
        (["--max_tokens", "0"], "a page shows 1 to 5,000 tokens"),
        (["--residency", "1.5"], "--residency 1.5: give a fraction in (0, 1]"),
        (["--expert_mb", "0"], "--expert_mb 0.0: give a size above 0"),
        (["--policy", "best"], "--policy best: give one of lru, "),
        (["--policy", "predicted"], "needs --predictor"),
        (["--model", "nowhere"], "the tokenizer in nowhere cannot be used"),
    ],
    ids=" ".join,
)
def test_a_mistake_in_the_command_is_refused_in_one_line(
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    traced: Traced,
    tmp_path: Path,
) -> None:
    out = tmp_path / "page.html"
    assert said in refused(capsys, traced.trace, "--out", out, *words)
    assert not out.exists()


def test_what_is_no_trace_of_a_decoder_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "page.html"
    assert f"{tmp_path} is not a trace" in refused(capsys, tmp_path, "--out", out)
    both = tmp_path / "both"
    TraceWriter(both, a_topology(stacks=("encoder", "decoder")), provenance=PROVENANCE).close()
    assert "only decoders are replayed" in refused(capsys, both, "--out", out)
    empty = tmp_path / "empty"
    TraceWriter(empty, a_topology(), provenance=PROVENANCE).close()
    assert "holds no documents" in refused(capsys, empty, "--out", out)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.parent.name)
def test_no_file_that_goes_into_a_page_can_end_its_element(folder: Path) -> None:
    for file in folder.glob("*.[jc]s*"):
        assert asset(file.name)


def test_modules_see_only_what_they_import() -> None:
    script = html_page({"a": "</script>"}).split("<script>")[1]
    assert "</script>" in script and script.count("</script>") == 1
    names = re.findall(r'^modules\["(.+?)"\]', script, re.MULTILINE)
    assert names[-1] == "replay.js" and len(names) == len(set(names))
    for name in names:
        used = re.findall(r'modules\["(.+?)"\];', script.split(f'modules["{name}"] = ')[1])
        assert set(used) <= set(names)


def test_the_command_is_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(write_page, ReplaySettings, ["--help"], prog="expertflow replay")
    assert caught.value.code == 0
    assert "HTML" in capsys.readouterr().out
