"""Commands as processes.

cores        as many threads as there are cores, which sleep while they wait
exits        how they end: one line, an exit code, no traceback
output_lock  one writer of an output at a time
"""
