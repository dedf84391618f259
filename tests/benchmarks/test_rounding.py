"""The benchmark of lossy encodings, rehearsed on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.rounding.__main__ import main
from benchmarks.rounding.settings import EncodingsSettings
from tests.helpers.tiny import save_tiny


def test_every_arm_is_measured_and_the_last_rounding_is_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "hub", "olmoe", intermediate_size=32)
    texts = [tmp_path / "text.txt", tmp_path / "other.txt"]
    texts[0].write_text("Sphinx of black quartz, judge my vow. " * 40)
    texts[1].write_text("The five boxing wizards jump quickly. " * 40)
    settings = EncodingsSettings(
        model=model,
        text=texts[:1],
        calibration=texts[1:],
        encodings=["mxfp4", "fp8"],
        roundings=["nearest", "feedback"],
        tokens=512,
        replay_documents=1,
        out=tmp_path / "out.json",
    )
    main(settings)
    result = json.loads((tmp_path / "out.json").read_text())
    arms = [(row["encoding"], row["rounding"]) for row in result["rows"]]
    assert arms == [
        ("mxfp4", "nearest"), ("mxfp4", "feedback"), ("fp8-block", "nearest"),
        ("fp8-block", "feedback"),
    ]  # fmt: skip
    assert all(row["quality"]["divergence"] > 0 for row in result["rows"])
    assert result["rows"][3]["quality"]["divergence"] < result["rows"][1]["quality"]["divergence"]
    replays = result["replays"]
    assert [one["name"] for one in replays] == ["original", "mxfp4 feedback", "fp8-block feedback"]
    assert replays[0]["in_common"] == 1 > replays[1]["in_common"] > 0.3
    assert all(0 <= rate["hit_rate"] < 1 for one in replays for rate in one["hit_rates"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == result["rows"]
