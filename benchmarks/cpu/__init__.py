"""Experts computed on the CPU where they lie.

settings    the command's options
blocks      experts of a shape in every encoding
bench       the kernels, torch's products and plain reading, over numbers of threads
decode      a command of its own: a whole model without a GPU
"""
