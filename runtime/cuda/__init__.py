"""The CUDA backend: decode steps as CUDA graphs over slots on the device, prompts over streams.

Only `runtime.loading` imports it, and only for a CUDA device: nothing else needs Triton.

backend        experts of one model on a GPU: what the engine calls
options        settings of captured steps; prefetching: the one decision whether to prefetch
trial          ways to run steps, tried in turns by the clock
device_budget  a memory budget on a GPU
single_tokens  the tokens of a captured step, and their attention
streams        order between the threads and streams that use one engine
compiling/     steps fused by torch.compile, at once or beside plain ones
decode/        captured steps; prefill/: many tokens
memory/        both ends of the link; kernels/: Triton
share/         the CPU's share of missed experts
"""
