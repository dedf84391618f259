"""Quantised checkpoints, seen as their unquantised twins.

quantization  what a directory says of its quantisation, which its configuration then forgets
coded_files   the tensors of a checkpoint under the names and shapes of an unquantised one
parts         the parts of a coded matrix, read into place
stacking      matrices one below the other, as the parameters of an expert have them
refusals      messages about codes that stand for no weights
"""
