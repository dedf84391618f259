"""Key/value caches.

static_cache     the cache of captured steps: transformers' StaticCache over shared storage
row_cache        one row for each sequence that is served
own_attention    attention of a model's layers by a function of our own
private_configs  configurations of one model's own while it is served
attention_kinds  the kinds of attention of a model's layers, and which can be captured
size             sizes of caches
"""
