"""Experts read one by one from where they lie in a safetensors checkpoint.

transformers' own conversion mapping says which checkpoint tensors make up a parameter. The two
common layouts are copied straight into the slot; any other runs through the library's operations,
over one expert's tensors.

    on disk                                              parameter
    experts.3.gate_proj, experts.3.up_proj  [I, H] each  gate_up_proj[3]  [2I, H]
    experts.gate_up_proj  [E, 2I, H]                     gate_up_proj[3]  [2I, H]
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from routing.layers import MoELayer
from runtime.arena import Spec, Specs
from runtime.store import ExpertStore, expert_parameters

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Sources(NamedTuple):
    """The checkpoint tensors of one parameter of one MoE layer."""

    patterns: dict[str, list[str]]
    """Keys by source pattern, in the order of concatenation; E of them, or one fused tensor."""
    operations: list[Any]
    """The library's conversion operations; empty where the tensor is the parameter."""
    converter: Any

    @property
    def merged(self) -> bool:
        """True where each expert has tensors of its own, to be merged."""
        return any(type(operation).__name__ == "MergeModulelist" for operation in self.operations)


class CheckpointFiles:
    """The tensors of a checkpoint directory, memory-mapped.

    Raises ValueError when the directory has no safetensors, or a file is missing or truncated.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._handles: dict[str, Any] = {}
        self.file_of_key = self._index()

    def _index(self) -> dict[str, str]:
        path = self.directory / INDEX
        if path.is_file():
            try:
                index = dict(json.loads(path.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is not an index of weights ({error!r})") from error
            keys = {file: set(self._open(file).keys()) for file in dict.fromkeys(index.values())}
            for key, file in index.items():
                if key not in keys[file]:
                    raise ValueError(f"{path} names {key} in {file}, but it is not there")
            return index
        if not (self.directory / SINGLE).is_file():
            raise ValueError(
                f"{self.directory} has no {SINGLE} or {INDEX}: only safetensors are read"
            )
        return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(self.directory / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{self.directory / file} is missing or damaged ({error}); fetch it again"
                ) from error
        return self._handles[file]

    def get(self, key: str) -> Tensor:
        """The tensor `key`, as pages of the mapped file."""
        tensor: Tensor = self._slice_owner(key).get_tensor(key)
        return tensor

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor `key`."""
        tensor: Tensor = self._slice_owner(key).get_slice(key)[start:stop]
        return tensor

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of `key`, from the file's header."""
        return tuple(self._slice_owner(key).get_slice(key).get_shape())

    def _slice_owner(self, key: str) -> Any:
        try:
            return self._open(self.file_of_key[key])
        except KeyError:
            raise ValueError(f"{self.directory} has no tensor {key}") from None


