"""Stored blocks made plain: unpacked or decoded, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.cuda.kernels.coded import reason_against
from runtime.cuda.kernels.unpack import copy_units, decode_matrix, unpack
from runtime.cuda.memory.expert_block import CHUNK, ExpertBlock
from runtime.weights.encodings.coded import decode_expert


def unpack_blocks(block: ExpertBlock, slots_SN: Tensor, picked: Tensor, to_RN: Tensor) -> None:
    """Unpack or decode the stored blocks in slots `picked`, int32 [R], to int16 [R, units], on the
    current stream.
    """
    if block.coding:
        decode_blocks(block, slots_SN, picked, to_RN)
        return
    unpack[(block.units // CHUNK, len(picked))](
        to_RN, slots_SN, picked, UNITS=block.units, STORED=block.stored_units,
        MATRICES=block.matrix_units, CHUNK=CHUNK, PATCHES=block.patches,
    )  # fmt: skip


def decode_blocks(block: ExpertBlock, slots_SN: Tensor, picked: Tensor, to_RN: Tensor) -> None:
    """Decode the stored blocks in slots `picked`, int32 [R], to int16 [R, units], on the current
    stream: by kernels where these can, else by the encodings' own torch. Nothing waits.
    """
    if not kernels_decode(block):
        stored, plain = block.stored_views(slots_SN.index_select(0, picked)), block.views(to_RN)
        for row in range(len(picked)):
            into = {name: view[row] for name, view in plain.items()}
            decode_expert({name: view[row] for name, view in stored.items()}, block.coding, into)
        return
    for name, field in block.fields.items():
        code = block.code(name)
        if code is None:
            source = block.stored_fields[name].start
            copy_units(source, field.start, field.units, slots_SN, picked, to_RN)
        else:
            shape, start = block.coding[name].shape, block.start(name)
            decode_matrix(code, shape, field.dtype, slots_SN, picked, to_RN, start)


def kernels_decode(block: ExpertBlock) -> bool:
    """Whether kernels can decode all matrices in codes to their places in unpacked blocks."""
    return all(
        not matrix.transposed
        and reason_against(matrix) is None
        and block.fields[name].dtype in (torch.bfloat16, torch.float16, torch.float32)
        for name, matrix in block.coding.items()
    )
