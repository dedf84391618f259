"""The encoders by the names that users give."""

from __future__ import annotations

from runtime.weights.encodings.encoders.fp8_block import FP8Encoder
from runtime.weights.encodings.encoders.grid import Encoder
from runtime.weights.encodings.encoders.int4_group import Int4Encoder
from runtime.weights.encodings.encoders.mxfp4 import MXFP4Encoder
from runtime.weights.encodings.encoders.nvfp4 import NVFP4Encoder

ENCODERS = ("mxfp4", "int4", "fp8", "nvfp4")


def find_encoder(name: str, group: int = 32) -> Encoder:
    """The encoder of that name. group: weights that share a scale in int4.

    Raises ValueError for a name that is none, and for a group that int4 does not have.
    """
    if name not in ENCODERS:
        raise ValueError(f"encoding={name!r} is not one of {', '.join(ENCODERS)}")
    if group not in (32, 128) or (group != 32 and name != "int4"):
        raise ValueError(f"group={group} is for int4 alone, and 32 or 128")
    if name == "int4":
        return Int4Encoder(columns=group)
    if name == "mxfp4":
        return MXFP4Encoder()
    return FP8Encoder() if name == "fp8" else NVFP4Encoder()
