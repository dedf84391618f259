"""Encoders: plain weights rounded to an encoding, at some loss.

grid         the contract: the numbers that codes stand for, and scales to choose from
rounding     nearest, the best of many scales, and error feedback from column to column
mxfp4, int4_group, fp8_block, nvfp4   the grid of each encoding, and its codes
table        the encoders by name
"""
