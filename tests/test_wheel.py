"""The wheel is complete: the demo runs from it, outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from trees import PACKAGES, copy_sources, warm

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel's content, unpacked as pip would."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    copy_sources(source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run([*build, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("packlight-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    warm(folder / "site")
    return folder / "site"


def test_every_source_file_is_in_the_wheel(installed):
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            relative = path.relative_to(ROOT)
            if path.is_file() and "__pycache__" not in relative.parts:
                assert (installed / relative).exists(), relative


@pytest.mark.slow  # every file is in it: see above
def test_the_demo_runs_from_the_wheel(installed, tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-m", "compress", "demo", "-f", "gguf", "-q"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "packlight-demo/gguf/packlight-demo-Q4_K_M.gguf\n"
