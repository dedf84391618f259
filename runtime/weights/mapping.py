"""Which tensors of a checkpoint belong to which parameter: transformers' own conversion mapping."""

from __future__ import annotations

from typing import Any

from routing.layers import MoELayer
from runtime.weights.arena import Spec
from runtime.weights.conversion import Sources
from runtime.weights.files import CheckpointFiles
from runtime.weights.store import expert_parameters, expert_part

MERGING = ("MergeModulelist", "ErnieFuseAndSplitTextVisionExperts")
"""The operations that take each expert's tensor from a list."""


class Mapping:
    """The tensors of `files` by the parameter of `model` that they make up.

    model: the stock model on the meta device.
    """

    def __init__(self, files: CheckpointFiles, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        self._directory = files.directory
        self._config = model.config
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        prefix, names = model.base_model_prefix, model.state_dict()
        self._converters = {p: entry for entry in converters for p in entry.source_patterns}
        self._keys: dict[str, dict[str, list[str]]] = {}
        for key in sorted(files.entries, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, names)
            self._keys.setdefault(name, {}).setdefault(pattern or "", []).append(key)

    def sources(self, layer: MoELayer) -> dict[str, Sources]:
        """Where each parameter of an expert of `layer` (of the stock model) comes from.

        Raises ValueError, naming the parameter, when there is nothing for it in the checkpoint.
        """
        names = layer.container.names(layer.module)
        parameters = expert_parameters(layer)
        experts = expert_part(layer, names, parameters, 0)
        found = {}
        for name in names:
            paths = [layer.container.path(name, e) for e in range(layer.num_experts)]
            shape = tuple(parameters[paths[0]].shape)
            found[name] = self._sources(
                [f"{layer.name}.{path}" for path in dict.fromkeys(paths)],
                spec=Spec(tuple(experts[name].shape), experts[name].dtype),
                shape=shape,
            )
        return found

    def _sources(self, names: list[str], **shapes: Any) -> Sources:
        """Of a parameter that all experts share, or that each has in a module of its own."""
        found = [self._found(name) for name in names]
        if len(names) > 1:
            keys = {
                "": [key for (pattern,) in (keys.values() for keys in found) for key in pattern]
            }
            return self._made(names[0], keys, None, per_expert=True, **shapes)
        (keys,) = found
        converter = self._converters.get(next(iter(keys)))
        if converter is None:
            return self._made(names[0], keys, None, per_expert=False, **shapes)
        ordered = {p: keys[p] for p in converter.source_patterns if p in keys}
        merging = any(type(operation).__name__ in MERGING for operation in converter.operations)
        return self._made(names[0], ordered, converter, per_expert=merging, **shapes)

    def _made(self, name: str, keys: Any, converter: Any, **fields: Any) -> Sources:
        return Sources(name=name, keys=keys, converter=converter, config=self._config, **fields)

    def _found(self, name: str) -> dict[str, list[str]]:
        keys = self._split(name) or self._keys.get(name)
        if not keys:
            raise ValueError(f"{self._directory} has no tensors for the experts {name}")
        return keys

    def _split(self, name: str) -> dict[str, list[str]]:
        """The share of a parameter whose tensors are listed with those of others.

        They are found under the name of the converter's first target (`rename_source_key`).
        """
        for converter in self._converters.values():
            targets = converter.target_patterns
            index = next((i for i, target in enumerate(targets) if name.endswith(target)), None)
            if index is not None and len(targets) > 1:
                keys = self._keys.get(name.replace(targets[index], targets[0]), {})
                return _share(keys, index, len(targets)) if keys else {}
        return {}


def _share(keys: dict[str, list[str]], index: int, num_shares: int) -> dict[str, list[str]]:
    size = -(-len(next(iter(keys.values()))) // num_shares)
    return {pattern: part[index * size : (index + 1) * size] for pattern, part in keys.items()}
