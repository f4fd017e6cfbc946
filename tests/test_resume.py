"""``build --resume``: whatever kills a build and whenever, the next one goes on with what is
finished, and at last there are the bytes of a build that nothing has killed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny

from compress.errors import DiskFullError
from compress.output.folder import check_disk, locked

HERE = Path(__file__).parent
OPTIONS = (
    "--threads", "1", "-v", "--set", "quantize.solver=scale_search",
    "--set", "calibration.tokens=4096", "--set", "calibration.sequence_length=128",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.make("phi3", tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=3)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# --- a whole build ------------------------------------------------------------------------------


@dataclass
class Mortals:
    """Builds of one model, each in a process of its own that starts at once (``mortal_cli.py``)."""

    process: subprocess.Popen[str]
    model: Path
    place: Path

    @property
    def output(self) -> Path:
        return self.place / "out"

    @property
    def partial(self) -> Path:
        return self.place / "out.partial"

    def start(self, *options: str, verify: bool = False) -> int:
        """Begin a build; its pid."""
        log = str(self.place / "log")
        line = [log, "build", str(self.model), "-o", str(self.output), *OPTIONS, *options]
        return int(self.ask(json.dumps(line if verify else [*line, "--no-verify"])))

    def ask(self, line: str) -> str:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def ended(self) -> int:
        """Its exit status, once it has ended."""
        return int(self.ask("reap"))

    def finished(self) -> dict[str, list[str]]:
        """What the ledgers tell of, by target."""
        found = {}
        for path in (self.partial / "state").glob("*.ledger"):
            rows = (json.loads(line) for line in path.read_text().splitlines(keepends=True)
                    if line.endswith("\n"))  # fmt: skip
            found[path.stem] = [row["done"] for row in rows if "done" in row]
        return found

    def wait(self, condition: Callable[[], object]) -> None:
        """Until it holds, or the build is over."""
        while not condition() and not self.output.exists():
            time.sleep(0.001)

    def calibrated(self) -> int:
        """The block that the cache's walk has come to."""
        kept = self.place.glob("cache/calibration/*.partial/boundary/block-*.bin")
        return max((int(path.stem.partition("-")[2]) for path in kept), default=0)

    def forget(self) -> None:
        shutil.rmtree(self.place / "cache", ignore_errors=True)
        shutil.rmtree(self.output, ignore_errors=True)
        (self.place / "log").unlink()


