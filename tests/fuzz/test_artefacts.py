"""A small dose of the artefact fuzzer; `python -m tests.fuzz` gives the large one."""

from __future__ import annotations

from tests.fuzz.artefacts import fuzz
from tests.fuzz.kinds import ARTEFACTS


def test_damaged_artefacts_are_refused_or_read_as_before() -> None:
    findings = fuzz(ARTEFACTS, 25 * len(ARTEFACTS))
    assert not findings.problems()
    assert sum(findings.outcomes.values()) == 25 * len(ARTEFACTS)
    for artefact in ARTEFACTS:
        assert findings.outcomes[artefact.name, "refused"], "damage is noticed at all"
