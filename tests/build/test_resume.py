"""``build --resume``: after any kill at any step the next build continues, and the final bytes are
those of an uninterrupted build.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
from commands import Step, server

from compress.errors import DiskFullError
from compress.output.folder import check_disk, locked

HERE = Path(__file__).parents[1]
OPTIONS = (
    "--threads", "1", "-v", "--set", "quantize.solver=scale_search",
    "--set", "calibration.tokens=2048", "--set", "calibration.sequence_length=128",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.make("phi3", tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=3)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# --- a whole build ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Builds:
    """Builds of one model into one folder, each in a process of its own."""

    model: Path
    place: Path

    @property
    def output(self) -> Path:
        return self.place / "out"

    @property
    def partial(self) -> Path:
        return self.place / "out.partial"

    @property
    def log(self) -> Path:
        return self.place / "log"

    def run(self, *options: str, verify: bool = False, step: Step | None = None) -> int:
        """The exit status of a build; its output goes to the log."""
        return self.steps(*options, verify=verify, step=step)[0]

    def steps(
        self, *options: str, verify: bool = False, step: Step | None = None
    ) -> tuple[int, int]:
        """Its exit status, and how many of its steps matched."""
        line = ["build", str(self.model), "-o", str(self.output), *OPTIONS, *options]
        env = {**os.environ, "NO_COLOR": "1", "PACKLIGHT_CACHE": str(self.place / "cache")}
        arguments = line if verify else [*line, "--no-verify"]
        return server().run(arguments, self.place, env, self.log, self.log, step)

    def finished(self) -> dict[str, list[str]]:
        """What the ledgers list, by target."""
        found = {}
        for path in (self.partial / "state").glob("*.ledger"):
            rows = (json.loads(line) for line in path.read_text().splitlines(keepends=True)
                    if line.endswith("\n"))  # fmt: skip
            found[path.stem] = [row["done"] for row in rows if "done" in row]
        return found

    def calibrated(self) -> int:
        """The block that the cached walk has reached."""
        kept = self.place.glob("cache/calibration/*.partial/boundary/block-*.bin")
        return max((int(path.stem.partition("-")[2]) for path in kept), default=0)

    def forget(self) -> None:
        shutil.rmtree(self.place / "cache", ignore_errors=True)
        shutil.rmtree(self.output, ignore_errors=True)
        self.log.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def builds(model, tmp_path_factory) -> Builds:
    return Builds(model, tmp_path_factory.mktemp("builds"))


@pytest.fixture(scope="module")
def whole(builds) -> dict[str, bytes]:
    """Every file of an uninterrupted build."""
    assert builds.run() == 0, builds.log.read_text()
    found = contents(builds.output)
    assert {"gguf", "onnx", "coreml"} <= {name.partition("/")[0] for name in found}
    builds.forget()
    return found


@pytest.mark.parametrize("steps", [8, pytest.param(20, marks=pytest.mark.slow)])
def test_a_build_killed_at_many_steps_has_the_bytes_of_one_that_was_not(steps, builds, whole):
    anywhere = re.escape(str(builds.place))
    status, total = builds.steps(step=Step(anywhere, 0))
    assert status == 0 and contents(builds.output) == whole
    builds.forget()

    draw = random.Random(5)
    left = [(i + draw.random()) / steps * total for i in range(steps)]
    kills, ends, skipped = 0, 0, 0
    while left:
        before, block = builds.finished(), builds.calibrated()
        # A build with little work left ends before the late steps.
        early = left[: len(left) // 2 + 1]
        count = draw.choice(early) if before or block else left[-1]
        status = builds.run("--resume", step=Step(anywhere, int(count) + 1))
        if status == -signal.SIGKILL:
            kills += 1
            left.remove(count)
        after = builds.finished()
        if builds.output.exists():  # it had less to do, or was about to end
            assert contents(builds.output) == whole
            shutil.rmtree(builds.partial, ignore_errors=True)
            builds.forget()
            ends += 1
            assert ends < 20
            continue
        for target, names in before.items():  # no tensor is solved twice, none is missing
            assert after[target][: len(names)] == names
            assert len(set(after[target])) == len(after[target])
        assert block <= builds.calibrated() or after
        skipped += sum(map(len, before.values()))
    assert kills == steps
    assert skipped > 0
    before = builds.finished()
    assert builds.run("--resume") == 0, builds.log.read_text()
    assert contents(builds.output) == whole
    said = builds.log.read_text()
    for target, names in before.items():
        assert not names or f"{target}: {len(names)} tensors were written before" in said
    assert sorted(path.name for path in builds.place.iterdir()) == ["cache", "log", "out"]
    builds.forget()


def test_calibration_goes_on_with_the_block_that_it_was_at(builds, whole):
    # The states before the second block are saved, its statistics are not.
    step = Step(r"open .*/statistics/blocks\.1\.npz")
    assert builds.run("--resume", step=step) == -signal.SIGKILL
    assert builds.calibrated() == 1 and not builds.finished()
    (kept,) = builds.place.glob("cache/calibration/*.partial/statistics/blocks.0.npz")
    written = kept.stat().st_mtime_ns
    assert builds.run("--resume") == 0
    assert contents(builds.output) == whole
    (kept,) = builds.place.glob("cache/calibration/*/blocks.0.npz")
    assert kept.stat().st_mtime_ns == written
    builds.forget()


MIDST = r"open .*/state/onnx\.ledger"  # a line of the ledger, while three targets are written


def test_a_build_fed_by_quantized_blocks_goes_on_where_it_was(builds):
    fed = ("--set", "calibration.propagate=quantized")
    assert builds.run(*fed) == 0
    whole = contents(builds.output)
    builds.forget()
    assert builds.run("--resume", *fed, step=Step(MIDST, 5)) == -signal.SIGKILL
    left = builds.finished()
    builds.log.unlink()
    assert builds.run("--resume", *fed) == 0, builds.log.read_text()
    assert contents(builds.output) == whole
    assert left["gguf"] and left["onnx"]
    for target, names in left.items():
        assert f"{target}: {len(names)} tensors were written before" in builds.log.read_text()
    builds.forget()


def test_the_float_model_is_not_scored_again(builds):
    verified = ("-f", "gguf", "--set", "verify.windows=2", "--set", "verify.sequence_length=64")
    step = Step(r"subprocess\.Popen .*exporters\.probe")  # the child that runs the artifact
    assert builds.run("--resume", *verified, verify=True, step=step) == -signal.SIGKILL
    assert list(builds.partial.glob("state/baseline/*/facts.json"))
    assert "score the float model" in builds.log.read_text()
    builds.log.unlink()
    # A random model need not pass its gates.
    assert builds.run("--resume", *verified, verify=True) in (0, 1), builds.log.read_text()
    assert "score the float model" not in builds.log.read_text()
    (artifact,) = json.loads((builds.output / "report.json").read_text())["artifacts"]
    assert artifact["perplexity"] > 1
    builds.forget()


def killed_while_writing(builds: Builds) -> dict[str, list[str]]:
    """The finished part of a build that was killed while it wrote all targets."""
    assert builds.run(step=Step(MIDST, 5)) == -signal.SIGKILL
    left = builds.finished()
    assert all(left[target] for target in ("gguf", "onnx", "coreml"))
    return left


def test_what_was_left_is_neither_thrown_away_nor_mixed_with_another_build(builds):
    left = killed_while_writing(builds)
    builds.log.unlink()
    assert builds.run() == 2
    assert (
        "error: out.partial holds what an interrupted build has finished" in builds.log.read_text()
    )
    assert "hint: --resume to continue it, --overwrite to begin afresh" in builds.log.read_text()
    assert builds.finished() == left
    builds.log.unlink()
    assert builds.run("--resume", "--set", "quantize.solver=rtn") == 2
    said = builds.log.read_text()
    assert "of another build: recipe.quantize.solver is rtn, was scale_search" in said
    assert "hint: the same options again" in said
    assert builds.finished() == left
    builds.log.unlink()
    assert builds.run("--overwrite") == 0
    assert "were written before" not in builds.log.read_text()
    assert not builds.partial.exists()
    builds.forget()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_is_to_be_resumed_and_says_so(builds, ending):
    status = builds.run("--resume", step=Step(MIDST, 5, ending))
    assert status == (130 if ending == signal.SIGINT else 143)
    said = builds.log.read_text().splitlines()[-1].removeprefix("interrupted; ")
    assert said == "what is finished stays in out.partial: --resume continues it"
    assert builds.finished()["onnx"]
    assert not builds.output.exists()
    assert builds.run("--resume") == 0
    builds.forget()


def test_while_a_resumed_build_is_at_work_another_is_refused(builds):
    left = killed_while_writing(builds)
    with locked(builds.output):
        for options in ((), ("--resume",), ("--overwrite",)):
            assert builds.run(*options) == 2
            assert "another build is writing to" in builds.log.read_text()
            builds.log.unlink()
    assert builds.finished() == left
    assert builds.run("--resume") == 0
    builds.forget()


def test_room_that_an_interrupted_build_has_taken_counts_as_free(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    state = tmp_path / "out.partial" / "state"
    state.mkdir(parents=True)
    with pytest.raises(DiskFullError):
        check_disk(tmp_path / "out", 1 << 20)
    (state / "build.json").write_text("{}")
    (state / "written").write_bytes(bytes(1 << 20))
    check_disk(tmp_path / "out", 1 << 20)


# --- the folder alone, killed at every call of the file system ----------------------------------

DYING = """
import os, shutil, signal, sys
from pathlib import Path
from compress.output.checksums import write_checksums
from compress.plan.weights import Ledger
from compress.output.folder import Resume, state_folder, work_folder

