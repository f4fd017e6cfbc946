"""Measuring full-size checkpoints (`benchmarks/full_size.py`), on commands of known cost."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import full_size
import full_size_page
import usage

from compress.demo import model_path

MB = 10**6

# 200 MB in a child process, 60 MB written, 40 of them read again, half a CPU second.
KNOWN = """
import subprocess, sys, time
open("written", "wb").write(bytes(60_000_000))
open("written", "rb").read(40_000_000)
hold = "x = bytearray(200_000_000)\\nfor i in range(0, len(x), 4096): x[i] = 1\\n"
subprocess.run([sys.executable, "-c", hold + "import time; time.sleep(0.5)"])
while time.process_time() < 0.5: pass
"""


def test_usage_counts_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = usage.measure([sys.executable, "-c", KNOWN], watch=tmp_path, log=tmp_path / "log")
    assert 0.5 <= found.cpu_seconds <= found.wall_seconds * (os.cpu_count() or 1)
    assert found.wall_seconds >= 1  # of sleeping and computing
    assert 200 * MB < found.peak_anonymous < 290 * MB
    assert 200 * MB < found.child_resident < 260 * MB
    assert found.peak_resident >= found.child_resident
    assert 60 * MB <= found.written < 61 * MB
    assert 60 * MB <= found.peak_disk < 61 * MB
    assert 40 * MB <= found.read < 45 * MB


def test_evicted_files_come_from_disk(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(30_000_000))
    command = [sys.executable, "-c", "import sys; open(sys.argv[1], 'rb').read()", "file"]
    command[-1] = str(tmp_path / "file")
    cached = usage.measure(command, watch=tmp_path, log=tmp_path / "log").from_disk
    usage.evict(tmp_path)
    cold = usage.measure(command, watch=tmp_path, log=tmp_path / "log").from_disk
    assert cold >= cached + 29_000_000


def test_failed_command_tells_its_last_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    assert usage.measure(command, watch=tmp_path, log=tmp_path / "log").wall_seconds > 0  # code 1
    with pytest.raises(usage.CommandFailedError, match="ended with 2"):
        usage.measure([sys.executable, "-m", "compress", "build", "/nowhere"],
                      watch=tmp_path, log=tmp_path / "log")  # fmt: skip


def rows(**cpu: float) -> dict[str, Any]:
    """Measurements of given CPU seconds; wall is 0.6 of them, memory 100 MB."""
    row = {"peak_anonymous": 100 * MB, "peak_resident": 200 * MB, "main_resident": 2600 * MB,
           "peak_disk": 10, "final_disk": 10, "from_disk": 7 * MB, "bytes": 2 * MB,
           "written": 2 * MB, "others_seconds": 0.0}  # fmt: skip
    return {
        key.replace("__", ":").replace("llama", "llama.cpp").replace("int4_", "int4-"): row
        | {"cpu_seconds": seconds, "wall_seconds": 0.6 * seconds, "run": "once"}
        for key, seconds in cpu.items()
    }


def facts(**cpu: float) -> dict[str, Any]:
    return {"parameters": 10**9, "checkpoint_bytes": 5 * MB, "blocks": 32, "shards": 1,
            "sparse": False, "rows": rows(**cpu)}  # fmt: skip


def test_bars_are_ratios_of_what_was_measured() -> None:
    ours = {"gguf__Q4_K_M": 10, "onnx__int4_g32": 6, "coreml__int4_g32": 7, "read": 1, "all": 24}
    others = {
        "llama__f16": 30,
        "llama__Q4_K_M": 30,
        "verify__gguf": 1,
        "gptq": 15_000,
        "calibrated": 5_000,
    }
    measured = facts(**ours, **others)
    bars = {
        bar["what"]: (bar["value"], bar["verdict"] == "pass")
        for bar in full_size_page.judged(full_size_page.Family("some", measured))
    }
    assert bars["GGUF Q4_K_M: CPU, ours / llama.cpp's convert + quantize"] == (0.167, True)
    assert bars["onnx:int4-g32: CPU / our Q4_K_M"] == (0.6, False)
    assert bars["three in one build: CPU / (sum - 2 reads)"] == (round(24 / 21, 3), True)
    assert bars["three in one build: wall / (sum - 2 reads)"] == (round(24 / 21, 3), True)
    read = "three in one build: from disk, less the files' bytes / bytes of the checkpoint"
    assert bars[read] == (1.0, True)
    assert bars["verify:gguf: float model's peak"] == (2.6, False)
    assert bars["gptq: wall"] == (150.0, True)  # 0.6 of the CPU time
    assert bars["calibrated: wall"] == (50.0, False)
    assert bars["gguf:Q4_K_M: wall / CPU"] == (0.6, True)
    assert not any("IQ4_XS" in what for what in bars)  # was not measured


def test_wall_time_of_a_busy_machine_is_no_failure() -> None:
    verdicts = []
    for others in (0.0, 50.0):
        measured = facts(gguf__Q4_K_M=10)
        measured["rows"]["gguf:Q4_K_M"] |= {"wall_seconds": 9.0, "others_seconds": others}
        bars = full_size_page.judged(full_size_page.Family("some", measured))
        verdicts += [bar["verdict"] for bar in bars if bar["what"] == "gguf:Q4_K_M: wall / CPU"]
    assert verdicts == ["**fail**", "not idle"]


def test_page_shows_rows_bars_and_other_runs() -> None:
    some = facts(gguf__Q4_K_M=10, llama__f16=30, llama__Q4_K_M=30)
    some["rows"]["gguf:Q4_K_M"]["run"] = "twice"
    machine = {"processor": "One", "cores": 2, "memory_bytes": 24 * 10**9}
    shown = full_size_page.page({"machine": machine, "families": {"some": some}})
    assert "|gguf:Q4_K_M | 10.0 | 10.0 | 6.0 | 100 | 200 |" in shown
    assert "convert + quantize (of several runs) | 0.167 × | 0.286 | 0.2 | pass|" in shown
    short = full_size_page.digest(full_size_page.Family("some", some))
    assert "|row | CPU s | wall s | anonymous MB | resident MB | files GB|" in short
    assert "|gguf:Q4_K_M | 10.0 | 6.0 | 100 | 200 | 0.00|" in short


def test_picture_has_a_line_for_what_was_measured_everywhere() -> None:
    small = facts(gguf__Q4_K_M=10, llama__f16=30, llama__Q4_K_M=30)
    large = facts(gguf__Q4_K_M=80) | {"parameters": 8 * 10**9}
    families = [full_size_page.Family("small", small), full_size_page.Family("large", large)]
    drawn = str(full_size_page.picture(families))
    # GGUF has two points in both diagrams, llama.cpp one; ONNX and Core ML none.
    assert drawn.count("<circle") == 6
    assert drawn.count("<polyline") == 4
    assert "1.0 B" in drawn
    assert "8.0 B" in drawn


def test_of_several_rounds_the_calmest_is_kept_with_the_highest_peaks() -> None:
    rounds = [
        {"cpu_seconds": 9.0, "wall_seconds": 5.0, "peak_anonymous": 7, "bytes": 3},
        {"cpu_seconds": 8.0, "wall_seconds": 6.0, "peak_anonymous": 5, "bytes": 3},
    ]
    kept = {"cpu_seconds": 8.0, "wall_seconds": 6.0, "peak_anonymous": 7, "bytes": 3}
    assert full_size.calmer(*rounds) == full_size.calmer(*reversed(rounds)) == kept


def test_a_row_is_measured_and_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run on the bundled model, with a peer that is not there."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copytree(model_path(), tmp_path / "models" / "qwen2.5-0.5b")
    document = {
        "machine": full_size.machine(),
        "families": {"qwen2.5-0.5b": {"rows": {"onnx:int4-g32": 1}}},
    }
    (tmp_path / "full_size.json").write_text(json.dumps(document), encoding="utf-8")
    arguments = ["--family", "qwen2.5-0.5b", "--only", "gguf:Q4_0,llama.cpp:Q4_0", "--models",
                 str(tmp_path / "models"), "--out", str(tmp_path)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["full_size.py", *arguments])
    monkeypatch.setattr(full_size, "write_pages", lambda *_: None)
    full_size.main()
    family = json.loads((tmp_path / "full_size.json").read_text())["families"]["qwen2.5-0.5b"]
    assert set(family["rows"]) == {"gguf:Q4_0", "onnx:int4-g32"}
    row = family["rows"]["gguf:Q4_0"]
    weights = sum(path.stat().st_size for path in model_path().glob("*.safetensors"))
    assert row["bytes"] > 4.5 / 8 * family["parameters"]
    assert row["final_disk"] >= row["bytes"]
    assert row["read"] > weights
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["qwen2.5-0.5b"]


def test_rows_that_others_go_on_from_come_along() -> None:
    assert full_size.choose_rows("verify:onnx,llama.cpp:IQ4_XS") == [
        "llama.cpp:f16", "all", "verify:onnx", "llama.cpp:IQ4_XS",
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="nonsense"):
        full_size.choose_rows("nonsense")
