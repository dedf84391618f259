"""Configurations, classes and tokenizers of Hugging Face models, read without running their code.

A repository may bring Python files of its own (`auto_map`). They are never run, and nobody is asked
whether they may: every call of the Auto classes says `trust_remote_code=False`.
"""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

CONFIG = "config.json"
DISTRIBUTION = "moe-expertflow"
DECODED_METHODS = ("mxfp4", "fp8", "mxfp8", "compressed-tensors")
"""Quantisations whose weights transformers decodes as it loads them."""
QUANTISERS_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Descriptions of weights in codes, which transformers takes for plain ones."""
SCALE = re.compile(r"(?P<codes>.*(weight|_proj))_scale(_inv)?$")
"""Names of scales, and of their codes."""


def read_config(model: str | Path, **hub: Any) -> Any:
    """The configuration of a model: a directory, a `config.json`, or an id on the Hub.

    hub: `revision`, `token` and `cache_dir`, as transformers takes them.
    Raises ValueError for a configuration that is missing or cannot be used, OSError from the Hub.
    """
    from transformers import AutoConfig, PretrainedConfig

    path = Path(model)
    file = path / CONFIG if path.is_dir() else path
    is_local = path.is_dir() or path.is_file()
    if is_local:
        fields = read_json(file)
    else:
        fields, _ = PretrainedConfig.get_config_dict(str(model), **hub)
    name = str(file) if is_local else f"{CONFIG} of {model}"
    _require_known(fields, name)
    try:
        return AutoConfig.from_pretrained(str(model), trust_remote_code=False, **hub)
    except Exception as error:  # each architecture checks its fields in its own way
        raise ValueError(f"{name} cannot be used: {brief(error)}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, naming the file, for anything else."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file.parent} is not a model directory: it has no {file.name}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({brief(error)})") from error
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{file} cannot be used: it is not JSON ({brief(error)})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} cannot be used: it holds no JSON object, but {brief(data):.40}")
    return data


def model_class(config: Any) -> Any:
    """The class of transformers for `config`, including wrappers of text models.

    Raises ValueError where transformers has none, and where the configuration names none.
    """
    import transformers

    names = config.architectures
    if not names:
        _without_architecture(config)
    name = str(names[0] if isinstance(names, list) else names)
    found: Any = getattr(transformers, name, None)
    if not _is_model_class(found):
        fields = {"transformers_version": getattr(config, "transformers_version", None)}
        raise ValueError(
            f"transformers {transformers.__version__} has no architecture {name}; {_advice(fields)}"
        )
    expected: Any = found.config_class
    if expected is not None and not isinstance(config, expected):
        raise ValueError(
            f"architectures names {name}, which belongs to model_type {expected.model_type!r}, but "
            f"model_type is {config.model_type!r}"
        )
    return found


def _is_model_class(found: Any) -> bool:
    from transformers import PreTrainedModel

    return isinstance(found, type) and issubclass(found, PreTrainedModel)


def load_plain(model: str, config: Any, dtype: str = "auto") -> Any:
    """The model, with plain weights: those of a quantised one are decoded as they are loaded.

    Raises ValueError for a quantisation that transformers cannot undo, or of which it loses scales.
    """
    is_coded = require_plain_weights(model, config)
    options = {"config": config, "dtype": dtype, "trust_remote_code": False}
    try:
        loaded, report = model_class(config).from_pretrained(
            model, output_loading_info=True, **options
        )
    except (RuntimeError, ImportError) as error:
        if not is_coded:
            raise
        raise ValueError(_stays_coded(model, f"its weights cannot be ({brief(error)})")) from error
    unexpected = set(report["unexpected_keys"])
    for key in sorted(unexpected):
        scale = SCALE.match(key)
        if scale is not None and scale["codes"] not in unexpected:
            raise ValueError(_stays_coded(model, f"it leaves out {key}"))
    return loaded


def require_plain_weights(model: str, config: Any) -> bool:
    """Have transformers decode the weights of a quantised model; True if it is one.

    Raises ValueError for a quantisation that transformers cannot undo.
    """
    described = getattr(config, "quantization_config", None)
    if described is None:
        if getattr(config.get_text_config(), "quantization_config", None) is not None:
            raise ValueError(_stays_coded(model, "it cannot undo a quantisation of a part"))
        for name in QUANTISERS_FILES:
            if (Path(model) / name).is_file():
                raise ValueError(_stays_coded(model, f"it does not read {name}"))
        return False
    fields = described if isinstance(described, dict) else described.to_dict()
    method = fields.get("quant_method")
    if method not in DECODED_METHODS:
        raise ValueError(_stays_coded(model, f"it cannot undo the quantisation {method}"))
    groups = (fields.get("config_groups") or {}).values()
    formats = [str(group.get("format")) for group in (fields, *groups)]
    if any("nvfp4" in name for name in formats):
        raise ValueError(_stays_coded(model, "it leaves out the global scales of nvfp4"))
    config.quantization_config = fields | {"dequantize": True}
    return True


def _stays_coded(model: str, reason: str) -> str:
    return (
        f"transformers cannot turn {model} into plain weights: {reason}; take the model's "
        f"unquantised twin, which has the same experts, or record a trace with "
        f"runtime.load({model!r}, record=DIR), which runs it in its own codes"
    )


def read_tokenizer(model: str | Path, **hub: Any) -> Any:
    """The tokenizer of a model: a directory or an id on the Hub. Raises ValueError.

    hub: `revision`, `token` and `cache_dir`, as transformers takes them.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(model), trust_remote_code=False, **hub)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library raises plain ones, and panics
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"the tokenizer in {model} cannot be used: it is code of the repository's own, "
                "which is never run; pass tokenizer= with one that you have loaded yourself"
            ) from error
        raise ValueError(f"the tokenizer in {model} cannot be used: {brief(error)}") from error


