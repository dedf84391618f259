"""Prepared models (`runtime.prepare`): every expert is one contiguous block of one file.

manifest   the blocks of each layer: offsets, parameters, encodings, checksums
store      experts read from their blocks
writer     a prepared model written
blocks_file   its blocks, written by threads
loss       the loss of a model whose experts are not its original's any more
checksums  a prepared model compared with its checksums
"""
