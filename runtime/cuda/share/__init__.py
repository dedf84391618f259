"""The CPU's share of the experts that a captured step misses.

cpu_share     decides and owns it: built in the background, compared bit by bit, tried by the clock
share_trial   the trial
order_to_cpu  the doorbell, as the kernels of a step see it
shape         the host tier's blocks, as the CPU's kernels see them
sum_order     the order of a kernel's sums, read off what Triton compiled
"""
