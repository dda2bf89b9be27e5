"""Who runs what and when, with stubs in the stages' place; one small real study in the slow tier."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from study_samples import Project, create_project

from flawsmith.errors import FlawsmithError
from flawsmith.evaluation.metrics import KEYS
from flawsmith.files import digest_path, read_json, write_json
from flawsmith_lab.study import study
from flawsmith_lab.study.plan import PIPELINE, StageRun, build_plan
from flawsmith_lab.study.results import MEASURED
from flawsmith_lab.study.study import perform, run_in_process, run_study

COST = {"peak_mb": 200.0, "peak_device_mb": None, "device": "cpu", "threads": 1, "resumed": False, "output": "d"}


class Scene:
    """A project whose stages leave made-up figures; `ran` names them, `broken` holds reasons to fail by stage."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.ran: list[str] = []
        self.broken: dict[str, str] = {}
        self.running = self.most = 0
        self.pause = 0.0
        self.lock = threading.Lock()

    def stage(self, run: StageRun) -> dict[str, Any] | str:
        with self.lock:
            self.ran.append(run.stage)
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(self.pause)
        with self.lock:
            self.running -= 1
        if run.stage in self.broken:
            return self.broken[run.stage]
        found = {**dict.fromkeys(MEASURED, 0.5), "labelled": False, "by_defect": {"dent": {"image_auroc": 0.75}}}
        write_json(run.folder / "metrics.json", found)
        return COST

    def run(self, workers: int = 1, **changes: Any) -> study.Outcome:
        return run_study(self.project.request(**changes), workers, "flawsmith study")

    def rows(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = read_json(self.project.folder / "out" / "results.json")
        return found


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    made = Scene(create_project(tmp_path / "project"))
    monkeypatch.setattr(study, "run_in_process", made.stage)
    return made


def test_every_stage_runs_once_after_what_it_reads_and_a_second_call_runs_none(scene: Scene) -> None:
    assert scene.run() == study.Outcome(1, 0, scene.project.folder / "out" / "report.html")
    assert scene.ran == list(PIPELINE)
    before = scene.rows()
    scene.run()
    assert scene.ran == list(PIPELINE)
    assert scene.rows() == before
    (row,) = before
    assert (row["image_auroc"], row["image_auroc_by_defect"], row["detector"]) == (0.5, {"dent": 0.75}, "d")
    assert set(row["stage_seconds"]) == set(PIPELINE)
    assert (scene.project.folder / "out" / row["evaluation"] / "metrics.json").is_file()


@pytest.mark.parametrize("workers", [1, 3])
def test_shared_stages_run_once_and_no_more_than_the_asked_for_workers_at_once(
    scene: Scene, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    scene.pause = 0.05
    scene.run(workers, methods=("flawsmith", "random-mask", "patchcore"), seeds=(0, 1))
    assert Counter(scene.ran) == {"ddpm-train": 2, "patchcore": 2, **dict.fromkeys(PIPELINE[1:], 4)}
    assert scene.most == workers


def test_several_workers_share_the_cores(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    scene.run(4, methods=("patchcore",))
    assert os.environ["OMP_NUM_THREADS"] == "2"


def test_a_failure_ends_what_depends_on_it_and_nothing_else_and_is_tried_again(scene: Scene) -> None:
    scene.broken["ddpm-train"] = "no room left"
    assert scene.run(methods=("flawsmith", "random-mask", "no-diffusion")).failed == 2
    assert scene.ran == ["ddpm-train", *PIPELINE[1:]]
    failed = [(row["failed_stage"], row["failure"]) for row in scene.rows() if row["image_auroc"] is None]
    assert failed == [("ddpm-train", "no room left")] * 2
    assert "Cells without a result" in (scene.project.folder / "out" / "report.md").read_text()
    scene.broken.clear()
    assert scene.run(methods=("flawsmith",)).failed == 0


def test_a_run_without_its_mark_was_killed_and_is_made_again(scene: Scene) -> None:
    scene.run(methods=("patchcore",))
    (run,) = build_plan(scene.project.request(methods=("patchcore",))).runs
    run.folder.with_suffix(".json").unlink()
    scene.run(methods=("patchcore",))
    assert scene.ran == ["patchcore", "patchcore"]


def test_what_is_finished_is_written_while_others_still_run(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(run: StageRun) -> dict[str, Any] | str:
        if run.stage == "ddpm-train":
            raise KeyboardInterrupt
        return scene.stage(run)

    monkeypatch.setattr(study, "run_in_process", stop)
    with pytest.raises(KeyboardInterrupt):
        scene.run(methods=("patchcore", "flawsmith"))
    assert [row["image_auroc"] for row in scene.rows()] == [0.5, None]


@pytest.fixture
def run(tmp_path: Path) -> StageRun:
    """The stage run `patchcore` of a small project."""
    return build_plan(create_project(tmp_path / "project").request(methods=("patchcore",))).runs[0]


def test_a_stage_is_measured_and_its_output_digested(run: StageRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(layout: Any) -> None:
        write_json(layout.stage("patchcore") / "metrics.json", {})

    monkeypatch.setattr(study, "import_module", lambda name: SimpleNamespace(run_baseline=act))
    found = perform(run)
    assert found["output"] == digest_path(run.folder)
    assert 20 < found["peak_mb"] < 20_000
    assert not found["resumed"]
    run.layout.resume("patchcore").mkdir()
    assert perform(run)["resumed"]
    with pytest.raises(FlawsmithError, match="have changed since this study began"):
        perform(replace(run, code="another"))
    with pytest.raises(FlawsmithError, match="asked for `export`"):
        run.layout.stage("export")


def die(run: StageRun) -> None:
    os._exit(1)


def test_a_process_that_fails_or_is_killed_has_a_reason(run: StageRun, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_in_process(replace(run, code="another")) == (
        "The source files have changed since this study began; start it again."
    )
    monkeypatch.setattr(study, "_execute", die)
    assert "was killed" in str(run_in_process(run))


@pytest.mark.slow
def test_a_real_study_is_killed_goes_on_and_gives_each_methods_figures(tmp_path: Path) -> None:
    project, out = create_project(tmp_path / "project"), tmp_path / "out"
    command = [Path(sys.executable).with_name("flawsmith"), "study", "--params", project.params, "--out", out,
               "--methods", "flawsmith,no-diffusion,patchcore", "--workers", "2"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not list((out / "store").glob("tiles/*/*.json")):
        assert first.poll() is None
        time.sleep(0.2)
    first.kill()
    first.wait()
    kept = {path: path.stat().st_mtime_ns for path in (out / "store").glob("tiles/*/*.json")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 cells have results" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    stages = Counter(path.parent.name for path in (out / "store").glob("tiles/*/*.json"))
    assert stages == {"ddpm-train": 1, "patchcore": 1, **dict.fromkeys(PIPELINE[1:], 2)}
    rows = json.loads((out / "results.json").read_text())
    for row in rows:
        evaluated = read_json(out / row["evaluation"] / "metrics.json")
        assert [row[key] for key in KEYS] == [evaluated[key] for key in KEYS]
        assert row["seconds"] == pytest.approx(sum(row["stage_seconds"].values()), abs=0.01)
        assert all(100 < peak < 4000 for peak in row["stage_peak_mb"].values())  # MiB: torch alone takes 200
    trained = {digest_path(path) for path in (out / "store" / "tiles" / "distill").iterdir() if path.is_dir()}
    assert {row["detector"] for row in rows[:2]} == trained
    assert rows[2]["detector"] is None
    assert list(pd.read_parquet(out / "results.parquet")["method"]) == [row["method"] for row in rows]
    assert "Minus patchcore" in (out / "report.md").read_text()
