"""The experts calls of a captured step, in kernels."""
