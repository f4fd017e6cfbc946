"""Checkpoints, quantization and verification; what is specific to a format is in ``exporters``."""

__version__ = "0.1.0"
