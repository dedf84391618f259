"""Free rules: what a cache can do without a predictor, from its own requests alone.

recency     LRU, least stale; frequency: LFU with fading counts
stamped     the contract of rules that age: class_lru (llama.cpp's), lfru (vLLM's score)
hot_set     a fixed set from a trace

All of those are vectors of values, so they run live. The others ask which experts are resident, or
how many fit. A vector of values does not know that, so they are simulated only:

queue_cache   their contract: a cache of its own instead of a policy
arc           ARC; s3_fifo: S3-FIFO; layer_lfru: LFRU as vLLM's pull request has it
"""
