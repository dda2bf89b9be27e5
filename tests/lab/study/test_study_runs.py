"""Real studies of a tiny category: killed and resumed, shared by two processes, stopped by the gate.

One study is made once and used by most tests, since every stage of it is a process that imports torch.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from study_samples import Project, costs_in, create_project

from flawsmith.files import digest_path, read_json
from flawsmith.layout import Layout
from flawsmith.settings import load_settings
from flawsmith_lab.study.plan import build_plan
from flawsmith_lab.study.store import Store

METHODS = "flawsmith,no-diffusion,knn"
# Loaded by every Python of a study: kills, just before the n-th checkpoint is put in place, the process or its parent.
SABOTAGE = """
import os, signal, time
victim, number = os.environ.get("KILL", ""), int(os.environ.get("KILL_AT", "0"))
if victim:
    saved = []
    def watch(event, arguments):
        if event == "os.rename" and os.path.basename(os.fsdecode(arguments[1])) == "checkpoint.pt":
            saved.append(event)
            if len(saved) == number:
                os.kill(os.getppid() if victim == "parent" else os.getpid(), signal.SIGKILL)
                time.sleep(60)  # the stage must notice its study's end, not outrun it on a busy machine
    import sys
    sys.addaudithook(watch)
"""


@dataclass(frozen=True)
class Made:
    """A finished study, what its calls said, and what lay in its store in between."""

    project: Project
    out: Path
    calls: tuple[subprocess.CompletedProcess[str], ...]
    failed_rows: list[dict[str, object]]

    def rows(self):
        return read_json(self.out / "results.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    """Three calls: the study is killed at the second checkpoint of the diffusion model; its stage at the next; done."""
    folder = tmp_path_factory.mktemp("study")
    project, out = create_project(folder / "project"), folder / "out"
    (folder / "sabotage").mkdir()
    (folder / "sabotage" / "sitecustomize.py").write_text(SABOTAGE)
    places = [str(folder / "sabotage"), *filter(None, [os.environ.get("PYTHONPATH")])]
    sabotage = {"PYTHONPATH": os.pathsep.join(places), "KILL_AT": "2"}
    arguments = ("--methods", "flawsmith", "--out", out)
    killed = project.study(*arguments, KILL="parent", **sabotage)
    _wait_until_unlocked(project, out)
    failed = project.study(*arguments, KILL="itself", **sabotage | {"KILL_AT": "1"})
    rows = read_json(out / "results.json")
    done = project.study("--methods", METHODS, "--part", "all,report", "--out", out, "--workers", "2")
    return Made(project, out, (killed, failed, done), rows)


def _wait_until_unlocked(project: Project, out: Path) -> None:
    """The stage of a killed study ends by itself."""
    from filelock import FileLock

    (lock,) = (out / "store" / "tiles" / "ddpm-train").glob("*.lock")
    with FileLock(lock, timeout=60):
        pass


def stage_folder(made: Made, stage: str, method: str) -> Path:
    plan = build_plan(made.project.request(methods=(method,)))
    (task,) = (task for task in plan.tasks if task.stage == stage)
    return Store(made.out / "store").output(task)


def test_a_killed_study_goes_on_where_it_stood(made):
    killed, failed, done = made.calls
    assert killed.returncode == -9
    assert failed.returncode == 1
    assert done.returncode == 0, done.stderr
    cost = costs_in(made.out)["ddpm-train", stage_folder(made, "ddpm-train", "flawsmith").name]
    assert cost["attempts"] == 3


def test_a_resumed_stage_gives_the_bits_of_one_that_was_never_stopped(made, tmp_path):
    """And of the pipeline's own command: a study has no code path of its own."""
    project = create_project(tmp_path / "again")
    front = Path(sys.executable).with_name("flawsmith")
    subprocess.run(
        [front, "ddpm-train", "--params", project.params, "--set", "tracking.mode=off"],
        env=project.environment({}), check=True, capture_output=True,
    )  # fmt: skip
    settings = load_settings(project.params)
    ours = Layout(settings, "tiles", project.folder).stage("ddpm-train")
    for name in ("unet.safetensors", "losses.csv"):
        assert digest_path(stage_folder(made, "ddpm-train", "flawsmith") / name) == digest_path(ours / name)


def test_a_stage_that_is_killed_is_a_failed_cell_with_its_reason(made):
    (row,) = made.failed_rows
    assert row["image_auroc"] is None
    assert row["failed_stage"] == "ddpm-train"
    assert "killed by signal 9" in row["failure"]
    assert "0 of 1 cells have results" in made.calls[1].stdout


