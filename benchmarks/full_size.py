"""Measures the packing of full-size checkpoints by packlight and by other tools. Linux only.

    python benchmarks/full_size.py --llama-cpp FOLDER                    # phi-3-mini-4k, all rows
    python benchmarks/full_size.py --family qwen2.5-0.5b --only gguf:Q4_K_M,llama.cpp:Q4_K_M
    python benchmarks/full_size.py --list

Checkpoints are those of ``make_checkpoint.py``: looked for as ``MODELS/FAMILY``, made there when
missing. Each row is a command in its own process, after the same command on a tiny model, so
that compiling kernels is not measured; the checkpoint is read from disk, not from the page cache.
CPU seconds of user and system, wall time, peaks of memory and disk: see ``usage.py``. Each row is
merged into OUT/full_size.json, from which OUT/full_size.md and the picture
of docs/performance.md are made (``full_size_page.py``).

llama.cpp's converter and quantizer come with the source distribution of llama-cpp-python:

    pip download --no-binary :all: --no-deps llama-cpp-python && tar xf llama_cpp_python-*.tar.gz
    cmake -S llama_cpp_python-*/vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release
    cmake --build build --target llama-quantize -j2

``--llama-cpp`` is the folder with both. The converter needs torch, transformers and sentencepiece;
``--genai PYTHON`` names an interpreter that has onnxruntime-genai's model builder. Peers that are
missing, or would not fit into memory, are left out with a line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent), str(HERE)]

from full_size_page import write_pages  # noqa: E402
from make_checkpoint import SLAB, make  # noqa: E402
from usage import CommandFailedError, evict, measure, room  # noqa: E402

from compress.demo import model_path  # noqa: E402

# Uses internal names: counts CPUs and memory as packlight does.
from compress.machine import available_cpus, available_memory  # noqa: E402
from packlight import Checkpoint, inspect  # noqa: E402

FAMILIES = ("qwen2.5-0.5b", "llama-3.2-1b", "phi-3-mini-4k", "phi-3-medium-4k")
RTN = ("-r", "int4-fast", "--no-verify")
CALIBRATED = ("-r", "phone-4bit", "--no-verify", "--set", "quantize.solver=scale_search")
GENAI_BYTES = 8  # of memory per weight that onnxruntime-genai's builder takes


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        options: of ``packlight build``; empty for rows that are other commands.
        layers: number of blocks of a checkpoint of the family's width; 0: the family's.
        wanted: included if no rows are named.
    """

    options: tuple[str, ...] = ()
    layers: int = 0
    wanted: bool = True


def one(format_name: str, setting: str, *options: str) -> Row:
    """``rtn``, one format."""
    return Row((*RTN, "-f", format_name, "--set", f"targets.{format_name}.{setting}", *options))


# In order of execution: packlight's row, then the peer's, type by type.
ROWS = {
    "read": Row(),
    "gguf:Q4_0": one("gguf", "type=Q4_0"),
    "llama.cpp:f16": Row(),
    "llama.cpp:Q4_0": Row(),
    "gguf:Q4_K_M": one("gguf", "type=Q4_K_M"),
    "llama.cpp:Q4_K_M": Row(),
    "onnx:int4-g32": one("onnx", "group_size=32"),
    "genai:int4-g32": Row(),
    "onnx:int4-g128": one("onnx", "group_size=128"),
    "coreml:int4-g32": one("coreml", "grid=int4-g32"),
    "coreml:lut4-g16": one("coreml", "grid=lut4-g16", "--force"),  # else refused
    "all": Row(RTN),  # Q4_K_M, int4-g32 and int4-g32
    "verify:gguf": Row(),  # of what "all" wrote
    "verify:onnx": Row(),
    "verify:coreml": Row(),
    "gguf:IQ4_XS": one("gguf", "type=IQ4_XS"),
    "llama.cpp:IQ4_XS": Row(),
    "calibrated": Row(CALIBRATED, wanted=False),
    "gptq:1": Row(("-r", "phone-4bit", "--no-verify"), layers=1, wanted=False),
    "gptq": Row(("-r", "phone-4bit", "--no-verify"), wanted=False),
}

GOES_ON_FROM = {"llama.cpp": ("llama.cpp:f16",), "verify": ("all",)}


class LeftOutError(Exception):
    """A row that cannot be measured here, and why."""


