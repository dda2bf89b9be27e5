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
import yaml

ROOT = Path(__file__).parents[2]
CATEGORY = "brushed_metal"

# Small enough for seconds, and still the real method at every stage.
SMALL: dict[str, dict[str, Any]] = {
    "data": {"image_size": 64, "calibration_fraction": 0.3},
    "demo-data": {"surfaces": [CATEGORY], "image_size": 128, "train_good": 8, "test_good": 2, "test_per_defect": 1},
    "ddpm-train": {
        "crop": 32, "channels": [16, 16], "steps": 12, "batch": 2, "warmup": 2, "checkpoint_every": 3,
        "train_timesteps": 50, "readiness_samples": 4,
    },
    "synthesize": {
        "triplets": 8, "steps": 3, "windows": [32], "batch": 4, "perlin_periods": [8, 16], "area": [0.0003, 0.2],
        "min_changed": 0.2, "validation_fraction": 0.25,
    },
    "validate": {
        "min_triplets": 4, "mask_area": [0.00005, 0.5], "min_change_inside": 0.0, "min_visible_share": 0.0,
        "max_change_outside": 1.0, "ssim": [-1.0, 1.0], "worst": 4,
    },
    "distill": {
        "student_steps": 4, "head_steps": 4, "batch": 2, "bottleneck": 8, "decoder_channels": [8, 8],
        "head_channels": 8, "validate_every": 2, "checkpoint_every": 2,
    },
    "evaluate": {"bootstrap": 20, "batch": 4, "gallery": 4, "baseline_vectors": 200, "parity_images": 8},
    "export": {"latency_runs": 3},
}  # fmt: skip

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


@dataclass(frozen=True)
class Project:
    """A small project on disk, with the repository's own dvc.yaml, code and ignore files."""

    folder: Path

    @classmethod
    def create(cls, folder: Path) -> "Project":
        folder.mkdir(parents=True)
        for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "data/.gitignore", "dvc.yaml"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
        # the installed package runs; this copy is what dvc.yaml names as dependencies
        shutil.copytree(ROOT / "src" / "flawsmith", folder / "src" / "flawsmith", ignore=lambda *_: {"__pycache__"})
        project = cls(folder)
        project.set_params(SMALL)
        (folder / "watch").mkdir()
        (folder / "watch" / "sitecustomize.py").write_text(WATCH.format(record=str(folder / "watch" / "opened.tsv")))
        subprocess.run(["git", "init", "-q", folder], check=True)
        return project

    def set_params(self, replaced: Mapping[str, Mapping[str, Any]]) -> None:
        """Write params.yaml: the shipped one, or the one already here, with some values replaced."""
        path = self.folder / "params.yaml"
        content = yaml.safe_load((path if path.exists() else ROOT / "params.yaml").read_text())
        content["categories"] = [CATEGORY]
        for section, values in replaced.items():
            content[section].update(values)
        path.write_text(yaml.safe_dump(content, sort_keys=False))

    def environment(self) -> dict[str, str]:
        binaries = str(Path(sys.executable).parent)
        return {
            **os.environ,
            "PATH": os.pathsep.join([binaries, os.environ.get("PATH", "")]),
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
        lines = (line.partition("\t") for line in (self.folder / "watch" / "opened.tsv").read_text().splitlines())
        return [path for name, _, path in lines if name == stage]


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which `dvc repro` has run from nothing. Tests that change it must put it back."""
    project = Project.create(tmp_path_factory.mktemp("pipeline") / "project")
    project.run("dvc", "repro")
    return project
