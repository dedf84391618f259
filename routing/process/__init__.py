"""Commands as processes.

exits        how they end: one line, an exit code, no traceback
output_lock  one writer of an output at a time
"""
