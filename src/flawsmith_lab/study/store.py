"""The folder of a study's stage runs: OUT/store/<category>/<stage>/<digest>, and beside each what it cost.

<digest>/             what the stage wrote, as in artifacts/<category>/<stage>
<digest>.task.json    settings and upstream digests it runs with
<digest>.cost.json    seconds and memory; written last, so a run that has it is done
<digest>.failed.json  why it failed
<digest>.log          what it said
<digest>.lock         held by the process that runs it
<digest>.resume/      the checkpoint of an unfinished training
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flawsmith.errors import FlawsmithError, UserError
from flawsmith.files import read_json, write_json
from flawsmith.layout import Layout
from flawsmith_lab.study.plan import Task, settings_content


@dataclass(frozen=True)
class Failure:
    """Why a stage run ended without its outputs; `kind` is the exception's class."""

    kind: str
    reason: str

    @property
    def is_final(self) -> bool:
        """A quality gate's no follows from what the digest covers; anything else is worth another try."""
        return self.kind == "QualityGateError"


@dataclass(frozen=True)
class Store:
    """Paths and states; nothing here computes."""

    folder: Path

    def output(self, task: Task) -> Path:
        return self.folder / task.category / task.stage / task.digest

    def beside(self, task: Task, suffix: str) -> Path:
        """A file beside the output: its bytes must not depend on when and where the stage ran."""
        return self.output(task).with_name(f"{task.digest}.{suffix}")

    def is_done(self, task: Task) -> bool:
        return self.beside(task, "cost.json").is_file() and self.output(task).is_dir()

    def cost(self, task: Task) -> dict[str, Any]:
        """What `runner` measured of a run that is done."""
        found: dict[str, Any] = read_json(self.beside(task, "cost.json"))
        return found

    def failure(self, task: Task, since: float) -> Failure | None:
        """Why a run failed; one before `since` (seconds of the epoch) counts only if it is final."""
        path = self.beside(task, "failed.json")
        try:
            moment = path.stat().st_mtime
            failure = Failure(**read_json(path))
        except (FileNotFoundError, UserError):  # gone meanwhile: another study tries it again
            return None
        return failure if failure.is_final or moment >= since else None

    def write_task(self, task: Task, root: Path) -> Path:
        """Write down what `runner` shall run, and return the file."""
        path = self.beside(task, "task.json")
        folders = {one.stage: str(self.output(one).resolve()) for one in (*task.upstream, task)}
        write_json(
            path,
            {
                "stage": task.stage,
                "category": task.category,
                "root": str(root),
                "folders": folders,
                "code": list(task.code),
                "code_digest": task.code_digest,
                "settings": settings_content(task.settings),
            },
        )
        return path


@dataclass(frozen=True)
class StoredLayout(Layout):
    """A category's paths, with each stage in a folder of its own choice; no stage can tell the difference."""

    folders: Mapping[str, Path] = field(default_factory=dict)

    def stage(self, name: str) -> Path:
        try:
            return self.folders[name]
        except KeyError as error:  # a stage that opens what dvc.yaml does not list
            raise FlawsmithError(
                f"A stage asked for `{name}`, which dvc.yaml does not name among its dependencies; add it there."
            ) from error

    def resume(self, name: str) -> Path:
        folder = self.stage(name)
        return folder.with_name(f"{folder.name}.resume")
