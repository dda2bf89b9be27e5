"""Who runs what, when and how often, with a shell script in the runner's place: no stage computes here."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from study_samples import create_project

from flawsmith.errors import FlawsmithError
from flawsmith.files import write_json
from flawsmith.settings import load_settings
from flawsmith_lab.study import worker
from flawsmith_lab.study.plan import build_plan
from flawsmith_lab.study.runner import main as run_task
from flawsmith_lab.study.store import Failure, Store, StoredLayout
from flawsmith_lab.study.worker import run_tasks

# called as: script -P -m flawsmith_lab.study.runner TASK; `before` and `after` surround what a runner leaves
SCRIPT = """#!/bin/sh
base=${{4%.task.json}}
echo "begin $(basename $(dirname $base)) $(basename $base)" >> {record}
{before}
mkdir $base && echo '{{"seconds": 1.0}}' > $base.cost.json
echo "end $(basename $(dirname $base)) $(basename $base)" >> {record}
"""


class Scene:
    """A plan, its store, and what the scripts wrote down."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.project = create_project(folder / "project")
        self.store = Store(folder / "out" / "store")
        self.record = folder / "record"
        self.record.touch()
        self.folder, self.patch = folder, monkeypatch
        self.finished: list[str] = []

    def run(self, methods=("flawsmith",), seeds=(0,), workers: int = 1, before: str = "", on_finished=None):
        script = self.folder / "script"
        script.write_text(SCRIPT.format(record=self.record, before=before))
        script.chmod(0o755)
        self.patch.setattr(sys, "executable", str(script))
        self.patch.setattr(worker, "POLL_SECONDS", 0.02)
        plan = build_plan(self.project.request(methods=methods, seeds=seeds))
        return run_tasks(
            plan.tasks, self.store, plan.root, workers, on_finished or (lambda task: self.finished.append(task.stage))
        )

    def between_looks(self, act: Callable[[], None]) -> None:
        """Call `act` where the study sleeps; the module `time` is left alone, for subprocess sleeps by it too."""
        self.patch.setattr(worker, "time", SimpleNamespace(time=time.time, sleep=lambda seconds: act()))

    def lines(self, word: str) -> list[str]:
        return [line.split()[1] for line in self.record.read_text().splitlines() if line.startswith(word)]


