"""The output folder: refusals, the rename at the end, and no files left behind on errors."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compress.errors import DiskFullError, OutputExistsError, UsageError
from compress.output import folder as folder_module
from compress.output.checksums import write_checksums
from compress.output.folder import Resume, check_disk, check_output, remove, work_folder

PLAN = '{"tool": {"name": "packlight"}}'


def ours(folder: Path) -> Path:
    folder.mkdir()
    (folder / "plan.json").write_text(PLAN)
    write_checksums(folder)
    return folder


def test_a_missing_or_empty_output_is_fine(tmp_path):
    check_output(tmp_path / "new", overwrite=False)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", overwrite=False)


def test_an_existing_output_is_refused_and_overwrite_takes_it(tmp_path):
    output = ours(tmp_path / "out")
    with pytest.raises(OutputExistsError) as caught:
        check_output(output, overwrite=False)
    assert "--overwrite" in caught.value.hint
    check_output(output, overwrite=True)


def test_overwrite_never_deletes_what_packlight_did_not_make(tmp_path):
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not made by packlight"):
        check_output(precious, overwrite=True)
    with pytest.raises(UsageError, match="is a file"):
        check_output(precious / "chapter.tex", overwrite=True)


@pytest.mark.parametrize("name", ["thesis.tex", "my-checkpoint/model.safetensors", "gguf/own.gguf"])
def test_overwrite_never_deletes_what_lies_between_our_files(tmp_path, name):
    output = ours(tmp_path / "out")
    (output / ".DS_Store").write_text("")
    check_output(output, overwrite=True)
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("precious")
    with pytest.raises(UsageError, match=f"holds {name}, which packlight did not make"):
        check_output(output, overwrite=True)


def test_overwrite_leaves_a_card_that_somebody_wrote_in(tmp_path):
    output = ours(tmp_path / "out")
    (output / "README.md").write_text("made")
    write_checksums(output)
    check_output(output, overwrite=True)
    (output / "README.md").write_text("my own words")
    with pytest.raises(UsageError, match=r"holds a README\.md that was changed"):
        check_output(output, overwrite=True)


@pytest.mark.parametrize("url", ["s3://me:secret@bucket/out", "https://host/out"])
def test_an_output_at_a_url_is_refused(url):
    with pytest.raises(UsageError, match="is a URL") as caught:
        check_output(Path(url), overwrite=False)
    assert "secret" not in caught.value.message and "batch" in caught.value.hint


def test_overwrite_leaves_a_folder_whose_list_of_files_is_damaged(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "plan.json").write_text(PLAN)
    (output / "a\nb").write_text("ours")  # a name that the list escapes
    write_checksums(output)
    check_output(output, overwrite=True)
    sums = output / "SHA256SUMS"
    sums.write_text(sums.read_text()[:-10])
    with pytest.raises(UsageError, match="damaged"):
        check_output(output, overwrite=True)


@pytest.mark.parametrize("plan", ["{}", "[]", "x", '{"tool": "packlight"}'])
def test_a_plan_of_somebody_else_is_not_ours(tmp_path, plan):
    (tmp_path / "plan.json").write_text(plan)
    (tmp_path / "thesis.txt").write_text("years of work")
    write_checksums(tmp_path)
    with pytest.raises(UsageError, match="not made by packlight"):
        check_output(tmp_path, overwrite=True)


@pytest.mark.parametrize("place", [".", "..", "/", "../here"])
def test_the_folder_that_one_stands_in_is_not_replaced(tmp_path, monkeypatch, place):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match="would replace the folder that you are in"):
        check_output(Path(place), overwrite=True)


def test_a_mount_point_is_not_replaced():
    with pytest.raises(UsageError, match="mount point") as caught:
        check_output(Path("/dev"), overwrite=True)
    assert "/dev/out" in caught.value.hint


def test_a_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to("elsewhere")
    for text in ("first", "second"):
        with work_folder(tmp_path / "link", overwrite=True) as folder:
            (folder / "plan.json").write_text(PLAN)
            (folder / "text").write_text(text)
            write_checksums(folder)
        assert (tmp_path / "elsewhere" / "text").read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "link"]
    assert (tmp_path / "link").is_symlink()


def test_a_link_that_leads_to_itself_is_left_alone(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match="leads to itself"):
        work_folder(tmp_path / "loop").__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


def test_the_folder_appears_whole_or_not_at_all(tmp_path):
    output = tmp_path / "deep" / "out"
    with work_folder(output) as folder:
        (folder / "a").write_text("a")
        assert not output.exists()
    assert (output / "a").read_text() == "a"
    assert [path.name for path in output.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError, SystemExit])
def test_a_failure_leaves_nothing_and_keeps_the_old_output(tmp_path, failure):
    output = ours(tmp_path / "out")
    with pytest.raises(failure), work_folder(output, overwrite=True) as folder:
        (folder / "half").write_text("half")
        raise failure
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (output / "plan.json").exists()


def test_an_interruption_while_the_work_folder_is_made_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(path: Path, text: str) -> None:
        path.write_text(text)
        raise KeyboardInterrupt

    monkeypatch.setattr(folder_module, "write_whole", interrupted)
    with pytest.raises(KeyboardInterrupt), work_folder(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_failure_removes_the_parents_that_it_made(tmp_path):
    with pytest.raises(ValueError), work_folder(tmp_path / "a" / "b" / "out"):
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_replacing_brings_the_old_output_back(tmp_path):
    output = ours(tmp_path / "out")
    with pytest.raises(FileNotFoundError), work_folder(output, overwrite=True) as folder:
        folder.rmdir()  # so that the second of the two renames fails
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (output / "plan.json").exists()


def test_overwriting_replaces_the_whole_folder(tmp_path):
    output = ours(tmp_path / "out")
    with work_folder(output, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in output.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_runs_full_is_told_in_one_line(tmp_path, code):
    with pytest.raises(DiskFullError) as caught, work_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("half")
        raise OSError(code, "injected")
    assert "full" in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_seen_before_the_work(tmp_path):
    with pytest.raises(DiskFullError) as caught:
        check_disk(tmp_path / "not" / "there" / "yet", 10**18)
    assert "GB" in caught.value.message
    check_disk(tmp_path / "out", 1)


def killed(output: Path, *, old: bool = False) -> Path:
    """The files of a killed build."""
    partial = output.with_name(f"{output.name}.partial")
    for name, text in (("state/build.json", "{}"), ("new/gguf/stale", "stale")):
        (partial / name).parent.mkdir(parents=True)
        (partial / name).write_text(text)
    if old:
        ours(partial / "old")
    return partial


@pytest.mark.parametrize("left", ["all", "no record", "half a record"])
def test_a_killed_builds_leftovers_are_cleared(tmp_path, left):
    partial = killed(tmp_path / "out")
    if left != "all":
        shutil.rmtree(partial / "new")
        (partial / "state" / "build.json").unlink()
    if left == "half a record":
        (partial / "state" / "build.json.12-34.partial").write_text("{")
    with work_folder(tmp_path / "out") as folder:
        assert list(folder.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_old_output_comes_back_where_a_build_was_killed_while_replacing_it(tmp_path):
    killed(tmp_path / "out", old=True)
    with pytest.raises(OutputExistsError), work_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "plan.json").exists()
    shutil.rmtree(tmp_path / "out.partial")
    (tmp_path / "mine.partial" / "old").mkdir(parents=True)
    (tmp_path / "mine.partial" / "thesis").write_text("years of work")
    with pytest.raises(UsageError, match="was not made by packlight"):
        work_folder(tmp_path / "mine").__enter__()
    assert not (tmp_path / "mine").exists()


def foreign(partial: Path, kind: str) -> None:
    """A foreign file, folder or link with a work folder's name."""
    thesis = partial.parent / "thesis"
    thesis.mkdir()
    (thesis / "book").write_text("years of work")
    if kind == "folder":
        thesis.rename(partial)
    elif kind == "folder named like ours":
        partial.mkdir()
        thesis.rename(partial / "new")
    elif kind == "folder with a file beside ours":
        killed(partial.with_suffix(""))
        (thesis / "book").rename(partial / "book")
    elif kind == "file":
        (thesis / "book").rename(partial)
    elif kind == "link":
        partial.symlink_to("thesis")
    elif kind == "dangling link":
        partial.symlink_to("elsewhere")
    else:  # a folder whose "new" leads to the thesis
        killed(partial.with_suffix(""))
        shutil.rmtree(partial / "new")
        (partial / "new").symlink_to(thesis)


