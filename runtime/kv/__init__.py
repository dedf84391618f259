"""Key/value caches.

static_cache     the cache of captured steps: static layers over shared storage
static_layers    its layers, one class for each kind of state
storage          the memory that caches share
row_cache        one row for each sequence that is served
pages/           rows in pieces of one length, taken as sequences grow
own_attention    attention of a model's layers by a function of our own
private_configs  configurations of one model's own while it is served
state_kinds      the kinds of state that layers keep, and which can be captured
size             sizes of caches
"""
