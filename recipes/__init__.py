"""Recipes that ship with packlight: ``*.yaml`` beside this file, and their JSON schema.

Read with ``importlib.resources``, so that a wheel, an editable install and a checkout all work.
"""

from __future__ import annotations

from importlib.resources import files

__all__ = ["names", "read"]


def names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    found = (entry.name for entry in files(__name__).iterdir())
    return sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml"))


def read(name: str) -> str:
    """The YAML text of a shipped recipe.

    Raises:
        FileNotFoundError: no such recipe.
    """
    return (files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")