def test_the_diffusion_model_is_trained_once_and_every_other_stage_once_a_method(made):
    stages = [stage for stage, _ in costs_in(made.out)]
    assert sorted(stages) == sorted(
        ["ddpm-train", *["synthesize", "validate", "distill", "evaluate", "evaluate"] * 2, "knn", "knn"]
    )
    assert [cost["attempts"] for key, cost in costs_in(made.out).items() if key[0] != "ddpm-train"] == [1] * 12


def test_rows_hold_each_methods_figures_and_costs(made):
    rows = made.rows()
    assert {(row["method"], row["part"]) for row in rows} == {
        (method, part) for method in METHODS.split(",") for part in ("all", "report")
    }
    for row in rows:
        evaluated = read_json(made.out / row["evaluation"] / "metrics.json")
        assert row["image_auroc"] == evaluated["image_auroc"]
        assert row["pixel_ap"] == evaluated["pixel_ap"]
        assert row["false_alarm_rate"] == evaluated["test_false_alarm_rate"]
        assert row["part"] == evaluated["part"]
        assert row["image_auroc_by_defect"] == {"dent": evaluated["by_defect"]["dent"]["image_auroc"]}
        assert row["seconds"] == pytest.approx(sum(row["stage_seconds"].values()), abs=0.01)
        assert row["peak_mb"] == max(row["stage_peak_mb"].values())
        assert all(100 < peak < 4000 for peak in row["stage_peak_mb"].values())  # MiB: torch alone takes 200
    by_method = {row["method"]: row for row in rows if row["part"] == "all"}
    assert set(by_method["flawsmith"]["stage_seconds"]) - set(by_method["no-diffusion"]["stage_seconds"]) == {
        "ddpm-train"
    }
    assert set(by_method["knn"]["stage_seconds"]) == {"knn"}
    detector = stage_folder(made, "distill", "flawsmith")
    assert by_method["flawsmith"]["detector"] == digest_path(detector)
    assert by_method["knn"]["detector"] is None


def test_the_table_and_the_reports_lie_beside(made):
    frame = pd.read_parquet(made.out / "results.parquet")
    assert list(frame["method"]) == [row["method"] for row in made.rows()]
    assert "seconds_ddpm-train" in frame
    text = (made.out / "report.md").read_text()
    assert "Minus knn" in text
    assert "tiles, report half of the test images" in text
    assert "over images" in (made.out / "report.html").read_text()


def test_a_finished_study_computes_nothing_again(made):
    before = {path: path.stat().st_mtime_ns for path in (made.out / "store").rglob("*.cost.json")}
    again = made.project.study("--methods", METHODS, "--part", "all,report", "--out", made.out)
    assert again.returncode == 0
    assert "13 of them done already" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in (made.out / "store").rglob("*.cost.json")} == before


def test_the_gates_no_ends_its_cell_alone_and_is_not_asked_twice(made):
    plan = build_plan(
        made.project.request(
            methods=("flawsmith",),
            grid={"validate.min_visible_share": (1.0,)},
            replaced={"validate.mostly": 1.0, "validate.visible_change": 0.9},
        )
    )
    arguments = (
        "--methods", "flawsmith,knn", "--grid", "validate.min_visible_share=1.0", "--set", "validate.mostly=1.0",
        "--set", "validate.visible_change=0.9", "--out", made.out,
    )  # fmt: skip
    first = made.project.study(*arguments)
    assert first.returncode == 1, first.stderr
    rows = {row["method"]: row for row in read_json(made.out / "results.json")}
    assert rows["flawsmith"]["failed_stage"] == "validate"
    assert "quality gate" in rows["flawsmith"]["failure"]
    assert rows["knn"]["image_auroc"] is not None
    assert "Cells without a result" in (made.out / "report.md").read_text()
    (gate,) = (task for task in plan.tasks if task.stage == "validate")
    store = Store(made.out / "store")
    assert (store.output(gate) / "verdict.json").is_file()
    moment = store.beside(gate, "failed.json").stat().st_mtime_ns
    assert made.project.study(*arguments).returncode == 1
    assert store.beside(gate, "failed.json").stat().st_mtime_ns == moment


def test_two_studies_on_one_folder_share_the_work(tmp_path):
    project, out = create_project(tmp_path / "project"), tmp_path / "out"
    arguments = ("--methods", "knn", "--seeds", "0,1,2", "--out", out)
    started = [
        subprocess.Popen(
            project.command(*arguments), env=project.environment({}), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    answers = [process.communicate(timeout=500) for process in started]
    assert [process.returncode for process in started] == [0, 0], answers
    assert [cost["attempts"] for cost in costs_in(out).values()] == [1, 1, 1]
    assert all("3 of 3 cells have results" in said for said, _ in answers)
    seeds = [row["seed"] for row in json.loads((out / "results.json").read_text())]
    assert seeds == [0, 1, 2]
