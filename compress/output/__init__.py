"""The output folder: locks, checksums, provenance, push, a pruned checkpoint."""
