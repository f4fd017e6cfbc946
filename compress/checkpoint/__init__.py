"""Checkpoints: shard headers, weights by name, side files, the Hub and URLs."""
