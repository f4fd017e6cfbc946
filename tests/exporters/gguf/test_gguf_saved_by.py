"""The same GGUF file of what transformers 4 saved and of what 5 saved."""

from __future__ import annotations

from pathlib import Path

import pytest
from exported import Exports

DATA = Path(__file__).resolve().parents[2] / "data"


@pytest.mark.parametrize("name", ["llama", "llama3"])
def test_both_are_the_same_bytes(name: str, exported: Exports):
    made = [
        exported.write("gguf", DATA / f"saved_by_{major}" / name, {"type": "Q8_0"})
        for major in (4, 5)
    ]
    assert made[0].path.read_bytes() == made[1].path.read_bytes()
