"""The manifest of a prepared model: what lies where in its file of blocks.

config.json, tokenizer ...    as in the checkpoint
model.resident.safetensors    all weights but the experts
experts.bin                   the blocks, each on a page boundary
experts.json                  the manifest: offsets of each layer's blocks, and their checksums
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from runtime.weights.arena import Spec, Specs, expert_bytes
from runtime.weights.encodings.coded import CodedMatrix, Coding, part_name
from runtime.weights.encodings.table import from_json, to_json
from runtime.weights.packed.block_layout import CHUNK
from runtime.weights.packed.packed_blocks import PackedBlocks
from runtime.weights.packed.packing import PATCHES

MANIFEST = "experts.json"
BLOCKS = "experts.bin"
VARIANT = "resident"
RESIDENT = f"model.{VARIANT}.safetensors"
PLAIN_SCHEMA = 1
CODED_SCHEMA = 2
"""Of a model with experts in codes, which the first versions cannot read."""
PACKED_SCHEMA = 3
"""Of a model with packed experts, which the versions before cannot read."""
PAGE = 4096
"""Alignment of the blocks in bytes: pages can be registered with a GPU."""


class LayerBlocks(NamedTuple):
    """The blocks of one MoE layer in `experts.bin`."""

    name: str
    """Name of the layer in the model."""
    start: int
    """Offset of the first expert's block, in bytes."""
    parameters: dict[str, tuple[str, list[int]]]
    """dtype and shape of each stored tensor, in their order within a block: parameters, and parts
    of those that are kept in codes."""
    checksums: list[int]
    """CRC-32 of each expert's block, without its padding."""
    codes: dict[str, dict[str, Any]] = {}  # noqa: RUF012 - never changed
    """Of each parameter that is kept in codes, its encoding and shape as JSON."""
    packing: dict[str, Any] | None = None
    """How the blocks are packed: units of a chunk, its patches, and whether matrices are turned."""

    @classmethod
    def of(
        cls, name: str, start: int, specs: Specs, coding: Coding, packed: PackedBlocks | None
    ) -> LayerBlocks:
        """The entry of blocks with stored tensors of these shapes and dtypes, without checksums."""
        parameters = {
            name: (str(spec.dtype).removeprefix("torch."), list(spec.shape))
            for name, spec in specs.items()
        }
        packing = None
        if packed is not None:
            packing = {"chunk": CHUNK, "patches": packed.layout.patches}
            packing |= {"transposed": packed.transposed}
        return cls(name, start, parameters, [], _codes(coding), packing)

    @property
    def specs(self) -> Specs:
        """Shapes and dtypes of the tensors as stored."""
        return {
            name: Spec(tuple(shape), getattr(torch, dtype))
            for name, (dtype, shape) in self.parameters.items()
        }

    @property
    def coding(self) -> Coding:
        """The parameters that are kept in codes.

        Raises ValueError for an encoding that is not known.
        """
        return {
            name: CodedMatrix(from_json(code["encoding"]), tuple(code["shape"]), code["transposed"])
            for name, code in self.codes.items()
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the model's parameters: of those in codes, what they decode to."""
        parts, coding = _part_names(self.coding), self.coding
        shapes = {name: spec.shape for name, spec in self.specs.items() if name not in parts}
        decoded = {
            name: one.shape[::-1] if one.transposed else one.shape for name, one in coding.items()
        }
        return shapes | decoded

    @property
    def packed(self) -> PackedBlocks | None:
        """The layout of packed blocks; None for blocks that are not."""
        if self.packing is None:
            return None
        patches, transposed = self.packing["patches"], self.packing["transposed"]
        return PackedBlocks.of(self.specs, patches, transposed=transposed)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, without its padding."""
        packed = self.packed
        return expert_bytes(self.specs) if packed is None else packed.num_bytes

    @property
    def stride(self) -> int:
        """Bytes from one block to the next."""
        return -(-self.block_bytes // PAGE) * PAGE

    def offset(self, expert: int) -> int:
        """Offset of the block of `expert`, in bytes."""
        return self.start + expert * self.stride

    @property
    def stop(self) -> int:
        """Offset after the last block, without its padding."""
        return self.offset(len(self.checksums) - 1) + self.block_bytes

    def require_intact(self, path: Path, expert: int, checksum: int) -> None:
        """Raise ValueError unless the block of `expert`, in the file `path`, has this CRC-32."""
        if checksum != self.checksums[expert]:
            raise ValueError(
                f"{path}: expert {expert} of {self.name} is damaged; prepare the model again"
            )

    def as_json(self) -> dict[str, Any]:
        """The entry of the manifest."""
        left_out = {"codes": not self.codes, "packing": self.packing is None}
        return {name: one for name, one in self._asdict().items() if not left_out.get(name)}

    def check(self) -> None:
        """Raise ValueError for an entry that contradicts itself."""
        if not isinstance(self.stop, int):
            raise ValueError("offsets are not whole numbers")
        turned = [one["transposed"] for one in (*self.codes.values(), self.packing) if one]
        if not all(isinstance(one, bool) for one in turned):
            raise ValueError("matrices are transposed or not")
        stored = self.specs
        for name, matrix in self.coding.items():
            parts = {part_name(name, part): spec for part, spec in matrix.parts.items()}
            if {part: stored.get(part) for part in parts} != parts:
                raise ValueError(
                    f"{name} in {matrix.encoding.name} has other parts than {', '.join(parts)}"
                )
        packed = self.packed
        if packed is not None and self.packing is not None:
            known = self.packing["chunk"] == CHUNK and packed.layout.patches in PATCHES
            if not known or not packed.layout.can_pack or self.codes:
                raise ValueError(f"{self.name} is packed in a way that is not known")


def is_prepared(directory: Path) -> bool:
    """True for a directory that `runtime.prepare` wrote."""
    return (directory / MANIFEST).is_file()


class Manifest(NamedTuple):
    """The manifest of a prepared directory."""

    layers: list[LayerBlocks]
    is_lossy: bool
    """The experts are not those of the original model any more."""

    @property
    def encodings(self) -> str:
        """Names of the experts' encodings; empty where all are plain."""
        names = {matrix.encoding.name for layer in self.layers for matrix in layer.coding.values()}
        return ", ".join(sorted(names))


def write_manifest(directory: Path, manifest: Manifest, files: Mapping[str, int]) -> None:
    """Write the manifest. files: CRC-32 of each file with other weights."""
    layers = [layer.as_json() for layer in manifest.layers]
    schema = CODED_SCHEMA if any(layer.codes for layer in manifest.layers) else PLAIN_SCHEMA
    if any(layer.packing for layer in manifest.layers):
        schema = PACKED_SCHEMA
    written: dict[str, Any] = {"schema": schema, "layers": layers, "files": dict(files)}
    if manifest.is_lossy:
        written["lossy"] = True
    written["checksum"] = _checksum(written)
    (directory / MANIFEST).write_text(json.dumps(written) + "\n")


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a prepared directory.

    Raises ValueError for a file that is no manifest, one of another version, and a changed one.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if manifest["schema"] not in (PLAIN_SCHEMA, CODED_SCHEMA, PACKED_SCHEMA):
            raise ValueError(f"schema {manifest['schema']}")
        layers = [LayerBlocks(**layer) for layer in manifest["layers"]]
        if not layers:
            raise ValueError("no layers")
        for layer in layers:
            layer.check()
        if "checksum" in manifest and manifest["checksum"] != _checksum(manifest):
            raise ValueError("its checksum is of other contents")
        return Manifest(layers, bool(manifest.get("lossy", False)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a manifest of experts ({error!r}); prepare the model again"
        ) from error


def read_file_checksums(directory: Path) -> dict[str, int]:
    """CRC-32 of each file with other weights; models prepared before there were any have none."""
    files = json.loads((directory / MANIFEST).read_text()).get("files", {})
    named = isinstance(files, dict) and all(Path(name).name == name for name in files)
    if not named:
        raise ValueError(f"{directory / MANIFEST} names files elsewhere; prepare the model again")
    return dict(files)


def _checksum(manifest: Mapping[str, Any]) -> int:
    """CRC-32 of the contents but for the checksum; the first versions wrote none."""
    contents = {name: one for name, one in manifest.items() if name != "checksum"}
    return zlib.crc32(json.dumps(contents, sort_keys=True).encode())


def _codes(coding: Coding) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "encoding": to_json(matrix.encoding),
            "shape": list(matrix.shape),
            "transposed": matrix.transposed,
        }
        for name, matrix in coding.items()
    }


def _part_names(coding: Coding) -> set[str]:
    return {part_name(name, part) for name, matrix in coding.items() for part in matrix.parts}