@pytest.mark.parametrize(
    "kind",
    [
        "folder", "folder named like ours", "folder with a file beside ours", "file", "link",
        "dangling link", "link inside",
    ],
)  # fmt: skip
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_work_folder_that_is_somebody_elses_is_left_alone(tmp_path, kind, overwrite):
    foreign(tmp_path / "out.partial", kind)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=r"out\.partial was not made by packlight"):
        check_output(tmp_path / "out", overwrite=overwrite)
    resume = Resume({}, wanted=overwrite, afresh=True)
    with pytest.raises(UsageError, match=r"out\.partial was not made by packlight"):
        work_folder(tmp_path / "out", resume, overwrite=overwrite).__enter__()
    check_disk(tmp_path / "out", 1)
    remove(tmp_path / "out.partial")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file", "ours"])
def test_an_output_that_came_into_being_meanwhile_is_not_replaced(tmp_path, kind, overwrite):
    output = tmp_path / "out"
    if overwrite:
        ours(output)

    def build() -> None:
        with work_folder(output, Resume({}, wanted=False), overwrite=overwrite) as folder:
            (folder / "made").write_text("made")
            shutil.rmtree(output, ignore_errors=True)
            if kind == "ours":
                ours(output)
            elif kind == "folder":
                output.mkdir()
                (output / "thesis").write_text("years of work")
            else:
                output.write_text("years of work")

    if overwrite and kind == "ours":
        build()
        assert [path.name for path in output.iterdir()] == ["made"]
        return
    with pytest.raises(UsageError) as caught:
        build()
    assert caught.value.__notes__ == [
        "what is finished stays in out.partial: --resume continues it"
    ]
    assert (tmp_path / "out.partial" / "new" / "made").exists()
    if kind == "file":
        assert output.read_text() == "years of work"
    else:
        assert (output / ("thesis" if kind == "folder" else "plan.json")).exists()


