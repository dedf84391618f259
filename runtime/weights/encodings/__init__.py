"""Encodings: experts kept in codes of 4 or 8 bits, exactly as their checkpoint stores them.

encoding        the contract: parts of a coded matrix, and what they decode to
mxfp4           4 bits (e2m1) and a power of two for each 32
fp8_block       8 bits (e4m3) and a scale for each block
int4_group      4 bits (whole numbers) and a scale for some neighbours in a row
integers        its layouts in checkpoints
nvfp4           4 bits (e2m1), a scale for each 16 and one for all
table           all encodings, and the matrices of a checkpoint that are in one
encoders/       plain weights rounded to an encoding, at some loss
coded           the coded parameters of an expert
stored_matrix   a coded matrix as a checkpoint keeps it
stored_parts    checks and conversions of its tensors
blocks          products of codes and the scales of their blocks
number_formats  numbers of 4 and 8 bits that torch does not compute with
"""
