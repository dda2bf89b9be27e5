"""A quick look from a bare folder, and from one with a labelled test set, to a marked model with its report."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from small_settings import SMALL, dotted
from typer.testing import CliRunner

from flawsmith.cli import app
from flawsmith.conclusion import conclude
from flawsmith.config import default_settings, load_settings
from flawsmith.data.images import write_png
from flawsmith.errors import UserError
from flawsmith.inference.predictor import Predictor
from flawsmith.layout import Layout
from flawsmith.registry.package import Sources
from flawsmith.registry.registration import _version_tags
from flawsmith.stages import demo_data, quick

WANTED = ("data.", "distill.memory", "evaluate.", "export.")
SMALL_SETTINGS = {key: value for key, value in dotted(SMALL).items() if key.startswith(WANTED)} | {
    "tracking.mode": "off",
    "demo-data.image_size": 128,
    "demo-data.train_good": 14,
    "demo-data.test_good": 4,
    "demo-data.test_per_defect": 1,
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root, settings = tmp_path_factory.mktemp("project"), default_settings(SMALL_SETTINGS)
    demo_data.run(settings, root, "brushed_metal")
    return settings, root


@pytest.fixture(scope="module")
def labelled(demo):
    settings, root = demo
    return quick.run(settings, root, root / "data/brushed_metal")


def weights(model: Path) -> set[str]:
    return {item.name for item in onnx.load(model).graph.initializer}


def test_a_labelled_category_is_judged_on_its_test_set(labelled, demo):
    _, root = demo
    metrics = json.loads((labelled / "metrics.json").read_text())
    assert labelled == root / "artifacts/brushed_metal/quick"
    assert metrics["labelled"]
    assert metrics["n_defective"] > 0
    assert 0 <= metrics["image_auroc"] <= 1


def test_the_model_holds_no_student_and_says_what_it_is(labelled):
    predictor = Predictor(labelled / "model.onnx")
    assert predictor.metadata.quick_look
    assert predictor.metadata.title == "brushed_metal (quick look)"
    assert not [name for name in weights(labelled / "model.onnx") if name.startswith(("student", "head"))]
    proof = json.loads((labelled / "parity.json").read_text())
    assert proof["images"]
    assert all(not one["decision_flips"] for one in proof["batches"].values())
    assert "quick look" in (labelled / "report.html").read_text().lower()
    assert not (labelled / "network.onnx").exists()


def test_a_bare_folder_without_labels_gives_threshold_and_report_without_a_figure_of_misses(demo, labelled, tmp_path):
    settings, root = demo
    parts = tmp_path / "good parts"
    shutil.copytree(root / "data/brushed_metal/train/good", parts)
    out = quick.run(settings, tmp_path, parts, tmp_path / "first")
    metrics, page = json.loads((out / "metrics.json").read_text()), (out / "report.html").read_text()
    assert metrics["n_defective"] == 0
    assert metrics["image_auroc"] is None
    assert metrics["test_detection_rate"] is None
    assert metrics["threshold"] == json.loads((labelled / "metrics.json").read_text())["threshold"]  # the same normals
    assert "nothing is known about what this detector misses" in page
    assert "PatchCore" not in page
    assert "nan" not in page
    assert Predictor(out / "model.onnx").metadata.category == "good parts"
    assert not (tmp_path / "artifacts").exists()
    before = sorted(path.name for path in out.iterdir())
    assert quick.run(settings, tmp_path, parts, out) == out  # an earlier one is replaced
    assert sorted(path.name for path in out.iterdir()) == before


def test_a_quick_look_cannot_be_registered(labelled, demo, tmp_path, params_path):
    layout = Layout(load_settings(params_path), "brushed_metal", tmp_path)
    nowhere = tmp_path / "nowhere.json"
    nowhere.write_text("{}")
    sources = Sources(labelled / "model.onnx", nowhere, nowhere, tmp_path, nowhere, nowhere)
    with pytest.raises(UserError, match="quick look"):
        _version_tags(layout, sources, None, "")


@pytest.mark.parametrize("out", ["taken", "data/brushed_metal/first", "data", "a-file"])
def test_nothing_but_an_earlier_quick_look_is_replaced_and_nothing_lands_among_the_images(demo, tmp_path, out):
    settings, root = demo
    (root / "taken").mkdir(exist_ok=True)
    (root / "taken/model.onnx").write_text("somebody's")
    (root / "a-file").write_text("somebody's")
    before = sorted(root.rglob("*"))
    with pytest.raises(UserError, match="--out"):
        quick.run(settings, root, root / "data/brushed_metal", root / out)
    assert sorted(root.rglob("*")) == before


def test_without_params_yaml_the_defaults_hold_and_too_few_images_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in range(4):
        write_png(tmp_path / f"few/{seed}.png", np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8))
    refused = CliRunner().invoke(app, ["quick", "few"]).exception
    assert isinstance(refused, UserError)
    assert "few holds 4 image" in str(refused)
    assert [path.name for path in tmp_path.iterdir()] == ["few"]


def test_a_run_that_fails_leaves_nothing(demo, tmp_path, monkeypatch):
    settings, root = demo

    def fail(*_):
        raise UserError("no")

    monkeypatch.setattr(quick, "write_report", fail)
    with pytest.raises(UserError):
        quick.run(settings, root, root / "data/brushed_metal", tmp_path / "first")
    assert not list(tmp_path.iterdir())


def test_the_end_of_a_full_run_says_what_training_added_if_both_judged_the_same_images(labelled, demo):
    settings, root = demo
    layout = Layout(settings, "brushed_metal", root)
    first = json.loads((labelled / "metrics.json").read_text())
    for changed, told in (({"image_auroc": 1.0}, True), ({"n_good": first["n_good"] + 1}, False)):
        layout.stage("evaluate").mkdir(exist_ok=True)
        (layout.stage("evaluate") / "metrics.json").write_text(json.dumps(first | changed))
        lines = [line for line in conclude(layout) if "quick look" in line]
        assert bool(lines) is told
        assert not told or "to 1.000" in lines[0]
