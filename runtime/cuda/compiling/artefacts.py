"""The compiler's artefacts on disk, so that a later load of the model compiles nothing anew.

torch keeps compiled graphs and kernels in a folder for temporary files, under keys of their
content: what lies there can be missing but not wrong. A file here holds those of one step of one
model, for one GPU and one set of versions, and is put back there before the step is compiled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.compiler._cache import CacheArtifactManager

LIMIT = 1 << 30
"""Bytes that the folder may hold; the files that were used longest ago go first."""
SUFFIX = ".artefacts"
PACKAGES = "torch", "triton", "transformers", "moe-expertflow"
NOT_THE_MODEL = "_name_or_path", "transformers_version", "torch_dtype", "dtype"

log = logging.getLogger(__name__)
_said: set[str] = set()


def folder() -> Path:
    """Where artefacts are kept: beside torch's own if their place was chosen, else in the user's
    cache. It may be removed at any time.
    """
    if chosen := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return Path(chosen) / "expertflow"
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "expertflow" / "compiled"


class Artefacts:
    """The artefacts of what `description` names in full; any JSON, of which the file's name is a
    hash.
    """

    def __init__(self, description: Any) -> None:
        text = json.dumps([description, versions()], sort_keys=True, default=str)
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.path = folder() / f"{name}{SUFFIX}"

    @property
    def exist(self) -> bool:
        """Whether there is a file, damaged or not."""
        return self.path.is_file()

    def load(self) -> bool:
        """Give torch's caches what is in the file. False: there is none, or it is damaged."""
        try:
            whole = self.path.read_bytes()
            digest, content = whole[:32], whole[32:]
            if hashlib.sha256(content).digest() != digest:
                raise ValueError("the file is damaged")
            if torch.compiler.load_cache_artifacts(content) is None:
                raise ValueError("torch does not read it")
            os.utime(self.path)
        except FileNotFoundError:
            return False
        except Exception as error:  # of the file system, of torch's format
            _say(f"compiled steps are not taken from {self.path}: {error}")
            return False
        return True

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what is compiled, or found in torch's caches, within the block."""
        from torch._dynamo.utils import counters  # lazy: seconds, for those who compile

        before = counters["inductor"]["fxgraph_cache_miss"]
        with CacheArtifactManager.with_fresh_cache():
            yield
            if self.exist and counters["inductor"]["fxgraph_cache_miss"] == before:
                return
            saved = torch.compiler.save_cache_artifacts()
        if saved is not None:
            self._write(saved[0])

    def _write(self, content: bytes) -> None:
        """Replace the file as a whole: other processes may read or write it meanwhile."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            made, name = tempfile.mkstemp(dir=self.path.parent, prefix=".part-")
            try:
                with os.fdopen(made, "wb") as file:
                    file.write(hashlib.sha256(content).digest() + content)
                os.replace(name, self.path)
            except BaseException:
                os.unlink(name)
                raise
            _prune(self.path)
        except OSError as error:
            _say(f"compiled steps are not kept in {self.path.parent}: {error}")

    def discard(self) -> None:
        """Remove the file: what is in it did not help."""
        with suppress(OSError):
            self.path.unlink()


def _prune(newest: Path) -> None:
    """Remove files used longest ago, beyond `LIMIT` bytes in all, but not the newest."""
    found = []
    for path in newest.parent.glob(f"*{SUFFIX}"):
        with suppress(OSError):
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    found.sort(reverse=True)
    held = 0
    for _, num_bytes, path in found:
        held += num_bytes
        if held > LIMIT and path != newest:
            with suppress(OSError):
                path.unlink()


def _say(what: str) -> None:
    """Warn of what only costs time, once a process."""
    if what not in _said:
        _said.add(what)
        log.warning("%s", what)


def versions() -> dict[str, str]:
    """Of all that decides how a model is compiled."""
    found = {"python": platform.python_version(), "abi": sys.implementation.cache_tag or ""}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def device_name(device: torch.device) -> str:
    """The kind of device that is compiled for."""
    if device.type != "cuda":
        return f"{device.type} {platform.machine()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} {major}.{minor}"


def model_description(model: Any) -> dict[str, Any]:
    """The configuration of a model, wherever it was loaded from."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in NOT_THE_MODEL}
    attention = model.config._attn_implementation
    return {"class": type(model).__qualname__, "config": config, "dtype": str(model.dtype),
            "attention": attention}  # fmt: skip
