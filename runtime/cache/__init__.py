"""The expert cache: its slot table, its policies and its counts.

expert_cache     slots, their owners, and the choice of victims
policy           the contract: one value for every expert
policies         all policies by name
rules            a package: the free rules (LRU, LFU, ClassLRU, LFRU, ARC ...)
predicted_reuse  probabilistic Belady; belady: the optimum, which knows the future
blend            several forecasts in one, by weights that are learnt online
forecast         probabilities of use, soon and later
stats            hits, late, misses, bytes and times; due_counts: those that are made later
"""
