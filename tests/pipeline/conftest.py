"""The real pipeline, run small: a project of its own, DVC, every stage, through the installed command."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from small_settings import SHIPPED, SMALL, write_params

ROOT = Path(__file__).parents[2]
CATEGORY = "brushed_metal"

DEMO = {"image_size": 128, "train_good": 12, "test_good": 2, "test_per_defect": 1}

# Loaded by every `flawsmith` process of the project: notes which files below data/<category> it opens or lists and
# which checkpoints it puts in place, and kills it with SIGKILL, on wish, just before the n-th checkpoint.
WATCH = """
import os, signal, sys
if sys.argv[0].endswith("flawsmith"):
    record = os.open({record!r}, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    kill_at = int(os.environ.get("KILL_AT_CHECKPOINT", "0"))
    saved = []
    def note(path):
        os.write(record, (sys.argv[1] + "\\t" + path + "\\n").encode(errors="replace"))
    def watch(event, arguments):
        if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.fsdecode(arguments[0]).replace(os.sep, "/")
            if any(part in path for part in ("/train", "/test", "/ground_truth")):
                note(path)
        elif event == "os.rename" and os.path.basename(os.fsdecode(arguments[1])) == "checkpoint.pt":
            saved.append(event)
            if len(saved) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            note("checkpoint.pt")
    sys.addaudithook(watch)
"""


# Stands for `flawsmith` where DVC's behaviour alone is meant: leaves what dvc.yaml says that a stage leaves, or fails.
STUB = """#!{python}
import os, sys
from pathlib import Path
import yaml
stage, _, category = sys.argv[1:4]
if stage == "settings":  # quick, and what it writes decides what DVC runs
    os.execv({real!r}, [{real!r}, *sys.argv[1:]])
if stage == os.environ.get("FAILING_STAGE"):
    sys.exit("flawsmith: refused")
entry = yaml.safe_load(Path("dvc.yaml").read_text())["stages"][stage]
for out in [out for kind in ("outs", "metrics", "plots") for out in entry.get(kind, [])]:
    text = out if isinstance(out, str) else next(iter(out))
    path = Path(text.replace("${{item.category}}", category).replace("${{item.surface}}", category))
    path = path if path.suffix else path / "train" / "content"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{{stage}} {{Path('params.yaml').read_text()}}")
"""


@dataclass(frozen=True)
class Project:
    """A small project on disk, with the repository's own dvc.yaml, code and ignore files."""

    folder: Path
    tools: str = ""  # a folder that PATH begins with

    @classmethod
    def create(cls, folder: Path) -> "Project":
        folder.mkdir(parents=True)
        for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "data/.gitignore", "dvc.yaml"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
        # the installed package runs; this copy is what dvc.yaml names as dependencies
        shutil.copytree(ROOT / "src" / "flawsmith", folder / "src" / "flawsmith", ignore=lambda *_: {"__pycache__"})
        project = cls(folder)
        project.set_params({**SMALL, "demo-data": DEMO})
        (folder / "watch").mkdir()
        (folder / "watch" / "sitecustomize.py").write_text(WATCH.format(record=str(folder / "watch" / "opened.tsv")))
        subprocess.run(["git", "init", "-q", folder], check=True)
        return project

    def set_params(self, replaced: Mapping[str, Mapping[str, Any]]) -> None:
        """Write params.yaml: the shipped one, or the one already here, with some values replaced."""
        path = self.folder / "params.yaml"
        write_params(path, replaced, base=path if path.exists() else SHIPPED, categories=[CATEGORY])

    def environment(self) -> dict[str, str]:
        binaries = str(Path(sys.executable).parent)
        return {
            **os.environ,
            "PATH": os.pathsep.join([*filter(None, [self.tools]), binaries, os.environ.get("PATH", "")]),
            "PYTHONPATH": str(self.folder / "watch"),
            "OMP_NUM_THREADS": "1",
            "DVC_GLOBAL_CONFIG_DIR": str(self.folder / "watch"),
            "DVC_SYSTEM_CONFIG_DIR": str(self.folder / "watch"),
        }

    def run(self, *command: str, succeeds: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the project, with tools of this Python first on PATH.

        Raises:
            AssertionError: it failed although it should succeed; the message holds what it said.
        """
        result = subprocess.run(
            command, cwd=self.folder, env=self.environment() | environment, capture_output=True, text=True, check=False
        )
        if succeeds and result.returncode:
            raise AssertionError(f"{' '.join(command)} exited {result.returncode}:\n{result.stdout}\n{result.stderr}")
        return result

    def stage(self, name: str) -> Path:
        return self.folder / "artifacts" / CATEGORY / name

    def ran(self, result: subprocess.CompletedProcess[str]) -> list[str]:
        """The stages that `dvc repro` started, in order."""
        return re.findall(r"^Running stage '(.+)'", result.stdout, re.MULTILINE)

    def noted(self, stage: str) -> list[str]:
        """What the watch noted of a stage's processes so far: paths below data/<category>, and `checkpoint.pt`."""
        opened = self.folder / "watch" / "opened.tsv"  # there from the first process on
        lines = (line.partition("\t") for line in (opened.read_text() if opened.exists() else "").splitlines())
        return [path for name, _, path in lines if name == stage]


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which `dvc repro` has run from nothing. Tests that change it must put it back."""
    project = Project.create(tmp_path_factory.mktemp("pipeline") / "project")
    project.run("dvc", "repro")
    return project


@pytest.fixture(scope="session")
def stubbed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose stages are stubs, in which `dvc repro` has run."""
    made = Project.create(tmp_path_factory.mktemp("stubbed") / "project")
    tools = made.folder.with_name("tools")
    tools.mkdir()
    real = str(Path(sys.executable).with_name("flawsmith"))
    (tools / "flawsmith").write_text(STUB.format(python=sys.executable, real=real))
    (tools / "flawsmith").chmod(0o755)
    made = Project(made.folder, str(tools))
    made.run("dvc", "repro")
    return made


@pytest.fixture
def copied(stubbed: Project, tmp_path: Path) -> Project:
    """A copy of the stubbed project, to be changed."""
    shutil.copytree(stubbed.folder, tmp_path / "project", symlinks=True)
    return Project(tmp_path / "project", stubbed.tools)
