"""Random damage to a directory of files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.bodies import nasty


def corrupt(folder: Path, random: Random) -> str:
    """Damage one file below `folder`, and say how."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = random.choice(files)
    names = ["bits", "zeros", "cut", "longer", "swapped", "gone", "empty", "another"]
    if path.suffix in (".json", ".jsonl", ".partial"):
        names += ["value"] * 6
    name = random.choice(names)
    _DAMAGE[name](path, random, files)
    return f"{name} in {path.relative_to(folder)}"


def _bits(path: Path, random: Random, _: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    for _bit in range(random.choice((1, 1, 4))):
        if data:
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def _zeros(path: Path, random: Random, _: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    start = random.randrange(len(data) or 1)
    length = min(random.choice((1, 16, 512)), len(data) - start)
    data[start : start + length] = bytes(length)
    path.write_bytes(data)


def _cut(path: Path, random: Random, _: list[Path]) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: random.randrange(len(data) or 1)])


def _longer(path: Path, random: Random, _: list[Path]) -> None:
    path.write_bytes(path.read_bytes() + random.randbytes(random.choice((1, 7, 64))))


def _swapped(path: Path, random: Random, _: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    half = len(data) // 2
    if half:
        length = random.randrange(1, min(half, 64) + 1)
        one, other = random.randrange(half - length + 1), half + random.randrange(half - length + 1)
        data[one : one + length], data[other : other + length] = (
            data[other : other + length],
            data[one : one + length],
        )
    path.write_bytes(data)


def _gone(path: Path, _: Random, __: list[Path]) -> None:
    path.unlink()


def _empty(path: Path, _: Random, __: list[Path]) -> None:
    path.write_bytes(b"")


def _another(path: Path, random: Random, files: list[Path]) -> None:
    other = random.choice(files)
    if other != path:
        shutil.copyfile(other, path)


def _value(path: Path, random: Random, files: list[Path]) -> None:
    """Change, drop or double a value of a JSON file or of one of its lines."""
    lines = path.read_text().splitlines() if path.suffix != ".json" else [path.read_text()]
    place = random.randrange(len(lines) or 1)
    try:
        content = json.loads(lines[place])
    except (ValueError, IndexError):
        return _bits(path, random, files)
    holder, key = random.choice(list(_places(content)) or [([content], 0)])
    if random.random() < 0.2 and isinstance(holder, dict):
        del holder[key]
    elif random.random() < 0.3 and isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[key] = nasty(random)
    lines[place] = json.dumps(content)
    path.write_text("\n".join(lines) + "\n")
    return None


def _places(content: Any) -> Any:
    """All (container, key) pairs of nested JSON."""
    if isinstance(content, dict | list):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from _places(content[key])


_DAMAGE: dict[str, Any] = {
    "bits": _bits, "zeros": _zeros, "cut": _cut, "longer": _longer, "swapped": _swapped,
    "gone": _gone, "empty": _empty, "another": _another, "value": _value,
}  # fmt: skip
