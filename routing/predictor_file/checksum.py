"""The checksum of a predictor's file, kept in the file itself.

It is the SHA-256 of the whole file with 64 zeros in its own place. Files written before there was
one have none.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

CHECKSUM_KEY = "expertflow_checksum"
"""The entry of the ONNX file's metadata that holds the checksum."""
UNSTAMPED = "0" * 64
"""The entry's value until the file is stamped."""


def stamp(path: Path) -> None:
    """Replace the value UNSTAMPED of a file's checksum entry by the checksum."""
    data = path.read_bytes()
    assert data.count(UNSTAMPED.encode()) == 1, "one entry to stamp"
    digest = hashlib.sha256(data).hexdigest()
    path.write_bytes(data.replace(UNSTAMPED.encode(), digest.encode()))


def require_intact(path: Path, digest: str) -> None:
    """Raise ValueError where the file's content does not match its checksum."""
    data, written = path.read_bytes(), digest.encode()
    found = hashlib.sha256(data.replace(written, UNSTAMPED.encode(), 1)).hexdigest()
    if len(written) != len(UNSTAMPED) or found != digest:
        raise ValueError(
            f"{path} does not match its checksum: it is damaged or was changed; export it again"
        )