CALLS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
place = Path(sys.argv[1])
output, old, overwrite = place / "out", sys.argv[2] == "old", sys.argv[2] == "old"


def build(name):
    resume = Resume({"build": name}, wanted=True)
    with work_folder(output, resume, overwrite=overwrite) as folder:
        target, ledger = folder / "gguf", Ledger(state_folder(folder) / "gguf.ledger", "t")
        target.mkdir(exist_ok=True)
        file = target / "weights"
        again = ledger.cut(file)
        with file.open("ab" if again else "wb") as stream:
            for tensor in "abc":
                if tensor not in ledger:
                    stream.write(f"{name} {tensor}".encode())
                    stream.flush()
                    ledger.add(tensor, file, stream.tell())
        (folder / "plan.json").write_text(name)
        write_checksums(folder)


def whole(name):
    texts = {path.name: path.read_text() for path in output.glob("**/*") if path.is_file()}
    sums = texts.pop("SHA256SUMS", "").splitlines()
    return len(sums) == 2 and texts == {"plan.json": name, "weights": f"{name} a{name} b{name} c"}


def child(work):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(1)


def dying(last):
    left = last

    def count(event, details):
        nonlocal left
        if event in CALLS and str(place) in str(details):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(count)
    build("new")


deaths = absences = 0
while True:
    if old:
        assert child(lambda: build("old")) == 0
    code = child(lambda: dying(deaths))
    absences += not output.exists()
    assert whole("new") or not output.exists() or (old and whole("old")), sorted(output.rglob("*"))
    if code == 0:
        break
    assert code == -signal.SIGKILL
    if not whole("new"):
        assert child(lambda: build("new")) == 0
        assert whole("new")
        assert sorted(path.name for path in place.iterdir()) == ["out"]
    shutil.rmtree(place)
    place.mkdir()
    deaths += 1
print(deaths, absences)
"""


@pytest.mark.parametrize("before", ["none", "old"])
def test_the_folder_is_whole_or_absent_wherever_a_build_is_killed(before, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", DYING, str(place), before],
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    deaths, absences = map(int, done.stdout.split())
    assert deaths > 25
    # A replaced output is missing between two renames.
    assert absences < 3 if before == "old" else absences > 20
