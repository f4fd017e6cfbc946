"""The Dockerfile, as far as it can be tested without docker (it is not built here)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib

from container import ROOT, copy_sources, instructions, is_sent

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def values(word: str) -> list[str]:
    return [rest for name, rest in instructions() if name == word]


def test_the_base_is_pinned_to_a_python_that_constraints_were_resolved_on():
    (base,) = values("FROM")
    assert re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+", base)
    assert "Python 3.11" in (ROOT / "constraints.txt").read_text("utf-8").splitlines()[0]


def test_packages_are_installed_as_constrained_with_the_cpu_build_of_torch():
    libraries, packlight = [run for run in values("RUN") if "pip install" in run]
    assert "pip install --constraint constraints.txt --requirement requirements.txt" in libraries
    assert packlight.startswith("pip install --no-deps . ")
    assert any(
        "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu" in e for e in values("ENV")
    )
    pinned = (ROOT / "constraints.txt").read_text("utf-8").lower().replace("-", "_")
    for requirement in PROJECT["project"]["dependencies"]:
        name = re.match(r"[\w-]+", requirement)
        assert name and f"\n{name[0].lower().replace('-', '_')}==" in pinned, requirement


def test_what_is_copied_is_there_and_is_all_that_an_installation_needs(tmp_path):
    folder = copy_sources(tmp_path / "context")
    for name in PROJECT["tool"]["setuptools"]["packages"]:
        assert (folder / name.replace(".", "/") / "__init__.py").is_file(), name
    assert (folder / PROJECT["project"]["readme"]).is_file()
    assert all((folder / name).is_file() for name in PROJECT["project"]["license-files"])
    assert not is_sent(".git") and not is_sent("tests") and not is_sent(".venv")


def test_it_runs_packlight_and_not_as_root():
    words = [word for word, _ in instructions()]
    assert values("USER") == ["1000"]  # a number: Kubernetes' runAsNonRoot resolves no names
    last_root = max(i for i, (w, r) in enumerate(instructions()) if "useradd" in r)
    assert "--uid 1000 packlight" in instructions()[last_root][1]
    assert last_root < words.index("USER")
    (entry,) = values("ENTRYPOINT")
    (command,) = values("CMD")
    (name,) = json.loads(entry)
    assert name in PROJECT["project"]["scripts"]
    assert json.loads(command) == ["--help"]
    demo = [run for run in values("RUN") if "packlight demo" in run]
    assert demo and words.index("USER") < instructions().index(("RUN", demo[0]))
    assert "NUMBA_CACHE_DIR=/var/cache/packlight/numba" in " ".join(values("ENV"))


def test_a_changed_line_installs_no_library_again(tmp_path):
    steps = instructions()
    (place,) = [i for i, (word, rest) in enumerate(steps) if "--requirement" in rest]
    copied = " ".join(rest for word, rest in steps[:place] if word == "COPY")
    assert copied == "constraints.txt pyproject.toml ./"
    script = re.search(r'python -c "(.*?)"', steps[place][1])
    assert script
    done = subprocess.run(
        [sys.executable, "-c", script[1]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == PROJECT["project"]["dependencies"]
