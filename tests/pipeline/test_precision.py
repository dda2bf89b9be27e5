"""Paths that a machine may not take by itself: the pipeline in bfloat16, and training in several processes."""

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import CATEGORY, Project  # type: ignore[import-not-found]
from mlflow.tracking import MlflowClient

from flawsmith.inference.predictor import Predictor

pytestmark = pytest.mark.timeout(1200)
COARSE = {"FLAWSMITH_PRECISION": "bfloat16"}
# what docs/operations.md says for several GPUs; on the CPU (gloo), since the tests' environment says so
TOGETHER = ("accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--no_python")


EVERY_STAGE = """
from flawsmith.cli import app
for stage in ("ddpm-train", "synthesize", "validate", "distill", "evaluate", "export"):
    app([stage], prog_name="flawsmith", standalone_mode=False)
"""


@pytest.fixture(scope="module")
def coarse(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which every stage has run in bfloat16, emulated where the CPU has none; one process is quick."""
    made = Project.create(tmp_path_factory.mktemp("bfloat16") / "project")
    shutil.copytree(project.folder / "data", made.folder / "data", dirs_exist_ok=True)
    made.run(sys.executable, "-W", "ignore", "-c", EVERY_STAGE, **COARSE)
    return made


def runs_of(project: Project, stage: str) -> list[Any]:
    client = MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string=f"name LIKE '%/{CATEGORY}'")
    return list(client.search_runs([experiment.experiment_id], f"tags.`flawsmith.stage` = '{stage}'"))


def losses_of(folder: Path) -> Any:
    with (folder / "losses.csv").open() as stream:
        return np.array([float(row["loss"]) for row in csv.DictReader(stream)])


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_every_stage_runs_in_bf16_and_says_so(coarse: Project, project: Project) -> None:
    for name, expected in ((coarse, "bfloat16"), (project, "float32")):
        assert read(name.stage("ddpm-train") / "readiness.json")["precision"] == expected
        assert read(name.stage("distill") / "config.json")["precision"] == expected
        assert read(name.stage("evaluate") / "metrics.json")["training_precision"] == expected
        assert Predictor(name.stage("export") / "model.onnx").metadata.training_precision == expected
        for stage in ("ddpm-train", "synthesize", "distill"):
            # other tests may have run a stage of `project` again
            assert {run.data.params["compute.precision"] for run in runs_of(name, stage)} == {expected}
    # it was another computation, and the same training
    ours, theirs = (losses_of(name.stage("ddpm-train")) for name in (coarse, project))
    assert not np.array_equal(ours, theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0.1)
    assert read(coarse.stage("export") / "parity.json")["batches"]["1"]["decision_flips"] == 0


@pytest.mark.slow
def test_a_triplet_made_in_bf16_is_explained_wherever_it_is_asked_for(coarse: Project, tmp_path: Path) -> None:
    told = coarse.run("flawsmith", "explain", "fit-00000", "--out", str(tmp_path / "why.png"))
    assert "identical" in told.stdout


def test_two_processes_train_on_the_same_crops_as_one(project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    shutil.copytree(project.folder, folder)
    (folder / "mlflow.db").unlink()
    two = Project(folder)
    shutil.rmtree(two.stage("ddpm-train"))
    two.run(*TOGETHER, "flawsmith", "ddpm-train")
    (run,) = runs_of(two, "ddpm-train")
    assert run.info.status == "FINISHED"
    np.testing.assert_allclose(losses_of(two.stage("ddpm-train")), losses_of(project.stage("ddpm-train")), rtol=1e-3)
    assert not list((folder / "artifacts" / CATEGORY).rglob("*.tmp"))


@pytest.mark.slow
def test_what_processes_cannot_share_is_refused(project: Project) -> None:
    batch = yaml.safe_load((project.folder / "params.yaml").read_text())["ddpm-train"]["batch"]
    odd = project.run(*TOGETHER, "flawsmith", "ddpm-train", "--set", f"ddpm-train.batch={batch + 1}", succeeds=False)
    assert odd.returncode != 0
    assert f"ddpm-train.batch is {batch + 1}, which 2 processes cannot share evenly" in odd.stderr
    alone = project.run(*TOGETHER, "flawsmith", "distill", succeeds=False)
    assert alone.returncode != 0
    assert "ddpm-train alone" in alone.stderr
