"""Which experts stay resident: the expert cache, its policies, and what they counted.

expert_cache  slots, their owners, and who is evicted
policies      LRU, LFU, predicted reuse, Belady: one value for every expert
stats         hits, misses, bytes and times
"""
