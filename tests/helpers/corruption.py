"""Damage to files on a disk, at random but repeatable: what a reader must refuse or read rightly.

python -m tests.helpers.corruption --count 2000      damages traces, and says what was not noticed
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

Damage = Callable[[Path, Sequence[Path], np.random.Generator], str]
"""Damages one file (of several); returns what it did."""


def flip_bit(path: Path, _: Sequence[Path], random: np.random.Generator) -> str:
    data = bytearray(path.read_bytes())
    place, bit = int(random.integers(len(data))), int(random.integers(8))
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {place} flipped"


def change_bytes(path: Path, _: Sequence[Path], random: np.random.Generator) -> str:
    data = bytearray(path.read_bytes())
    size = int(random.integers(1, min(64, len(data)) + 1))
    place = int(random.integers(len(data) - size + 1))
    data[place : place + size] = random.bytes(size)
    path.write_bytes(data)
    return f"{size} bytes at {place} overwritten"


def swap_bytes(path: Path, _: Sequence[Path], random: np.random.Generator) -> str:
    data = bytearray(path.read_bytes())
    one, other = (int(place) for place in random.integers(len(data), size=2))
    data[one], data[other] = data[other], data[one]
    path.write_bytes(data)
    return f"bytes {one} and {other} swapped"


def truncate(path: Path, _: Sequence[Path], random: np.random.Generator) -> str:
    data = path.read_bytes()
    kept = int(random.integers(len(data)))
    path.write_bytes(data[:kept])
    return f"truncated to {kept} bytes"


def zero_tail(path: Path, _: Sequence[Path], random: np.random.Generator) -> str:
    """A file whose last blocks were never written, as after a power cut."""
    data = path.read_bytes()
    kept = int(random.integers(len(data)))
    path.write_bytes(data[:kept] + bytes(len(data) - kept))
    return f"zeros from byte {kept}"


def extend(path: Path, _: Sequence[Path], random: np.random.Generator) -> str:
    size = int(random.integers(1, 64))
    path.write_bytes(path.read_bytes() + random.bytes(size))
    return f"{size} bytes appended"


def remove(path: Path, _: Sequence[Path], random: np.random.Generator) -> str:
    path.unlink()
    return "removed"


def swap_files(path: Path, paths: Sequence[Path], random: np.random.Generator) -> str:
    other = paths[int(random.integers(len(paths)))]
    ours, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(ours)
    return f"swapped with {other.name}"


def replace_by(path: Path, paths: Sequence[Path], random: np.random.Generator) -> str:
    other = paths[int(random.integers(len(paths)))]
    path.write_bytes(other.read_bytes())
    return f"replaced by {other.name}"


DAMAGES: tuple[Damage, ...] = (
    flip_bit, change_bytes, swap_bytes, truncate, zero_tail, extend, remove, swap_files, replace_by,
)  # fmt: skip


def unnoticed(
    source: Path, read: Callable[[Path], object], *, count: int, seed: int = 0
) -> list[str]:
    """Damage `count` copies of the directory `source`; the damage that `read` got wrong.

    read: its result must be that of the whole directory, or it must raise a ValueError that names
    a file of the directory. Each copy suffers one of `DAMAGES` in one of its files.
    """
    expected, failures = read(source), []
    for number in range(count):
        random = np.random.default_rng([seed, number])
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copytree(source, Path(folder) / source.name)
            paths = sorted(path for path in copy.rglob("*") if path.is_file())
            path = paths[int(random.integers(len(paths)))]
            names = {path.name for path in paths}
            damage = DAMAGES[number % len(DAMAGES)]
            done = f"{number}: {path.name} {damage(path, paths, random)}"
            try:
                if read(copy) != expected:
                    failures.append(f"{done}: read wrongly")
            except ValueError as error:
                if not any(name in str(error) for name in names):
                    failures.append(f"{done}: the error names no file: {error}")
            except Exception as error:  # any other error is a crash, which is a finding
                failures.append(f"{done}: {error!r}")
    return failures


def read_trace(directory: Path) -> object:
    """All that a reader gives of both stacks of `write_small_trace`, comparable."""
    from routing.shards import TraceReader

    found: list[object] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for stack in ("encoder", "decoder"):
            reader = TraceReader(directory, stack)
            found += [reader.labels, reader.provenance, reader.complete, reader.with_weights]
            for document in reader.documents():
                ahead = [x.tobytes() for pair in document.lookahead.values() for x in pair]
                assert document.weights_TLK is not None
                arrays = (
                    document.token_ids_T, document.experts_TLK, document.phase_T,
                    document.weights_TLK,
                )  # fmt: skip
                found += [document.label, ahead, *(array.tobytes() for array in arrays)]
    return found


def write_small_trace(directory: Path) -> Path:
    """A trace with everything in it: two stacks, weights, a look-ahead, three shards of each."""
    from routing.lookahead import GATE, LookAhead
    from routing.shards import Document
    from routing.topology import Layer, Stack, Topology
    from routing.writer import TraceWriter

    layers = tuple(Layer(f"layers.{n}", 8, 2) for n in range(3))
    stacks = tuple(Stack(name=name, layers=layers) for name in ("encoder", "decoder"))
    topology = Topology(model_type="toy", vocab_size=99, stacks=stacks, model="f00d")
    random = np.random.default_rng(0)

    def document(length: int) -> Document:
        experts = random.integers(0, 8, (length, 3, 2)).astype(np.uint8)
        ahead = LookAhead(
            random.integers(0, 8, (length, 3, 1, 4)).astype(np.uint8),
            random.random((length, 3, 1, 4)).astype(np.float16),
        )
        return Document(
            random.integers(0, 99, length).astype(np.int32), experts, np.zeros(length, np.uint8),
            f"label {length}", random.random((length, 3, 2)).astype(np.float16), {GATE: ahead},
        )  # fmt: skip

    with TraceWriter(
        directory, topology, provenance={"model": "toy"}, with_weights=True,
        lookahead={GATE: 1}, shard_tokens=8,
    ) as writer:  # fmt: skip
        for length in (3, 4, 5, 2, 6):
            writer.add({"encoder": document(length), "decoder": document(length + 1)})
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = write_small_trace(Path(folder) / "trace")
        failures = unnoticed(source, read_trace, count=options.count, seed=options.seed)
    print("\n".join(failures), end="\n" * bool(failures))
    print(f"{options.count} damaged traces, {len(failures)} of them not refused by name")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
