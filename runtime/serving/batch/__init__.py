"""`python -m runtime.batch`: a whole data set, resumable.

prompts      rows of a data set as requests
journal      results on disk, and going on after an interruption
ray_workers  the same over Ray
"""
