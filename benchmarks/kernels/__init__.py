"""Tile sizes of the experts' kernels."""
