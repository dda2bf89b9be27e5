"""The pipeline as a user meets it: what each stage leaves, what runs again and what does not, what stops it."""

import csv
import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from conftest import CATEGORY, DEMO, Project  # type: ignore[import-not-found]
from small_settings import SMALL

from flawsmith.data.images import read_image
from flawsmith.data.masks import read_mask

pytestmark = pytest.mark.timeout(1200)
QUIET = ("--set", "tracking.mode=off")

STAGES = ["ddpm-train", "synthesize", "validate", "distill", "evaluate", "export"]
OUTPUTS = {
    "ddpm-train": ["config.json", "losses.csv", "readiness.json", "samples.png", "unet.safetensors"],
    "synthesize": ["defect", "manifest.parquet", "mask", "normal", "sheet.png"],
    "validate": ["docs", "measures.parquet", "verdict.json", "worst.png"],
    "distill": ["config.json", "detector.safetensors", "losses.csv"],
    "evaluate": [
        "calibration_scores.csv", "curves", "draws.npz", "figures", "gallery", "metrics.json", "network.onnx", "parity",
        "pr.csv", "report.html", "roc.csv", "scores.csv", "summary",
    ],
    "export": ["cost.json", "model.onnx", "parity.json", "variants"],
}  # fmt: skip


def target(stage: str) -> str:
    return f"{stage}@{CATEGORY}"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_leaves_what_dvc_knows_of_and_nothing_else(project: Project, stage: str) -> None:
    assert sorted(path.name for path in project.stage(stage).iterdir() if path.name[0] != ".") == OUTPUTS[stage]
    lock = yaml.safe_load((project.folder / "dvc.lock").read_text())
    outs = {Path(out["path"]).parts[3] for out in lock["stages"][target(stage)]["outs"]}
    assert sorted(outs) == OUTPUTS[stage]


def test_no_half_written_folder_or_checkpoint_is_left(project: Project) -> None:
    left = [path.name for path in (project.folder / "artifacts" / CATEGORY).rglob("*") if path.name.endswith(".tmp")]
    assert left == []
    assert not list((project.folder / "artifacts" / CATEGORY).glob(".resume/*"))


def test_evaluate_tells_what_the_detector_finds_of_each_source(project: Project) -> None:
    found = json.loads((project.stage("evaluate") / "metrics.json").read_text())["detection"]
    assert set(found) == {"diffusion", "own"}
    for one in found.values():
        assert set(one) == {"a90", "a90_95", "unit", "contrast", "images", "defects", "found", "real"}
        assert (one["unit"], one["contrast"]) == ("px", 10)
        assert 0 <= one["found"] <= one["defects"] <= 20
    assert (project.stage("evaluate") / "figures" / "detection.png").is_file()


