"""Matrices kept in codes, decoded in registers.

code       the code of a matrix: where its parts are in a stored block
decoding   codes to weights
tiles      words and scales out of a block
products   products with vectors and matrices
"""

from runtime.cuda.kernels.coded.code import Code, reason_against

__all__ = ["Code", "reason_against"]
