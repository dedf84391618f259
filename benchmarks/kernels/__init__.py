"""Tile sizes of the experts' and the attention's kernels."""
