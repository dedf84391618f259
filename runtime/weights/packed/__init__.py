"""Experts of bfloat16 weights in 12 bits a weight, lossless: as a GPU keeps them.

packing        the code of a weight, and of a matrix
block_layout   one expert as one piece of memory, as it is or packed
packed_blocks  experts packed into such blocks, and unpacked again
"""
