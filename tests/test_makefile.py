"""`make install`: once, and again after whatever makes an environment untrue. Python and pip are stand-ins here."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("PREFECT_API_URL", "MAKEFLAGS", "MAKEOVERRIDES", "ARGS")  # of the call of make that runs these tests

# Makes an "environment" whose python notes each pip install, and breaks it off where a file `break` lies.
PYTHON = """#!/bin/sh
here=$(cd "$(dirname "$0")" && pwd)
case "$*" in
  -c*version_info*) [ ! -e "$here/old" ] ;;
  "-m venv"*) mkdir -p "$3/bin" && echo venv >> "$here/log" && cp "$0" "$3/bin/python" && echo "$here" > "$3/home" ;;
  *"pip --version") true ;;
  *"pip install"*)
    home=$(cat "$here/../home"); echo install >> "$home/log"; touch "$here/../half"; [ ! -e "$home/break" ] ;;
  "-m flows."*) echo "$* on $PREFECT_API_URL" ;;
  *) exit 9 ;;
esac
"""


class Checkout:
    def __init__(self, folder: Path) -> None:
        self.folder, self.tools = folder / "checkout", folder / "tools"
        self.folder.mkdir()
        self.tools.mkdir()
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copyfile(ROOT / name, self.folder / name)
        (self.tools / "python").write_text(PYTHON)
        (self.tools / "python").chmod(0o755)

    def install(self, succeeds: bool = True, *arguments: str) -> list[str]:
        """What `make install` made the stand-ins do."""
        log = self.tools / "log"
        log.unlink(missing_ok=True)
        self.make("install", *arguments)
        assert (self.result.returncode == 0) == succeeds, self.result.stdout + self.result.stderr
        return log.read_text().split() if log.exists() else []

    def make(self, target: str, *arguments: str) -> list[str]:
        """The lines that `make target` printed; `result` holds the rest."""
        environment = {key: value for key, value in os.environ.items() if key not in OURS}
        self.result = subprocess.run(
            ["make", "--silent", target, f"PYTHON={self.tools / 'python'}", *arguments],
            cwd=self.folder, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return self.result.stdout.splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_the_second_call_installs_nothing(checkout: Checkout) -> None:
    assert checkout.install() == ["venv", "install"]
    assert checkout.install() == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed_into_the_same_environment(checkout: Checkout, name: str) -> None:
    checkout.install()
    with (checkout.folder / name).open("a") as stream:
        stream.write("# changed\n")
    assert checkout.install() == ["install"]
    assert checkout.install() == []


def test_an_install_that_broke_off_is_done_anew(checkout: Checkout) -> None:
    (checkout.tools / "break").touch()
    assert checkout.install(succeeds=False) == ["venv", "install"]
    (checkout.folder / ".venv" / "left-over").touch()
    (checkout.tools / "break").unlink()
    assert checkout.install() == ["venv", "install"]
    assert not (checkout.folder / ".venv" / "left-over").exists()


def test_an_update_that_broke_off_is_done_anew(checkout: Checkout) -> None:
    checkout.install()
    (checkout.folder / "constraints.txt").write_text("changed\n")
    (checkout.tools / "break").touch()
    assert checkout.install(succeeds=False) == ["install"]
    (checkout.tools / "break").unlink()
    assert checkout.install() == ["venv", "install"]


def test_a_moved_or_damaged_environment_is_made_anew(checkout: Checkout) -> None:
    checkout.install()
    moved = checkout.folder.with_name("moved")
    checkout.folder.rename(moved)
    checkout.folder = moved
    assert checkout.install() == ["venv", "install"]
    (moved / ".venv" / "bin" / "python").unlink()
    assert checkout.install() == ["venv", "install"]


def test_an_old_python_is_refused_with_the_remedy(checkout: Checkout) -> None:
    (checkout.tools / "old").touch()
    assert checkout.install(succeeds=False) == []
    assert "needs Python 3.11 or newer" in checkout.result.stderr
    assert "make PYTHON=" in checkout.result.stderr


def test_no_python_at_all_is_refused_with_the_remedy(checkout: Checkout) -> None:
    checkout.install(False, "PYTHON=")
    assert "needs Python 3.11 or newer" in checkout.result.stderr


def test_the_stack_is_started_and_stopped_with_the_arguments_given(checkout: Checkout) -> None:
    assert checkout.make("up", "ARGS=--workers 0")[-1] == "-m flows.stack up --workers 0 on "
    assert checkout.make("down") == ["-m flows.stack down on "]


def test_a_night_runs_on_the_stack_that_is_up_and_on_no_other(checkout: Checkout) -> None:
    checkout.install()
    assert checkout.make("nightly") == []
    assert checkout.result.returncode == 2
    assert "make up" in checkout.result.stderr
    (checkout.folder / ".stack").mkdir()
    (checkout.folder / ".stack" / "env").write_text("PREFECT_API_URL='http://127.0.0.1:1/api'\n")
    assert checkout.make("nightly") == ["-m flows.nightly on http://127.0.0.1:1/api"]


def test_help_names_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    declared = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert declared
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in declared.group(1).split():
        assert re.search(rf"^  make {name} +\S", shown, re.MULTILINE), name


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_pin_everything_and_name_no_index() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonical(line.split("==")[0]) for line in lines}
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", line) for line in lines)
    assert len(pinned) == len(lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(package for extra in project["optional-dependencies"].values() for package in extra),
    ]
    for requirement in wanted:
        assert canonical(re.split(r"[<>=!~\[; ]", requirement)[0]) in pinned, requirement
