"""The predictor file's format: its inputs, outputs, metadata key and constants."""

from __future__ import annotations

METADATA_KEY = "expertflow"
"""The entry of the ONNX file's metadata that holds the JSON description."""
SCHEMA = 1
"""Version of that description."""

HEADS = ("this", "next", "horizon", "far")
"""Outputs, in order: the logits that an expert is used by this token, by the next token, within the
next H tokens, and within the next FAR * H tokens.
"""
OLDEST_HEADS = HEADS[:3]
"""The heads of files written before there was a far horizon."""
FAR = 4
"""Length of the far horizon, in near horizons (H)."""
PRESENT = "present"
"""Output of a graph with a key/value cache: the new tokens' keys and values."""

CACHED_INPUTS = ("token_ids", "routes", "positions", "past", "past_positions")
"""Inputs of a graph that continues from a key/value cache."""
WINDOW_INPUTS = ("token_ids", "positions", "prompt_lengths")
"""Inputs of a graph that runs over its whole window each time."""

PADDING = -1
"""The position of a token that is not there."""
