"""A whole data set, resumable: the parts of `python -m runtime.batch` that know no HTTP.

settings     its options
files, rows  what data sets are read from
columns      names of what a row says; prompts: rows as requests
journal      results on disk, and going on after an interruption
local        one engine in this process; ray_workers: several, on a Ray cluster
"""