@pytest.mark.parametrize("kind", ["file", "link", "folder", "pipe"])
def test_a_lock_that_is_somebody_elses_is_left_alone(tmp_path, kind):
    lock, mine = tmp_path / "out.lock", tmp_path / "mine"
    mine.write_text("mine")
    if kind == "folder":
        lock.mkdir()
    elif kind == "pipe":
        os.mkfifo(lock)
    elif kind == "link":
        lock.symlink_to(mine)
    else:
        lock.write_text("mine")
    with pytest.raises(UsageError, match=r"out\.lock cannot be locked"):
        work_folder(tmp_path / "out").__enter__()
    assert os.path.lexists(lock)
    assert mine.read_text() == "mine"


def test_a_second_build_into_the_same_folder_is_refused(tmp_path):
    output = tmp_path / "out"
    code = (
        "import sys\nfrom pathlib import Path\nfrom compress.errors import UsageError\n"
        "from compress.output.folder import work_folder\n"
        "try:\n    with work_folder(Path(sys.argv[1])): print('entered')\n"
        "except UsageError as error: print(error.message)"
    )
    with work_folder(output):
        done = subprocess.run(
            [sys.executable, "-c", code, str(output)], capture_output=True, text=True, check=True
        )
        # The refused build did not release the lock: a third is refused as well.
        third = subprocess.run(
            [sys.executable, "-c", code, str(output)], capture_output=True, text=True, check=True
        )
    assert "another build" in done.stdout
    assert "another build" in third.stdout
    assert output.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_in_the_way_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"), work_folder(tmp_path / "file" / "out"):
        pass


def test_checksums_are_read_by_sha256sum(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_text("b")
    (tmp_path / "a").write_text("a")
    write_checksums(tmp_path)
    check = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    subprocess.run(check, cwd=tmp_path, check=True)
    (tmp_path / "a").write_text("c")
    assert subprocess.run(check, cwd=tmp_path, capture_output=True).returncode == 1
