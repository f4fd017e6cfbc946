"""The bundled demo: a small trained model of Phi-3's architecture and a held-out text."""

from importlib.resources import files
from pathlib import Path

__all__ = ["heldout_path", "model_path"]


def model_path() -> Path:
    """Folder of the demo's checkpoint."""
    return Path(str(files(__name__) / "model"))


def heldout_path() -> Path:
    """Standard-library sources that were left out of the training, for evaluation."""
    return Path(str(files(__name__) / "heldout.txt"))
