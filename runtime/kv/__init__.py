"""Key/value caches.

static_cache  the cache of captured steps: transformers' StaticCache over shared storage
row_cache     one row for each sequence that is served
size          how large a cache gets
"""
