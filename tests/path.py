"""The path of one build: packlight's functions that run, their files, and the stack depth.

``python tests/path.py FORMAT SOLVER`` prints them as JSON; ``test_path.py`` has the limits. Code
that runs during imports does not count, nor do lambdas and comprehensions. Input statistics of a
solver are in the cache, filled by an earlier process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OURS = tuple(f"{ROOT / package}/" for package in ("compress", "exporters", "packlight"))
# A build without report, checksums, lock and folder: plan and write.
PLAN_AND_WRITE = (
    "compress/decoder/", "compress/checkpoint/", "compress/grids/", "compress/plan/",
    "compress/calibration/", "compress/solvers/", "compress/pruning/", "compress/allocation/",
    "compress/build/write.py", "exporters/",
)  # fmt: skip
TIMED = "Ledger.sync"  # runs every five seconds, so in slow builds only
INSIDE = tuple(f"{ROOT}/{place}" for place in PLAN_AND_WRITE)


class Trace:
    """Records of a profile function."""

    def __init__(self) -> None:
        self.codes: set[CodeType] = set()
        self.deepest: list[str] = []
        self.inside = 0  # frames of ``PLAN_AND_WRITE`` on any stack, at most

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or not is_ours(frame.f_code):
            return
        above: list[CodeType] = []
        caller: FrameType | None = frame
        while caller is not None:
            code = caller.f_code
            if code.co_name == "<module>" and code.co_filename.startswith(OURS):
                return  # an import is under way
            if is_ours(code) and code.co_qualname == TIMED:
                return
            if is_ours(code):
                above.append(code)
            caller = caller.f_back
        self.codes.add(frame.f_code)
        if len(above) > len(self.deepest):
            self.deepest = [label(code) for code in above[::-1]]
        inside = sum(code.co_filename.startswith(INSIDE) for code in above)
        self.inside = max(self.inside, inside)


def is_ours(code: CodeType) -> bool:
    return code.co_filename.startswith(OURS) and not code.co_name.startswith("<")


def label(code: CodeType) -> str:
    return f"{Path(code.co_filename).relative_to(ROOT)}:{code.co_qualname}"


def traced_build(name: str, solver: str) -> dict[str, Any]:
    """Build one format of the demo; functions, files and the deepest stack, by the command line."""
    from compress.__main__ import main
    from compress.demo import model_path

    seen = Trace()
    with tempfile.TemporaryDirectory() as folder:
        options = [
            "build", str(model_path()), "-r", "int4-fast", "-f", name,
            "--set", f"quantize.solver={solver}", "--set", "calibration.tokens=1024",
            "--set", "calibration.sequence_length=256", "--no-verify", "-q",
        ]  # fmt: skip
        if solver != "rtn":
            before = [sys.executable, "-m", "compress", *options, "-o", f"{folder}/before"]
            subprocess.run(before, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        sys.argv = ["packlight", *options, "-o", f"{folder}/out"]
        threading.setprofile(seen)
        sys.setprofile(seen)
        try:
            code = main()
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    assert code == 0
    functions = sorted(map(label, seen.codes))
    return {"functions": functions, "deepest": seen.deepest, **figures(functions, seen)}


def figures(functions: list[str], seen: Trace) -> dict[str, Any]:
    """Functions, files and frames of the whole build, and of plan and write alone."""
    part = [name for name in functions if name.startswith(PLAN_AND_WRITE)]
    return {
        "all": [len(functions), len({f.partition(":")[0] for f in functions}), len(seen.deepest)],
        "plan and write": [len(part), len({f.partition(":")[0] for f in part}), seen.inside],
    }


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(json.dumps(traced_build(*sys.argv[1:3])))
