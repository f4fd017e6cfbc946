"""Programs that tests write with coremltools' builder, saved as packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save_program(program: Any, path: Path) -> Any:
    """Write a MIL program for iOS 18 without graph passes; returns the ``MLModel``."""
    import coremltools as ct

    model = ct.convert(
        program,
        minimum_deployment_target=ct.target.iOS18,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    model.save(str(path))
    return model