@pytest.fixture
def scene(tmp_path, monkeypatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


def test_every_stage_runs_once_after_what_it_reads_and_is_reported(scene):
    assert scene.run() == {}
    order = ["ddpm-train", "synthesize", "validate", "distill", "evaluate"]
    assert scene.lines("begin") == order
    assert scene.finished == order
    assert scene.run() == {}
    assert scene.lines("begin") == order


@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_than_the_asked_for_workers_run_at_once(scene, workers):
    scene.run(methods=("flawsmith", "cutpaste", "knn"), seeds=(0, 1), workers=workers, before="sleep 0.1")
    running = most = 0
    for line in scene.record.read_text().splitlines():
        running += 1 if line.startswith("begin") else -1
        most = max(most, running)
    assert most == workers
    assert len(scene.lines("end")) == 2 * (5 + 4 + 1)


def test_a_failure_ends_what_depends_on_it_and_nothing_else(scene):
    failures = scene.run(methods=("flawsmith", "no-diffusion"), before="case $4 in */ddpm-train/*) exit 1;; esac")
    assert [key[1] for key in failures] == ["ddpm-train"]
    (failure,) = failures.values()
    assert "ended with status 1: it said nothing" in failure.reason
    assert sorted(scene.finished) == ["distill", "evaluate", "synthesize", "validate"]


def test_what_a_dying_stage_said_last_is_its_reason(scene):
    (failure,) = scene.run(before="echo no room left; exit 3").values()
    assert "ended with status 3: no room left" in failure.reason


def test_a_stage_that_is_killed_is_a_failure_with_the_signals_name(scene):
    (failure,) = scene.run(before="kill -KILL $$").values()
    assert "SIGKILL" in failure.reason


def test_a_failure_is_tried_again_by_the_next_call_but_a_gates_no_is_not(scene):
    kind = scene.folder / "kind"
    write = f"cp {kind} $base.failed.json; exit 1"
    write_json(kind, {"kind": "UserError", "reason": "a bad image"})
    (failure,) = scene.run(before=write).values()
    assert failure == Failure("UserError", "a bad image")
    time.sleep(0.05)  # a file's time is coarser than the clock's
    write_json(kind, {"kind": "QualityGateError", "reason": "no"})
    assert [one.reason for one in scene.run(before=write).values()] == ["no"]
    time.sleep(0.05)
    assert [one.reason for one in scene.run(before=write).values()] == ["no"]
    assert scene.lines("begin") == ["ddpm-train", "ddpm-train"]


def test_a_stage_that_another_process_has_is_waited_for(scene):
    (task,) = build_plan(scene.project.request(methods=("knn",))).tasks
    lock = scene.store.beside(task, "lock")
    lock.parent.mkdir(parents=True)
    held = FileLock(lock)
    held.acquire()
    rounds = []

    def pause() -> None:
        rounds.append(1)
        time.sleep(0.01)
        if len(rounds) == 5:  # the other process is done
            scene.store.output(task).mkdir()
            write_json(scene.store.beside(task, "cost.json"), {"seconds": 1.0})
            held.release()

    scene.between_looks(pause)
    assert scene.run(methods=("knn",)) == {}
    assert scene.lines("begin") == []
    assert scene.finished == ["knn"]


def test_an_interrupted_study_leaves_no_process(scene):
    def interrupt() -> None:
        if scene.lines("begin"):
            raise KeyboardInterrupt

    scene.between_looks(interrupt)
    with pytest.raises(KeyboardInterrupt):
        scene.run(before=f"echo $$ > {scene.folder}/pid; exec sleep 600")
    with pytest.raises(ProcessLookupError):
        os.kill(int((scene.folder / "pid").read_text()), 0)


def test_a_second_interruption_kills_what_does_not_want_to_end(scene):
    def interrupt() -> None:
        if (scene.folder / "pid").exists():
            raise KeyboardInterrupt

    def interrupt_again(seconds: float) -> None:
        raise KeyboardInterrupt

    scene.between_looks(interrupt)
    scene.patch.setattr(subprocess, "time", SimpleNamespace(sleep=interrupt_again))
    with pytest.raises(KeyboardInterrupt):
        scene.run(before=f"trap '' TERM; cd {scene.folder}; echo $$ > new; mv new pid; exec sleep 600")
    with pytest.raises(ProcessLookupError):
        os.kill(int((scene.folder / "pid").read_text()), 0)


def test_several_workers_share_the_cores(scene, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    told = f"echo ${{OMP_NUM_THREADS-unset}} >> {scene.folder}/threads"
    scene.run(methods=("knn",), workers=1, before=told)
    scene.run(methods=("knn",), seeds=(1,), workers=4, before=told)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    scene.run(methods=("knn",), seeds=(2,), workers=4, before=told)
    assert (scene.folder / "threads").read_text().split() == ["unset", "2", "3"]


def write_task(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, act: Callable[[StoredLayout], None]
) -> tuple[Path, Store]:
    """A task of the stage validate, whose function is `act`."""
    from flawsmith.stages import validate
    from flawsmith_lab.study import runner

    monkeypatch.setattr(validate, "run", act)
    monkeypatch.setattr(runner, "_end_with_parent", lambda: None)  # our stdin is not a study's
    plan = build_plan(scene.project.request())
    (task,) = (task for task in plan.tasks if task.stage == "validate")
    path = scene.store.beside(task, "task.json")
    scene.store.write_task(task, plan.root)
    return path, scene.store


def test_the_runner_measures_and_a_second_one_has_nothing_to_do(scene, monkeypatch):
    calls = []

    def act(layout):
        calls.append(layout.category)
        layout.stage("validate").mkdir()
        (layout.stage("validate") / "out").write_text(layout.stage("synthesize").parent.name)

    path, store = write_task(scene, monkeypatch, act)
    assert run_task(path) == run_task(path) == 0
    assert calls == ["tiles"]
    (task,) = (one for one in build_plan(scene.project.request()).tasks if one.stage == "validate")
    assert store.is_done(task)
    cost = store.cost(task)
    assert cost["attempts"] == 1
    assert 0 < cost["seconds"] < 600
    assert 20 < cost["peak_mb"] < 20_000


def test_the_runner_leaves_a_task_alone_that_another_one_has(scene, monkeypatch):
    path, _ = write_task(scene, monkeypatch, lambda layout: pytest.fail("it is another's"))
    with FileLock(path.with_name(path.name.replace("task.json", "lock"))):
        assert run_task(path) == 75


def test_the_runner_writes_down_why_a_stage_failed(scene, monkeypatch):
    def act(layout):
        raise ValueError("odd\nnumbers")

    path, store = write_task(scene, monkeypatch, act)
    assert run_task(path) == 1
    (task,) = (one for one in build_plan(scene.project.request()).tasks if one.stage == "validate")
    assert store.failure(task, 0) == Failure("ValueError", "odd numbers")
    assert not store.is_done(task)


def test_the_runner_refuses_code_that_is_not_the_plans(scene, monkeypatch):
    path, store = write_task(scene, monkeypatch, lambda layout: pytest.fail("the digest would lie"))
    path.write_text(path.read_text().replace('"code_digest": "', '"code_digest": "0'))
    assert run_task(path) == 1
    (task,) = (one for one in build_plan(scene.project.request()).tasks if one.stage == "validate")
    failure = store.failure(task, 0)
    assert failure is not None
    assert "have changed since this study began" in failure.reason


def test_time_of_killed_attempts_counts_as_far_as_a_checkpoint_keeps_it(scene, monkeypatch):
    path, store = write_task(scene, monkeypatch, lambda layout: layout.stage("validate").mkdir())
    (task,) = (one for one in build_plan(scene.project.request()).tasks if one.stage == "validate")
    began = time.time() - 5000
    write_json(store.beside(task, "attempt.json"), {"attempts": 2, "seconds": 1000.0, "began": began})
    checkpoint = store.beside(task, "resume") / "checkpoint.pt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    os.utime(checkpoint, (began + 300, began + 300))
    assert run_task(path) == 0
    cost = store.cost(task)
    assert cost["attempts"] == 3
    assert 1300 <= cost["seconds"] < 1600
    assert not store.beside(task, "attempt.json").exists()


def test_time_of_an_attempt_without_checkpoint_is_lost(scene, monkeypatch):
    path, store = write_task(scene, monkeypatch, lambda layout: layout.stage("validate").mkdir())
    (task,) = (one for one in build_plan(scene.project.request()).tasks if one.stage == "validate")
    write_json(store.beside(task, "attempt.json"), {"attempts": 1, "seconds": 1e6, "began": time.time() - 5000})
    assert run_task(path) == 0
    assert store.cost(task)["seconds"] < 1000


def test_a_stage_that_opens_what_dvc_yaml_does_not_list_is_told_so(scene):
    layout = StoredLayout(load_settings(scene.project.params), "tiles", scene.project.folder, {})
    with pytest.raises(FlawsmithError, match=r"which dvc\.yaml does not name"):
        layout.stage("export")
