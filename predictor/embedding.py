"""The token embedding of a model, read from its checkpoint without loading the model."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

NAMES = ("embed_tokens.weight", "shared.weight", "wte.weight", "embed_in.weight")
"""How input embeddings are called in checkpoints, the most common first."""


def read_embedding(directory: Path) -> Tensor:
    """The input embedding, [vocabulary, hidden]. Raises ValueError when there is none."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        file_of_key = json.loads(index.read_text())["weight_map"]
    else:
        file_of_key = dict.fromkeys(_keys(directory / "model.safetensors"), "model.safetensors")
    for name in NAMES:
        keys = [key for key in file_of_key if key.endswith(name)]
        if keys:
            key = min(keys, key=len)
            with safe_open(directory / file_of_key[key], framework="pt") as file:
                embedding: Tensor = file.get_tensor(key)
            return embedding
    raise ValueError(f"{directory} has no token embedding ({', '.join(NAMES)})")


def _keys(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}: name a model directory")
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
