"""Encodings: experts kept in codes of 4 or 8 bits, exactly as their checkpoint stores them.

encoding        the contract: parts of a coded matrix, and what they decode to
mxfp4           4 bits (e2m1) and a power of two for each 32
fp8_block       8 bits (e4m3) and a scale for each block
table           all encodings, and the matrices of a checkpoint that are in one
coded           the coded parameters of an expert
stored_matrix   a coded matrix as a checkpoint keeps it
stored_parts    checks and conversions of its tensors
number_formats  numbers of 4 and 8 bits that torch does not compute with
"""
