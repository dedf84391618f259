"""Parts of the trace format: the manifest and its checks, the checks of a shard, and the lock."""
