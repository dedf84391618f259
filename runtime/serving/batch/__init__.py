"""A whole data set, resumable: the parts of `python -m runtime.batch`.

settings     its options
prompts      rows of a data set as requests
journal      results on disk, and going on after an interruption
local        one engine in this process; ray_workers: several, on a Ray cluster
"""