class CheckpointStore(ExpertStore):
    """Reads experts of fused containers from a checkpoint directory, on demand.

    model: the stock model on the meta device, for shapes and names. layers: the live containers.
    Raises ValueError, naming the tensor, when an expert is missing or has another shape.
    """

    def __init__(
        self, directory: Path, model: nn.Module, layers: list[MoELayer], dtype: torch.dtype
    ) -> None:
        self._files = CheckpointFiles(directory)
        self._layers = layers
        stock = [
            expert_parameters(layer._replace(module=model.get_submodule(layer.name)))
            for layer in layers
        ]
        self._specs = [
            {name: Spec(tuple(parameter.shape[1:]), dtype) for name, parameter in parameters}
            for parameters in stock
        ]
        self._sources = self._find_sources(model)
        for layer, sources, specs in zip(layers, self._sources, self._specs, strict=True):
            for name, source in sources.items():
                self._check_counts(f"{layer.name}.{name}", source, layer.num_experts)
                if _is_plain(source):
                    self._check_shapes(source, specs[name], layer.num_experts)

    def specs(self, layer: int) -> Specs:
        return self._specs[layer]

    @torch.no_grad()
    def read(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        for name, target in into.items():
            self._read_parameter(self._sources[layer][name], expert, target)

    def restore(self, layer: int) -> None:
        module, num_experts = self._layers[layer].module, self._layers[layer].num_experts
        whole = {
            name: torch.empty(num_experts, *spec.shape, dtype=spec.dtype)
            for name, spec in self._specs[layer].items()
        }
        for expert in range(num_experts):
            self.read(layer, expert, {name: tensor[expert] for name, tensor in whole.items()})
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        for name, tensor in whole.items():
            setattr(module, name, nn.Parameter(tensor.to(device)))

    def _find_sources(self, model: nn.Module) -> list[dict[str, Sources]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        prefix, names = model.base_model_prefix, model.state_dict()
        keys: dict[str, dict[str, list[str]]] = {}
        for key in sorted(self._files.file_of_key, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, names)  # type: ignore[arg-type]
            keys.setdefault(name, {}).setdefault(pattern or "", []).append(key)
        by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
        return [
            {name: self._sources_of(f"{layer.name}.{name}", keys, by_pattern) for name in specs}
            for layer, specs in zip(self._layers, self._specs, strict=True)
        ]

    def _sources_of(
        self, name: str, keys: dict[str, dict[str, list[str]]], by_pattern: dict[str, Any]
    ) -> Sources:
        found = keys.get(name)
        if not found:
            raise ValueError(f"{self._files.directory} has no tensors for the experts {name}")
        if set(found) == {""}:
            return Sources(found, [], None)
        converter = by_pattern[next(iter(found))]
        ordered = {p: found[p] for p in converter.source_patterns if p in found}
        return Sources(ordered, list(converter.operations), converter)

    def _read_parameter(self, sources: Sources, expert: int, target: Tensor) -> None:
        if _is_plain(sources):
            start = 0
            for keys in sources.patterns.values():
                tensor = self._expert_rows(sources, keys, expert)[0]
                stop = start + len(tensor)
                target[start:stop].copy_(tensor)
                start = stop
        else:
            target.copy_(self._convert(sources, expert))

    def _expert_rows(self, sources: Sources, keys: list[str], expert: int) -> Tensor:
        """One expert's part [1, ...] of the tensors `keys`."""
        if sources.merged:
            return self._files.get(keys[expert])[None]
        return self._files.rows(keys[0], expert, expert + 1)

    def _convert(self, sources: Sources, expert: int) -> Tensor:
        """One expert's tensors through the library's operations, as a list of length one."""
        rows = {p: self._expert_rows(sources, keys, expert) for p, keys in sources.patterns.items()}
        tensors: dict[str, Any] = {
            pattern: [tensor[0] if sources.merged else tensor] for pattern, tensor in rows.items()
        }
        for operation in sources.operations:
            tensors = operation.convert(
                tensors,
                source_patterns=sources.converter.source_patterns,
                target_patterns=sources.converter.target_patterns,
            )
        result: Tensor = next(iter(tensors.values()))[0]
        return result

    def _check_counts(self, name: str, source: Sources, num_experts: int) -> None:
        """Every tensor is there: fail at load, not at the first token."""
        needed = num_experts if source.merged else 1
        for pattern in source.converter.source_patterns if source.converter else source.patterns:
            keys = source.patterns.get(pattern, [])
            if len(keys) != needed:
                absent = _first_absent(keys, num_experts) if source.merged else None
                raise ValueError(
                    f"{self._files.directory}: the experts {name} need {needed} tensors {pattern}, "
                    f"but there are {len(keys)}" + (f"; {absent} is missing" if absent else "")
                )

    def _check_shapes(self, source: Sources, spec: Spec, num_experts: int) -> None:
        experts = () if source.merged else (num_experts,)
        expected = (*experts, spec.shape[0] // len(source.patterns), *spec.shape[1:])
        for keys in source.patterns.values():
            for key in keys:
                if self._files.shape(key) != expected:
                    raise ValueError(
                        f"{self._files.directory}: {key} has shape {self._files.shape(key)}, but "
                        f"the model needs {expected}"
                    )


def _first_absent(keys: list[str], num_experts: int) -> str | None:
    """The first tensor that should be among `keys`, by the expert's number in their names."""
    for expert in range(num_experts):
        name = re.sub(r"\.\d+\.(?!.*\.\d+\.)", f".{expert}.", keys[0]) if keys else None
        if name not in keys:
            return name
    return None


def _is_plain(sources: Sources) -> bool:
    """True where an expert's parameter is its tensors stacked along dimension 0 of the expert."""
    steps = [(type(op).__name__, getattr(op, "dim", None)) for op in sources.operations]
    merge, join = ("MergeModulelist", 0), ("Concatenate", 1)
    return steps in ([], [merge], [merge, join])
