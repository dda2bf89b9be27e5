"""The pipeline as a user meets it: what each stage leaves, what runs again and what does not, what stops it."""

import csv
import json
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import CATEGORY, DEMO, Project  # type: ignore[import-not-found]
from small_settings import SMALL

from flawsmith.data.images import read_image
from flawsmith.data.masks import read_mask

pytestmark = pytest.mark.timeout(1200)

STAGES = ["ddpm-train", "synthesize", "validate", "distill", "evaluate", "export"]
OUTPUTS = {
    "ddpm-train": ["config.json", "losses.csv", "readiness.json", "samples.png", "unet.safetensors"],
    "synthesize": ["defect", "manifest.parquet", "mask", "normal", "sheet.png"],
    "validate": ["docs", "measures.parquet", "verdict.json", "worst.png"],
    "distill": ["config.json", "detector.safetensors", "losses.csv"],
    "evaluate": [
        "calibration_scores.csv", "curves", "draws.npz", "figures", "gallery", "metrics.json", "parity", "pr.csv",
        "report.html", "roc.csv", "scores.csv", "summary",
    ],
    "export": ["cost.json", "model.onnx", "parity.json", "variants"],
}  # fmt: skip


def target(stage: str) -> str:
    return f"{stage}@{CATEGORY}"


@pytest.fixture
def restored(project: Project) -> Iterator[Project]:
    """The project, whose params, lock and outputs are put back after the test."""
    kept = {name: (project.folder / name).read_bytes() for name in ("params.yaml", "dvc.lock")}
    saved = project.folder.with_name("saved")
    shutil.copytree(project.folder / "artifacts", saved)
    yield project
    shutil.rmtree(project.folder / "artifacts")
    saved.rename(project.folder / "artifacts")
    for name, content in kept.items():
        (project.folder / name).write_bytes(content)


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


def test_losses_have_a_row_a_step(project: Project) -> None:
    with (project.stage("ddpm-train") / "losses.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == SMALL["ddpm-train"]["steps"]
    assert all(0 < float(row["loss"]) < 100 for row in rows)
    with (project.stage("distill") / "losses.csv").open() as stream:
        phases = [row["phase"] for row in csv.DictReader(stream)]
    assert phases == [
        phase for phase in ("student", "head", "locator") for _ in range(SMALL["distill"][f"{phase}_steps"])
    ]


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


def test_a_second_repro_runs_nothing(project: Project) -> None:
    before = (project.folder / "dvc.lock").read_bytes()
    result = project.run("dvc", "repro")
    assert project.ran(result) == []
    assert "Data and pipelines are up to date." in result.stdout
    assert (project.folder / "dvc.lock").read_bytes() == before


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


def test_the_detectors_own_weights_of_maps_give_the_detectors_own_figures(project: Project, tmp_path: Path) -> None:
    distill = yaml.safe_load((project.folder / "params.yaml").read_text())["distill"]
    own = ":".join(",".join(map(str, distill[key])) for key in ("map_weights", "score_weights"))
    asked = [own, "0,0,0,0,1"]
    call = [sys.executable, "-m", "flawsmith_lab.study.maps", "--category", CATEGORY, "--part", "all"]
    call += [word for one in asked for word in ("--weights", one)]
    told = project.run(*call, "--seed", "0", "--out", str(tmp_path / "rows.json"))
    as_trained, locator = json.loads((tmp_path / "rows.json").read_text())["rows"]
    metrics = json.loads((project.stage("evaluate") / "metrics.json").read_text())
    for key in ("image_auroc", "pixel_auroc", "pixel_ap", "aupro"):
        assert as_trained[key] == pytest.approx(metrics[key], abs=2e-3), key
    assert as_trained["pixel_auroc"] != locator["pixel_auroc"]
    assert told.stdout.count("|\n") == 4
    wrong = project.run(*call[:-1], "1,1", succeeds=False)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "this detector has 5 maps" in wrong.stderr


def test_dvc_shows_metrics_plots_and_the_graph(project: Project) -> None:
    table = project.run("dvc", "metrics", "show").stdout
    assert re.search(r"evaluate/summary/detector\.json +[01]\.", table)
    assert re.search(r"evaluate/summary/knn-baseline\.json +[01]\.", table)
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
        f"artifacts/{CATEGORY}/evaluate/summary/knn-baseline.json",
        f"artifacts/{CATEGORY}/export/cost.json",
        f"artifacts/{CATEGORY}/export/parity.json",
        f"artifacts/{CATEGORY}/validate/verdict.json",
        "data/.gitignore",
        "dvc.lock",
    ]


