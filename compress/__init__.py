"""Checkpoints, quantization and verification; format-specific code is in ``exporters``."""

__version__ = "0.1.0"
