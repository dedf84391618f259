"""Damaged artefacts: each is refused in one sentence, or reads as before the damage."""

from __future__ import annotations

import shutil
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tests.fuzz.corruption import corrupt

PATIENCE = 60.0
"""Seconds after which reading counts as a hang."""
REFUSALS = (ValueError, OSError)


class Artefact(NamedTuple):
    """A kind of directory that the project reads."""

    name: str
    write: Callable[[Path], None]
    """Fill an empty folder."""
    read: Callable[[Path], Any]
    """Everything that users take from it, in a form that can be compared."""
    checked: bool
    """True where checksums cover it: then no change of content may pass."""


@dataclass
class Findings:
    """Outcomes of a run; empty lists are a pass."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    tracebacks: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    """Damage that a checksum could see and that was read as if it were whole."""

    def problems(self) -> dict[str, list[str]]:
        names = ("tracebacks", "hangs", "accepted")
        return {name: found for name in names if (found := getattr(self, name))}


def fuzz(artefacts: Iterable[Artefact], count: int, seed: int = 0) -> Findings:
    """Damage each artefact in turn, `count` times in all."""
    findings, chosen = Findings(), list(artefacts)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        whole = {}
        for artefact in chosen:
            (root / artefact.name).mkdir()
            artefact.write(root / artefact.name)
            whole[artefact.name] = artefact.read(root / artefact.name)
        for number in range(count):
            artefact = chosen[number % len(chosen)]
            random, folder = Random(f"{seed} {number}"), root / "damaged"
            shutil.copytree(root / artefact.name, folder)
            damage = f"{artefact.name}, {number}: {corrupt(folder, random)}"
            _read(artefact, folder, whole[artefact.name], damage, findings)
            shutil.rmtree(folder)
    return findings


def _read(artefact: Artefact, folder: Path, whole: Any, damage: str, findings: Findings) -> None:
    ended: list[Any] = []

    def target() -> None:
        try:
            ended.append(artefact.read(folder))
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if not ended:
        findings.hangs.append(damage)
        return
    found = ended[0]
    if isinstance(found, REFUSALS) and str(found):
        outcome = "refused"
    elif isinstance(found, BaseException):
        outcome = "traceback"
        shown = "".join(traceback.format_exception(found))[-700:]
        findings.tracebacks.append(f"{damage}\n{shown}")
    elif found == whole:
        outcome = "the same"
    else:
        outcome = "accepted"
        if artefact.checked:
            findings.accepted.append(damage)
    findings.outcomes[artefact.name, outcome] += 1