def test_losses_have_a_row_a_step(project: Project) -> None:
    with (project.stage("ddpm-train") / "losses.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == SMALL["ddpm-train"]["steps"]
    assert all(0 < float(row["loss"]) < 100 for row in rows)
    with (project.stage("distill") / "losses.csv").open() as stream:
        phases = [row["phase"] for row in csv.DictReader(stream)]
    assert phases == [phase for phase in ("student", "head") for _ in range(SMALL["distill"][f"{phase}_steps"])]


def test_triplets_are_complete_and_their_masks_mean_change(project: Project) -> None:
    folder = project.stage("synthesize")
    names = sorted(path.name for path in (folder / "mask").iterdir())
    assert len(names) == SMALL["synthesize"]["triplets"]
    size = SMALL["data"]["image_size"]
    for name in names:
        normal, defect = (read_image(folder / part / name) for part in ("normal", "defect"))
        mask = read_mask(folder / "mask" / name)
        assert normal.shape == defect.shape == (3, size, size)
        assert mask.any()
        assert abs(defect - normal).max(axis=0)[mask].max() > 0


def test_the_model_is_proven(project: Project) -> None:
    proof = json.loads((project.stage("export") / "parity.json").read_text())
    assert set(proof["batches"]) == {"1", "8"}
    assert all(batch["decision_flips"] == 0 for batch in proof["batches"].values())
    metrics = json.loads((project.stage("evaluate") / "metrics.json").read_text())
    assert metrics["labelled"] is True
    assert 0 <= metrics["image_auroc"] <= 1
    assert 0 <= metrics["baseline"]["image_auroc"] <= 1


def test_the_exported_model_scores_a_folder(project: Project, tmp_path: Path) -> None:
    folder = project.folder / "data" / CATEGORY / "test" / "good"
    (tmp_path / "broken.png").write_bytes(b"no image")
    model = project.stage("export") / "model.onnx"
    result = project.run(
        "flawsmith", "predict", str(model), str(folder), str(tmp_path / "broken.png"), "--out", str(tmp_path / "out"),
        succeeds=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "1 unreadable" in result.stdout
    with (tmp_path / "out" / "results.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == DEMO["test_good"] + 1


def test_only_evaluate_opens_the_labelled_test_set(project: Project) -> None:
    def opens(stage: str, part: str) -> bool:
        return any(f"data/{CATEGORY}/{part}" in path for path in project.noted(stage))

    # first that the watch sees what there is to see
    assert opens("evaluate", "test/good/")
    assert opens("evaluate", "ground_truth/")
    for stage in ("ddpm-train", "synthesize", "distill"):
        assert opens(stage, "train/good/")
    for stage in STAGES:
        if stage != "evaluate":
            assert not opens(stage, "test"), stage
            assert not opens(stage, "ground_truth"), stage


def test_the_lineage_of_the_model_leads_back_to_the_data(project: Project) -> None:
    result = project.run("flawsmith", "lineage", str(project.stage("export") / "model.onnx"), succeeds=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for stage in STAGES:
        assert f"<- {stage} ({CATEGORY})" in result.stdout
    assert f"data/{CATEGORY}/train" in result.stdout
    assert f"<- demo-data ({CATEGORY})" in result.stdout


def test_a_triplet_is_explained_bit_for_bit(project: Project, tmp_path: Path) -> None:
    drawing = tmp_path / "why.png"
    result = project.run("flawsmith", "explain", "fit-00000", "--out", str(drawing))
    assert "identical" in result.stdout
    assert read_image(drawing).shape[0] == 3


def test_dvc_shows_metrics_plots_and_the_graph(project: Project) -> None:
    table = project.run("dvc", "metrics", "show").stdout
    assert re.search(r"evaluate/summary/detector\.json +[01]\.", table)
    assert re.search(r"evaluate/summary/patchcore\.json +[01]\.", table)
    assert "image_auroc" in table
    assert max(map(len, table.splitlines())) < 200  # a table a person can read
    assert target("export") in project.run("dvc", "dag").stdout
    project.run("dvc", "plots", "show", "--out", "plots")
    html = (project.folder / "plots" / "index.html").read_text()
    for name in ("Training loss of the diffusion model", "Training loss of student", "ROC", "samples.png", "sheet.png"):
        assert name in html
    shutil.rmtree(project.folder / "plots")


def test_git_keeps_the_small_results_and_ignores_the_rest(project: Project) -> None:
    listed = project.run("git", "ls-files", "--others", "--exclude-standard").stdout.splitlines()
    assert sorted(path for path in listed if path.startswith(("artifacts", "data", "mlflow", "dvc.lock"))) == [
        f"artifacts/{CATEGORY}/ddpm-train/readiness.json",
        f"artifacts/{CATEGORY}/evaluate/metrics.json",
        f"artifacts/{CATEGORY}/evaluate/summary/detector.json",
        f"artifacts/{CATEGORY}/evaluate/summary/patchcore.json",
        f"artifacts/{CATEGORY}/export/cost.json",
        f"artifacts/{CATEGORY}/export/parity.json",
        f"artifacts/{CATEGORY}/validate/verdict.json",
        "data/.gitignore",
        "dvc.lock",
    ]


def test_the_gate_fails_with_a_report_and_nobody_gets_past_it(project: Project, tmp_path: Path) -> None:
    copy = Project(tmp_path / "project")
    shutil.copytree(project.folder, copy.folder, symlinks=True)
    refused = copy.run("flawsmith", "validate", "--set", "validate.min_change_inside=0.9", *QUIET, succeeds=False)
    assert refused.returncode == 1
    assert "flawsmith: " in refused.stderr
    assert json.loads((copy.stage("validate") / "verdict.json").read_text())["passed"] is False
    assert list((copy.stage("validate") / "docs").rglob("index.html"))
    read_image(copy.stage("validate") / "worst.png")
    direct = copy.run("flawsmith", "distill", *QUIET, succeeds=False)
    assert direct.returncode == 1
    assert "quality gate" in direct.stderr


@pytest.mark.parametrize("stage", ["ddpm-train", pytest.param("distill", marks=pytest.mark.slow)])
def test_killed_training_resumes_to_the_same_losses(project: Project, tmp_path: Path, stage: str) -> None:
    copy = Project(tmp_path / "project")
    shutil.copytree(project.folder, copy.folder, symlinks=True)

    def run(**environment: str) -> int:
        before = project.noted(stage).count("checkpoint.pt")
        result = copy.run("flawsmith", stage, *QUIET, succeeds=False, **environment)
        assert result.returncode == (-signal.SIGKILL if environment else 0), result.stderr
        return project.noted(stage).count("checkpoint.pt") - before

    losses = (copy.stage(stage) / "losses.csv").read_bytes()
    weights = next(copy.stage(stage).glob("*.safetensors")).read_bytes()
    whole = project.noted(stage).count("checkpoint.pt")
    shutil.rmtree(copy.stage(stage))  # as DVC does before a stage
    assert run(KILL_AT_CHECKPOINT="3") == 2  # of distill the third is the head's first
    assert not copy.stage(stage).exists()
    assert run() == whole - 2  # it went on; it did not start again
    assert (copy.stage(stage) / "losses.csv").read_bytes() == losses
    assert next(copy.stage(stage).glob("*.safetensors")).read_bytes() == weights
