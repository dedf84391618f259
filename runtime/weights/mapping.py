"""The checkpoint tensors of each model parameter, by transformers' own conversion mapping."""

from __future__ import annotations

import re
from typing import Any

from routing.layers import MoELayer
from runtime.weights.arena import Spec
from runtime.weights.conversion import CheckpointParameter
from runtime.weights.quantised.coded_files import CodedFiles
from runtime.weights.store import expert_parameters, expert_part

MERGING = ("MergeModulelist", "ErnieFuseAndSplitTextVisionExperts")
"""Operations that take a list of one tensor per expert."""


class CheckpointMapping:
    """The tensors of `files`, grouped by the parameter of `model` that they make up.

    model: on the meta device.
    """

    def __init__(self, files: CodedFiles, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        self._directory = files.directory
        self.config = model.config
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        prefix, names = model.base_model_prefix, model.state_dict()
        self._converters = {p: entry for entry in converters for p in entry.source_patterns}
        self._keys: dict[str, dict[str, list[str]]] = {}
        for key in sorted(files.entries, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, names)
            self._keys.setdefault(name, {}).setdefault(pattern or "", []).append(key)

    def require_no_more_layers(self, model: Any) -> None:
        """Raise ValueError if the files have a layer like the model's, beyond those it has.

        A layer with tensors of its own, as one that predicts several tokens has, is ignored.
        """
        names = model.state_dict().keys()
        known = {_without_numbers(name) for name in names}
        ignored = model._keys_to_ignore_on_load_unexpected or []
        groups: dict[str, list[str]] = {}
        for name in self._keys.keys() - names:
            numbered = re.match(r"(.*?\.\d+)\.", name)
            if numbered and not any(re.search(pattern, name) for pattern in ignored):
                groups.setdefault(numbered[1], []).append(name)
        for group in sorted(groups):
            is_new = not any(name.startswith(f"{group}.") for name in names)
            if is_new and all(_without_numbers(name) in known for name in groups[group]):
                raise ValueError(
                    f"{self._directory} has weights of {group}, but config.json describes fewer "
                    "layers; one of the two is of another model"
                )

    def parameters(self, layer: MoELayer) -> dict[str, CheckpointParameter]:
        """The parameters of the experts of `layer` (of the model on the meta device), by name.

        Raises ValueError, naming the parameter, if the checkpoint has no tensors for it.
        """
        names = layer.container.names(layer.module)
        whole = expert_parameters(layer)
        experts = expert_part(layer, names, whole, 0)
        found = {}
        for name in names:
            paths = [layer.container.path(name, e) for e in range(layer.num_experts)]
            shape = tuple(whole[paths[0]].shape)
            found[name] = self._parameter(
                [f"{layer.name}.{path}" for path in dict.fromkeys(paths)],
                spec=Spec(tuple(experts[name].shape), experts[name].dtype),
                shape=shape,
            )
        return found

    def _parameter(self, names: list[str], **shapes: Any) -> CheckpointParameter:
        """names: one, if the experts are stacked in one parameter; else one per expert."""
        found = [self._keys_of(name) for name in names]
        if len(names) > 1:
            keys = {
                "": [key for (pattern,) in (keys.values() for keys in found) for key in pattern]
            }
            return self._build(names[0], keys, None, per_expert=True, **shapes)
        (keys,) = found
        converter = self._converters.get(next(iter(keys)))
        if converter is None:
            return self._build(names[0], keys, None, per_expert=False, **shapes)
        ordered = {p: keys[p] for p in converter.source_patterns if p in keys}
        merging = any(type(operation).__name__ in MERGING for operation in converter.operations)
        return self._build(names[0], ordered, converter, per_expert=merging, **shapes)

    def _build(self, name: str, keys: Any, converter: Any, **fields: Any) -> CheckpointParameter:
        return CheckpointParameter(
            name=name, keys=keys, converter=converter, config=self.config, **fields
        )

    def _keys_of(self, name: str) -> dict[str, list[str]]:
        """The checkpoint keys of one model parameter, by source pattern."""
        keys = self._share_of(name) or self._keys.get(name)
        if not keys:
            raise ValueError(f"{self._directory} has no tensors for the experts {name}")
        return keys

    def _share_of(self, name: str) -> dict[str, list[str]]:
        """The keys of a parameter whose converter makes several parameters; empty for all others.

        `rename_source_key` lists the keys of all of them under the converter's first target.
        """
        for converter in self._converters.values():
            targets = converter.target_patterns
            index = next((i for i, target in enumerate(targets) if name.endswith(target)), None)
            if index is not None and len(targets) > 1:
                keys = self._keys.get(name.replace(targets[index], targets[0]), {})
                return _share(keys, index, len(targets)) if keys else {}
        return {}


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "N", name)


def _share(keys: dict[str, list[str]], index: int, num_shares: int) -> dict[str, list[str]]:
    """The part `index` of `num_shares` equal parts of each list of keys."""
    size = -(-len(next(iter(keys.values()))) // num_shares)
    return {pattern: part[index * size : (index + 1) * size] for pattern, part in keys.items()}
