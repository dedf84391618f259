"""A model on the Hub: small files are fetched and judged first, and then the weights it needs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routing.pretrained import brief
from runtime.weights.files import INDEX, SINGLE, Entry, read_index, stored_shape
from runtime.weights.prepared.manifest import BLOCKS, RESIDENT, is_prepared

SMALL = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
"""Files of the configuration and of the tokenizer."""
SUBFOLDERS = ["*/*"]
PATH_STARTS = (".", "/", "~")


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Where and as whom a model is fetched from the Hub."""

    revision: str | None = None
    """Branch, tag or commit."""
    token: str | bool | None = None
    """Access token; by default that of `hf auth login` or HF_TOKEN."""
    cache_dir: str | Path | None = None
    """Folder to keep fetched files in; by default that of huggingface_hub."""

    def given(self) -> dict[str, Any]:
        """The options that were given, by the names that the Hub's client uses."""
        return {name: value for name, value in vars(self).items() if value is not None}


def refuse_for_module(hub: HubOptions, attention: str | None) -> None:
    """Raise ValueError for options of a model that is loaded, where one in memory was passed."""
    given = hub.given() | ({} if attention is None else {"attn_implementation": attention})
    if given:
        names = ", ".join(f"{name}=" for name in given)
        raise ValueError(f"{names}: the model is in memory already; give them where it is loaded")


def find_directory(path: str | Path, hub: HubOptions = HubOptions()) -> Path:
    """A local directory as it is; of a Hub id, a directory of its small files.

    Raises ValueError when `path` is neither, or the Hub does not hand it out.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if directory.is_file():
        raise ValueError(_about_file(directory))
    if _is_path(path):
        raise ValueError(f"there is no model directory {path}")
    return _fetch(str(path), hub.given(), SMALL, SUBFOLDERS)


def fetch_weights(path: str | Path, directory: Path, hub: HubOptions = HubOptions()) -> None:
    """Fetch the weights of a Hub id into the `directory` that `find_directory` gave for it.

    A local directory stays as it is. Raises ValueError where the Hub does not hand them out.
    """
    if Path(path).expanduser().is_dir():
        return
    _fetch(str(path), hub.given() | _commit(directory), needed(directory), None)


def needed(directory: Path) -> list[str]:
    """Names of the files that hold the weights, by the small files in `directory`."""
    if is_prepared(directory):
        return [RESIDENT, BLOCKS]
    if (directory / INDEX).is_file():
        return sorted(set(read_index(directory / INDEX).values()))
    return [SINGLE]


def _commit(directory: Path) -> dict[str, Any]:
    """The revision whose small files `directory` has, as the Hub's client takes it."""
    name = directory.name
    return {"revision": name} if re.fullmatch(r"[0-9a-f]{40}", name) else {}


def fetch_headers(
    path: str | Path, directory: Path, hub: HubOptions = HubOptions()
) -> dict[str, Entry] | None:
    """The tensors of a Hub id without their content; None where the Hub does not say.

    It reads the first bytes of each file of weights. directory: of the small files.
    """
    import huggingface_hub

    if Path(path).expanduser().exists():
        return None
    options = {name: value for name, value in hub.given().items() if name != "cache_dir"}
    options |= _commit(directory)
    try:
        found = huggingface_hub.get_safetensors_metadata(str(path), **options)
    except Exception:  # the Hub's client raises many kinds
        return None
    return {
        key: Entry(
            file, tensor.dtype, stored_shape(tensor.dtype, tensor.shape), *tensor.data_offsets
        )
        for file, header in found.files_metadata.items()
        for key, tensor in header.tensors.items()
    }


def _fetch(
    name: str, options: dict[str, Any], wanted: list[str], unwanted: list[str] | None
) -> Path:
    import huggingface_hub

    patterns: dict[str, Any] = {"allow_patterns": wanted, "ignore_patterns": unwanted}
    try:
        return Path(huggingface_hub.snapshot_download(name, **(patterns | options)))
    except Exception as error:  # the Hub's client raises many kinds
        raise ValueError(_explain(name, options, error)) from error


def _explain(name: str, options: dict[str, Any], error: Exception) -> str:
    """Another library's refusal as one sentence with its remedy."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return (
            f"{name} is gated: accept its terms at https://huggingface.co/{name}, then pass token= "
            "or log in with `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {options.get('revision')!r} on the hub"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{name} is neither a directory here nor a model the hub hands out: look at its "
            "spelling; a private one needs token= or `hf auth login`"
        )
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        return (
            f"{name} is neither a directory nor a model the hub hands out: it cannot be reached "
            f"(or HF_HUB_OFFLINE is set), and not all of it is in the cache ({brief(error):.120})"
        )
    return f"{name} is neither a directory nor a model the hub hands out ({brief(error)})"


def _is_path(path: str | Path) -> bool:
    """True for what can be no id on the Hub, which is `name` or `owner/name`."""
    text = str(path)
    return isinstance(path, Path) or text.startswith(PATH_STARTS) or text.strip("/").count("/") > 1


def _about_file(file: Path) -> str:
    if file.suffix == ".gguf":
        return (
            f"{file} is a GGUF file: only safetensors are read; load the repository that it was "
            "converted from"
        )
    return f"{file} is a file: give the model's directory"