def test_a_users_category_is_seen_by_dvc_and_its_images_are_ignored_by_git(restored: Project) -> None:
    # an ignore pattern such as `/data/*` at the top makes DVC overlook data/*.dvc, and `dvc checkout` delete the images
    images = restored.folder / "data" / "bottle" / "train" / "good"
    images.mkdir(parents=True)
    shutil.copy(next((restored.folder / "data" / CATEGORY / "train" / "good").iterdir()), images)
    restored.run("dvc", "add", "data/bottle")
    listed = restored.run("git", "ls-files", "--others", "--exclude-standard", "data").stdout.splitlines()
    assert listed == ["data/.gitignore", "data/bottle.dvc"]
    restored.run("dvc", "checkout")
    assert list(images.iterdir())
    restored.set_params({})
    content = yaml.safe_load((restored.folder / "params.yaml").read_text())
    (restored.folder / "params.yaml").write_text(yaml.safe_dump({**content, "categories": [CATEGORY, "bottle"]}))
    assert "data/bottle.dvc" in restored.run("dvc", "dag", "--dot", "ddpm-train@bottle").stdout
    (restored.folder / "data" / "bottle.dvc").unlink()
    shutil.rmtree(restored.folder / "data" / "bottle")


def test_changing_distill_runs_only_distill_and_later(restored: Project) -> None:
    restored.set_params({"distill": {"head_steps": SMALL["distill"]["head_steps"] + 1}})
    result = restored.run("dvc", "repro", target("evaluate"))  # export takes as long as all others together
    assert restored.ran(result) == [target("distill"), target("evaluate")]
    status = json.loads(restored.run("dvc", "status", "--json").stdout)
    assert list(status) == [target("export")]


def test_a_failed_gate_stops_distill_and_leaves_its_report(restored: Project) -> None:
    restored.set_params({"validate": {"min_change_inside": 0.9}})
    result = restored.run("dvc", "repro", succeeds=False)
    assert result.returncode != 0
    assert restored.ran(result) == [target("validate")]
    assert "flawsmith: " in result.stderr
    verdict = json.loads((restored.stage("validate") / "verdict.json").read_text())
    assert verdict["passed"] is False
    assert list((restored.stage("validate") / "docs").rglob("index.html"))
    read_image(restored.stage("validate") / "worst.png")
    # nor can a person get past it by hand
    direct = restored.run("flawsmith", "distill", "--set", "tracking.mode=off", succeeds=False)
    assert direct.returncode == 1
    assert "quality gate" in direct.stderr


@pytest.mark.parametrize("stage", ["ddpm-train", "distill"])
def test_killed_training_resumes_to_the_same_losses(restored: Project, stage: str) -> None:
    def checkpoints() -> int:
        return restored.noted(stage).count("checkpoint.pt")

    def run(**environment: str) -> int:
        before = checkpoints()
        result = restored.run("flawsmith", stage, "--set", "tracking.mode=off", succeeds=False, **environment)
        assert result.returncode == (-signal.SIGKILL if environment else 0), result.stderr
        return checkpoints() - before

    losses = (restored.stage(stage) / "losses.csv").read_bytes()
    weights = next(restored.stage(stage).glob("*.safetensors")).read_bytes()

    def remove_outputs() -> None:  # as DVC does before a stage
        shutil.rmtree(restored.stage(stage))

    remove_outputs()
    whole = run()
    remove_outputs()
    assert run(KILL_AT_CHECKPOINT="3") == 2  # of distill the third is the head's first
    assert not restored.stage(stage).exists()
    assert run() == whole - 2  # it went on; it did not start again
    assert (restored.stage(stage) / "losses.csv").read_bytes() == losses
    assert next(restored.stage(stage).glob("*.safetensors")).read_bytes() == weights
