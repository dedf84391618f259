"""Domains of text: the table in `domains.toml`, checked as it is read."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from exports.corpus.documents import SCRIPTS
from exports.corpus.packages import Package, Registry
from exports.corpus.readers import READERS, Reader
from exports.corpus.records import RECORDS

Role = Literal["model", "predictor", "held_out"]
TABLE = Path(__file__).with_name("domains.toml")
ALL_READERS: dict[str, Reader] = READERS | RECORDS


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files of one package, of one form and under one licence."""

    package: Package
    files: tuple[str, ...]
    """Globs within the unpacked package."""
    licence: str
    skip: tuple[str, ...] = ()
    """Globs of paths that are left out; `*` also stands for slashes."""
    reader: str = "plain"


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One kind of text."""

    name: str
    role: Role
    """`model`: models are trained on it; `predictor`: only predictors; `held_out`: nothing,
    unless a predictor is adapted to it on purpose."""
    limit: float
    """Most MB of UTF-8."""
    sources: tuple[Source, ...]
    script: str = "Latin"

    @property
    def held_out_one_of(self) -> int:
        """One of so many documents is held out. Models need nearly all of their text."""
        return 100 if self.role == "model" else 10

    @property
    def is_code(self) -> bool:
        return self.name.startswith("code_")


def read_domains(path: Path = TABLE) -> dict[str, Domain]:
    """The domains of a table, by name. Raises ValueError for an entry that cannot be meant."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))
    domains = {}
    for name, entry in entries.items():
        try:
            domains[name] = _domain(name, entry)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: domain {name!r}: {error}") from error
    return domains


def _domain(name: str, entry: dict[str, Any]) -> Domain:
    sources = tuple(_source(**source) for source in entry.pop("sources"))
    domain = Domain(name=name, sources=sources, **entry)
    _require(domain.role, get_args(Role), "role")
    _require(domain.script, SCRIPTS, "script")
    return domain


def _source(*, package: str, files: list[str], **others: Any) -> Source:
    registry, name, *version = package.split()
    _require(registry, get_args(Registry), "registry")
    _require(others.get("reader", "plain"), ALL_READERS, "reader")
    if (registry == "debian") == bool(version):
        raise ValueError(f"{package!r}: a version is given on PyPI and npm, and only there")
    whole = Package(registry=registry, name=name, version=" ".join(version))  # type: ignore[arg-type]
    skip = tuple(others.pop("skip", ()))
    return Source(package=whole, files=tuple(files), skip=skip, **others)


def _require(value: str, known: Any, noun: str) -> None:
    if value not in known:
        raise ValueError(f"there is no {noun} {value!r}: there are {', '.join(known)}")