@dataclass
class Bench:
    """One family's checkpoint, the scratch folder, and what has been made there.

    Attributes:
        run: when this run began; rows of one run are compared with each other.
        sparse: the checkpoint, where it has to be made, gets shards without numbers in them.
    """

    family: str
    models: Path
    scratch: Path
    llama_cpp: Path | None
    genai: str
    run: str
    sparse: bool = False
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.scratch / "log"
        self.folder = self.checkpoint(0)

    def checkpoint(self, layers: int) -> Path:
        """The family's, or one of its width with fewer blocks."""
        folder = self.models / (self.family + (f"-{layers}-blocks" if layers else ""))
        if not (folder / "config.json").exists():
            print(f"making {folder.name}", file=sys.stderr)
            make(self.family, folder, layers=layers, weights=not self.sparse)
        return folder

    def facts(self) -> dict[str, Any]:
        """Of the checkpoint."""
        (model,) = inspect(self.folder)
        shards = sorted(self.folder.glob("*.safetensors"))
        stored = sum(512 * shard.stat().st_blocks for shard in shards)
        return {
            "parameters": model["parameters"],
            "checkpoint_bytes": model["bytes"],
            "blocks": model["metadata"]["blocks"],
            "shards": len(shards),
            "sparse": stored < model["bytes"] // 2,
        }

    # --- one row ------------------------------------------------------------------------------

    def measure(self, key: str) -> dict[str, Any]:
        """The resources of a row, and the size of its output.

        Raises:
            LeftOutError: no such peer here, or not enough memory or disk for it.
        """
        place = self.scratch / key.replace(":", "-")
        extra = {
            "PACKLIGHT_CACHE": str(place / "cache"),
            "PYTHONPATH": str(HERE.parent),
            "TMPDIR": str(place),
        }
        command = self.command(key, place)
        place.mkdir()
        self.warm(key, place, extra)
        if shutil.disk_usage(place).free < 2 * Checkpoint.open(self.folder).nbytes // 3:
            raise LeftOutError("not enough disk")
        before = room(place)
        evict(self.checkpoint(ROWS[key].layers))
        usage = measure(command, watch=place, log=self.log, extra=extra)
        outcome = asdict(usage) | {
            "peak_disk": usage.peak_disk - before,
            "final_disk": room(place) - before,
            "bytes": artifact_bytes(place),
            "run": self.run,
        }
        if key not in ("all", "llama.cpp:f16"):  # other rows use these outputs
            shutil.rmtree(place)
        return outcome

    def command(self, key: str, place: Path) -> list[str]:
        """The command of a row; its inputs are made first."""
        row, (tool, _, kind) = ROWS[key], key.partition(":")
        if row.options:
            return packlight(
                "build", self.checkpoint(row.layers), "-o", place / "out", *row.options
            )
        if key == "read":
            return [sys.executable, __file__, "--read", str(self.folder)]
        if tool == "verify":
            built = self.scratch / "all" / "out" / kind
            text = ("--windows", "2", "--sequence-length", "128")
            return packlight("verify", built, "--baseline", self.folder, *text)
        if tool == "genai":
            return self.genai_command(place)
        converted = self.scratch / "llama.cpp-f16" / "f16.gguf"
        if kind == "f16":
            arguments = [self.folder, "--outtype", "f16", "--outfile", place / "f16.gguf"]
            converter = self.find("convert_hf_to_gguf.py")
            return [sys.executable, __file__, "--convert", str(converter), *map(str, arguments)]
        quantizer = self.find("llama-quantize")
        made = str(place / f"{kind}.gguf")
        return [str(quantizer), str(converted), made, kind, str(available_cpus())]

    def genai_command(self, place: Path) -> list[str]:
        """onnxruntime-genai's builder: the whole model as float32, then quantized."""
        module = "onnxruntime_genai.models.builder"
        builder = [self.genai, "-m", module]
        tried = subprocess.run([self.genai, "-c", f"import {module}"], capture_output=True)
        if tried.returncode:
            raise LeftOutError("no interpreter with onnxruntime-genai's builder (--genai)")
        needed = GENAI_BYTES * Checkpoint.open(self.folder).nbytes // 2
        if needed > available_memory():
            raise LeftOutError(f"needs some {needed / 1e9:.0f} GB of memory")
        options = ["-m", self.folder, "-o", place / "out", "-p", "int4", "-e", "cpu", "-c", place]
        return [*builder, *map(str, options), "--extra_options", "int4_block_size=32"]

    def find(self, name: str) -> Path:
        """A file of llama.cpp."""
        found = [path for path in (self.llama_cpp or HERE).rglob(name) if path.is_file()]
        if not self.llama_cpp or not found:
            raise LeftOutError(f"no {name} (--llama-cpp)")
        return found[0]

    def warm(self, key: str, place: Path, extra: dict[str, str]) -> None:
        """Run the row's command on the bundled model, which compiles the kernels."""
        row = ROWS[key]
        if row.options:
            command = packlight("build", model_path(), "-o", place / "warm", *row.options)
            measure(command, watch=place, log=self.log, extra=extra)
            shutil.rmtree(place / "warm")
            shutil.rmtree(place / "cache", ignore_errors=True)


def packlight(*arguments: object) -> list[str]:
    """packlight's command line, from this source tree."""
    return [sys.executable, "-m", "compress", *map(str, arguments)]


def artifact_bytes(place: Path) -> int:
    """Of what was written: model files, or the whole of a folder for formats that are folders."""
    suffixes = (".gguf", ".onnx", ".onnx_data", ".data", ".bin", ".mlmodel")
    return sum(path.stat().st_size for path in place.rglob("*") if path.suffix in suffixes)