@pytest.fixture(scope="module")
def mortals(model, tmp_path_factory) -> Iterator[Mortals]:
    place = tmp_path_factory.mktemp("mortals")
    process = subprocess.Popen(
        [sys.executable, str(HERE / "mortal_cli.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "NO_COLOR": "1", "PACKLIGHT_CACHE": str(place / "cache"),
             "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    mortals = Mortals(process, model, place)
    assert mortals.start() == 0, (place / "log").read_text()
    mortals.forget()
    yield mortals
    process.kill()
    process.wait()


def test_a_build_killed_at_twenty_moments_has_the_bytes_of_one_that_was_not(mortals):
    begun = time.monotonic()
    mortals.start()
    assert mortals.ended() == 0
    duration = time.monotonic() - begun
    whole = contents(mortals.output)
    assert {"gguf", "onnx", "coreml"} <= {name.partition("/")[0] for name in whole}
    mortals.forget()

    draw = random.Random(5)
    moments = [(i + draw.random()) / 20 * duration for i in range(20)]
    kills, ends, skipped = 0, 0, 0
    while moments:
        before, block = mortals.finished(), mortals.calibrated()
        # What has little left to do is over before the late moments.
        early = moments[: len(moments) // 2 + 1]
        moment = draw.choice(early) if before or block else moments[-1]
        child = mortals.start("--resume")
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        if mortals.ended() == -signal.SIGKILL:
            kills += 1
            moments.remove(moment)
        after = mortals.finished()
        if mortals.output.exists():  # it was faster; its folder is whole, perhaps beside the state
            assert contents(mortals.output) == whole
            shutil.rmtree(mortals.partial, ignore_errors=True)
            mortals.forget()
            ends += 1
            assert ends < 40
            if moment in moments:  # the machine may be faster now than it was for the first build
                moments.remove(moment)
                moments = sorted([*moments, moment * draw.random()])
            continue
        for target, names in before.items():  # nothing is done twice, nothing is lost
            assert after[target][: len(names)] == names
            assert len(set(after[target])) == len(after[target])
        assert block <= mortals.calibrated() or after
        skipped += sum(map(len, before.values()))
    assert kills == 20
    assert skipped > 0
    before = mortals.finished()
    mortals.start("--resume")
    assert mortals.ended() == 0, (mortals.place / "log").read_text()
    assert contents(mortals.output) == whole
    told = (mortals.place / "log").read_text()
    for target, names in before.items():
        assert not names or f"{target}: {len(names)} arrays were written before" in told
    assert sorted(path.name for path in mortals.place.iterdir()) == ["cache", "log", "out"]
    mortals.forget()


def test_calibration_goes_on_with_the_block_that_it_was_at(mortals):
    mortals.start()
    assert mortals.ended() == 0
    whole = contents(mortals.output)
    while not mortals.calibrated():  # a slow machine may miss it
        shutil.rmtree(mortals.partial, ignore_errors=True)
        mortals.forget()
        child = mortals.start("--resume")
        mortals.wait(lambda: mortals.calibrated() or mortals.finished())
        os.kill(child, signal.SIGKILL)
        mortals.ended()
    block = mortals.calibrated()
    (kept,) = mortals.place.glob("cache/calibration/*.partial/statistics/blocks.0.npz")
    written = kept.stat().st_mtime_ns
    mortals.start("--resume")
    assert mortals.ended() == 0
    assert contents(mortals.output) == whole
    (kept,) = mortals.place.glob("cache/calibration/*/blocks.0.npz")
    assert block >= 1 and kept.stat().st_mtime_ns == written
    mortals.forget()


def test_a_build_fed_by_quantized_blocks_goes_on_where_it_was(mortals):
    fed = ("--set", "calibration.propagate=quantized")
    mortals.start(*fed)
    assert mortals.ended() == 0
    whole = contents(mortals.output)
    mortals.forget()
    child = mortals.start("--resume", *fed)
    mortals.wait(lambda: mortals.finished().get("onnx"))
    os.kill(child, signal.SIGKILL)
    assert mortals.ended() == -signal.SIGKILL
    left, log = mortals.finished(), mortals.place / "log"
    log.unlink()
    mortals.start("--resume", *fed)
    assert mortals.ended() == 0, log.read_text()
    assert contents(mortals.output) == whole
    assert left["gguf"] and left["onnx"]
    for target, names in left.items():
        assert f"{target}: {len(names)} arrays were written before" in log.read_text()
    mortals.forget()


def test_the_float_model_is_not_scored_again(mortals):
    verified = ("-f", "gguf", "--set", "verify.windows=2", "--set", "verify.sequence_length=64")
    child = mortals.start("--resume", *verified, verify=True)
    mortals.wait(lambda: list(mortals.partial.glob("state/baseline/*/facts.json")))
    os.kill(child, signal.SIGKILL)
    assert mortals.ended() == -signal.SIGKILL
    log = mortals.place / "log"
    assert "score the float model" in log.read_text()
    log.unlink()
    mortals.start("--resume", *verified, verify=True)
    assert mortals.ended() in (0, 1), log.read_text()  # a random model need not pass its gates
    assert "score the float model" not in log.read_text()
    (artifact,) = json.loads((mortals.output / "report.json").read_text())["artifacts"]
    assert artifact["perplexity"] > 1
    mortals.forget()


def killed_while_writing(mortals: Mortals, *options: str) -> dict[str, list[str]]:
    """What a build has finished that was killed in the midst of its second target or later."""
    child = mortals.start(*options)
    mortals.wait(lambda: mortals.finished().get("onnx"))
    os.kill(child, signal.SIGKILL)
    assert mortals.ended() == -signal.SIGKILL
    return mortals.finished()


def test_what_was_left_is_neither_thrown_away_nor_mixed_with_another_build(mortals):
    left = killed_while_writing(mortals)
    log = mortals.place / "log"
    log.unlink()
    mortals.start()
    assert mortals.ended() == 2
    assert "error: out.partial holds what an interrupted build has finished" in log.read_text()
    assert "hint: --resume to continue it, --overwrite to begin afresh" in log.read_text()
    assert mortals.finished() == left
    log.unlink()
    mortals.start("--resume", "--set", "quantize.solver=rtn")
    assert mortals.ended() == 2
    told = log.read_text()
    assert "of another build: recipe.quantize.solver is rtn, was scale_search" in told
    assert "hint: the same options again" in told
    assert mortals.finished() == left
    log.unlink()
    mortals.start("--overwrite")
    assert mortals.ended() == 0
    assert "were written before" not in log.read_text()
    assert not mortals.partial.exists()
    mortals.forget()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_is_to_be_resumed_and_says_so(mortals, ending):
    child = mortals.start("--resume")
    mortals.wait(lambda: mortals.finished().get("onnx"))
    os.kill(child, ending)
    assert mortals.ended() == (130 if ending == signal.SIGINT else 143)
    told = (mortals.place / "log").read_text().splitlines()[-1].removeprefix("interrupted; ")
    assert told == "what is finished stays in out.partial: --resume continues it"
    assert mortals.finished()["onnx"]
    assert not mortals.output.exists()
    mortals.start("--resume")
    assert mortals.ended() == 0
    mortals.forget()


def test_while_a_resumed_build_is_at_work_another_is_refused(mortals):
    killed_while_writing(mortals)
    left = mortals.finished()
    with locked(mortals.output):
        for options in ((), ("--resume",), ("--overwrite",)):
            mortals.start(*options)
            assert mortals.ended() == 2
            assert "another build is writing to" in (mortals.place / "log").read_text()
            (mortals.place / "log").unlink()
    assert mortals.finished() == left
    mortals.start("--resume")
    assert mortals.ended() == 0
    mortals.forget()


def test_room_that_an_interrupted_build_has_taken_counts_as_free(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    state = tmp_path / "out.partial" / "state"
    state.mkdir(parents=True)
    with pytest.raises(DiskFullError):
        check_disk(tmp_path / "out", 1 << 20)
    (state / "written").write_bytes(bytes(1 << 20))
    check_disk(tmp_path / "out", 1 << 20)


# --- the folder alone, killed at every call of the file system ----------------------------------

DYING = """
import os, shutil, signal, sys
from pathlib import Path
from compress.output.checksums import write_checksums
from compress.output.ledger import Ledger
from compress.output.folder import Resume, check_output, state_folder, work_folder

CALLS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
place = Path(sys.argv[1])
output, old, overwrite = place / "out", sys.argv[2] == "old", sys.argv[2] == "old"


def build(name):
    with work_folder(output, Resume({"build": name}, wanted=True)) as folder:
        check_output(output, overwrite=overwrite)
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
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    deaths, absences = map(int, done.stdout.split())
    assert deaths > 25
    # An output that is replaced is away for the moment between two renames.
    assert absences < 3 if before == "old" else absences > 20
