"""Memory budgets: the slots that they pay for, and the bandwidth of the link.

units         sizes in text
budget        slots of a budget
memory_plan   the memory and the traffic of a model, before it is loaded (`runtime.plan`)
footprint     its parts as bars and as a picture
row_plan      the number of sequences that decode together
cache_tokens  room of the key/value cache for the tokens of all sequences
host_memory   what of the machine's memory is free
link          the bandwidth between host memory and slots, measured
"""
