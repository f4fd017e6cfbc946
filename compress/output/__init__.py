"""The output folder: locks, ledger, checksums, provenance, cache, push."""
