"""Where every file of a dataset lies, how a shard and the manifest are written, what a run notes on the way."""