def brief(error: object) -> str:
    """Another library's message, on one line and at most 300 characters long."""
    return f"{' '.join(str(error).split()):.300}"


def _require_known(fields: dict[str, Any], name: str) -> None:
    """Raise ValueError for a configuration of no model type that transformers has."""
    import transformers

    kind = fields.get("model_type")
    if not kind:
        raise ValueError(
            f"{name} cannot be used: it has no model_type, so it is not a transformers model (or "
            "is an adapter, a pipeline's part, or in its publisher's own format)"
        )
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        own = ", and code of the repository's own (auto_map) is never run"
        raise ValueError(
            f"{name} cannot be used: transformers {transformers.__version__} has no model type "
            f"{kind!r}{own if fields.get('auto_map') else ''}; {_advice(fields)}"
        )


def _without_architecture(config: Any) -> NoReturn:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    usual = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    usual = usual[0] if isinstance(usual, (list, tuple)) else usual
    example = f'"architectures": ["{usual or "...ForCausalLM"}"]'
    raise ValueError(f"it names no architectures, so no class for the weights; add {example}")


def _advice(fields: dict[str, Any]) -> str:
    """A remedy that keeps the transformers releases which this package works with."""
    import transformers

    needed, saved = supported_transformers(), fields.get("transformers_version")
    is_newer = isinstance(saved, str) and _numbers(saved) > _numbers(transformers.__version__)
    if is_newer and not _is_within(str(saved), needed):
        return (
            f"it was saved by transformers {saved}, and this release of {DISTRIBUTION} works with "
            f"{needed}: it takes a later release of {DISTRIBUTION}"
        )
    if is_newer:
        return f"it was saved by transformers {saved}: pip install 'transformers=={saved}'"
    return (
        f"try pip install -U '{needed}', the releases that this one of {DISTRIBUTION} works with; "
        f"if none of them has it, it takes a later {DISTRIBUTION}"
    )


def supported_transformers() -> str:
    """The requirement on transformers, as the installed package declares it."""
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        requirements = []
    for requirement in requirements:
        if match := re.match(r"transformers\s*([<>=!~][^;]*)", requirement):
            return "transformers" + ",".join(sorted(match[1].strip().split(","), reverse=True))
    return "transformers"


def _is_within(version: str, requirement: str) -> bool:
    """True if `version` is below the upper bound of `requirement`, where that has one."""
    bound = re.search(r"<([0-9.]+)", requirement)
    return bound is None or _numbers(version) < _numbers(bound[1])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
