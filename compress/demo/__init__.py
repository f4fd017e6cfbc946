"""The bundled demo: a small trained Phi-3-architecture model and a text it has not seen."""

from importlib.resources import files
from pathlib import Path

__all__ = ["heldout_path", "model_path"]


def model_path() -> Path:
    """Folder of the checkpoint, in the layout of any local model."""
    return Path(str(files(__name__) / "model"))


def heldout_path() -> Path:
    """Standard-library sources that were left out of the training, for evaluation."""
    return Path(str(files(__name__) / "heldout.txt"))