def read_all(folder: Path) -> None:
    """Read, widen and check every weight, as the writers of all formats do."""
    checkpoint = Checkpoint.open(folder)
    for name, info in checkpoint.tensors.items():
        columns = info.nbytes // (2 * info.shape[0])
        step = max(1, SLAB // columns)
        for start in range(0, info.shape[0], step):
            checkpoint.read(name, slice(start, start + step))


def convert(script: str, arguments: list[str]) -> None:
    """llama.cpp's converter, on tokenizers that it does not know by their hash as well."""
    import runpy

    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, *arguments]
    from conversion.base import TextModel  # type: ignore[import-not-found]

    known = TextModel.get_vocab_base_pre

    def known_or_default(model: Any, tokenizer: Any) -> Any:
        try:
            return known(model, tokenizer)
        except NotImplementedError:
            return "default"

    TextModel.get_vocab_base_pre = known_or_default
    runpy.run_path(script, run_name="__main__")


# --- all rows ---------------------------------------------------------------------------------


def run(bench: Bench, keys: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure the rows in sequence; those that could be measured."""
    for key in keys:
        shutil.rmtree(bench.scratch / key.replace(":", "-"), ignore_errors=True)
        try:
            outcome = bench.measure(key)
        except (LeftOutError, CommandFailedError) as reason:
            print(f"{bench.family} {key} is left out: {reason}", file=sys.stderr)
            continue
        print(
            f"{bench.family} {key}: {outcome['cpu_seconds']} CPU s, {outcome['wall_seconds']} s, "
            f"{outcome['peak_anonymous'] >> 20} MB anonymous",
            file=sys.stderr,
        )
        yield key, outcome


def merge(path: Path, bench: Bench, key: str, outcome: dict[str, Any]) -> None:
    """Merge a row into the current JSON, to which another run may have added rows."""
    document = read(path)
    document["machine"] = machine()
    families = document["families"]
    rows = families.get(bench.family, {}).get("rows", {}) | {key: outcome}
    ordered = {name: rows[name] for name in ROWS if name in rows}
    families[bench.family] = bench.facts() | {"rows": ordered}
    document["families"] = {name: families[name] for name in FAMILIES if name in families}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def calmer(*outcomes: dict[str, Any]) -> dict[str, Any]:
    """Of one row in several rounds: the one of least CPU time, since what others are at on the
    machine only adds to it; with the highest of all peaks."""
    peaks = {key for outcome in outcomes for key in outcome if key.startswith("peak_")}
    least = min(outcomes, key=lambda outcome: float(outcome["cpu_seconds"]))
    return least | {key: max(outcome[key] for outcome in outcomes) for key in sorted(peaks)}


def read(path: Path) -> dict[str, Any]:
    """The JSON, or the beginning of one."""
    if not path.exists():
        return {"families": {}}
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def machine() -> dict[str, Any]:
    """The machine of these figures."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": next(iter(names), platform.machine()),
        "cores": available_cpus(),
        "memory_bytes": memory,
    }


def choose_rows(only: str) -> list[str]:
    """Keys, in the order of ``ROWS``."""
    if not only:
        return [key for key, row in ROWS.items() if row.wanted]
    asked = only.split(",")
    if unknown := set(asked) - set(ROWS):
        sys.exit(f"no such rows: {', '.join(sorted(unknown))}; see --list")
    asked += [before for key in asked for before in GOES_ON_FROM.get(key.partition(":")[0], ())]
    return [key for key in ROWS if key in asked]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, default="phi-3-mini-4k")
    parser.add_argument("--only", default="", metavar="ROWS", help="some rows, with commas")
    parser.add_argument("--rounds", type=int, default=1, help="keep each row's calmest")
    parser.add_argument("--models", type=Path, default=Path("full-size"), help="checkpoints")
    parser.add_argument("--scratch", type=Path, help="where to write; default: beside MODELS")
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="its source and build")
    parser.add_argument("--genai", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--sparse", action="store_true", help="make shards of zeros")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--list", action="store_true", help="names of rows")
    parser.add_argument("--page", action="store_true", help="only make the pages again")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--convert", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.list:
        print(
            "\n".join(
                key if row.wanted else f"{key} (only when named)" for key, row in ROWS.items()
            )
        )
        return
    if chosen.read:
        return read_all(chosen.read)
    if chosen.convert:
        return convert(chosen.convert[0], chosen.convert[1:])
    path = chosen.out / "full_size.json"
    if not chosen.page:
        chosen.models.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=chosen.scratch or chosen.models) as scratch:
            now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
            bench = Bench(
                family=chosen.family,
                models=chosen.models.resolve(),
                scratch=Path(scratch).resolve(),
                llama_cpp=chosen.llama_cpp and chosen.llama_cpp.resolve(),
                genai=chosen.genai,
                run=now,
                sparse=chosen.sparse,
            )
            kept: dict[str, dict[str, Any]] = {}
            for key, outcome in run(bench, choose_rows(chosen.only) * chosen.rounds):
                kept[key] = calmer(kept.get(key, outcome), outcome)
                merge(path, bench, key, kept[key])
    write_pages(read(path), chosen.out)


if __name__ == "__main__":
    main()
