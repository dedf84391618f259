"""Layouts of whole numbers of 4 bits in checkpoints.

packed   rows of words, as compressed-tensors stores them
qweight  words across, as GPTQ and AWQ store them
"""
