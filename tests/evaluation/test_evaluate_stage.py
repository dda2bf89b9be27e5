"""The stage with a toy in the detector's place: labelled and unlabelled surfaces, and who opens `test`."""

import functools
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
from torch import nn

from flawsmith.config import load_settings
from flawsmith.data.images import read_image, write_png
from flawsmith.data.triplets import TripletFolder
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.evaluation import report
from flawsmith.evaluation.metrics import KEYS
from flawsmith.export.onnx import export_network, write_model
from flawsmith.files import write_json
from flawsmith.inference.metadata import ModelMetadata
from flawsmith.inference.predictor import Predictor
from flawsmith.layout import Layout
from flawsmith.stages import evaluate
from flawsmith.tracking import StageRun


class ToyDetector(nn.Module):
    """Distance of the gray value from that of a normal surface: the same bits in torch and onnxruntime."""

    def forward(self, image):  # (B, 3, H, W)
        maps = (image[:, :1] - 0.4).abs()
        return maps, maps.flatten(1).amax(dim=1)


@functools.cache
def exported_toy(shape, opset):
    with tempfile.TemporaryDirectory() as folder:
        export_network(ToyDetector().eval(), shape, opset, Path(folder) / "toy.onnx")
        return (Path(folder) / "toy.onnx").read_bytes()


def export_once(detector, shape, opset, path):
    """The real export costs seconds, and the toy is always the same."""
    assert isinstance(detector, ToyDetector)
    path.write_bytes(exported_toy(shape, opset))


def pixels(seed, defect=False):
    generator = np.random.default_rng(seed)
    gray = generator.integers(90, 110, (32, 32), np.uint8)
    mask = np.zeros((32, 32), np.bool_)
    if defect:
        mask[6:14, 6:20] = True
        gray[mask] = 180
    return np.repeat(gray[..., None], 3, axis=2), mask


@pytest.fixture
def layout(tmp_path, params_path, monkeypatch):
    overrides = {
        "categories": ["tiles"],
        "data.image_size": 64,
        "ddpm-train.crop": 32,
        "synthesize.windows": [32, 48],
        "evaluate.bootstrap": 20,
        "evaluate.parity_images": 8,
        "evaluate.gallery": 4,
        "evaluate.detection_sources": ["own"],
        "evaluate.detection_defects": 10,
        "evaluate.pixels_per_mm": 8.0,
    }
    made = Layout(load_settings(params_path, overrides), "tiles", tmp_path)
    for index in range(12):
        write_png(tmp_path / f"data/tiles/train/good/{index:03d}.png", pixels(index)[0])
    weights = made.stage("distill") / "detector.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"toy")
    (weights.parent / "config.json").write_text('{"precision": "float32"}')
    warned = {"name": "ddpm_ready", "passed": False}
    write_json(made.stage("validate") / "verdict.json", {"expectations": [warned], "ddpm": "Not ready: 31 %."})
    monkeypatch.setattr(evaluate, "load_detector", lambda folder: ToyDetector().eval())
    monkeypatch.setattr(evaluate, "export_network", export_once)
    monkeypatch.setattr(report, "figure_png", lambda figure: b"png")  # test_outputs draws them
    fitted: list[list[Path]] = []
    monkeypatch.setattr(evaluate, "fit_baseline", lambda where, paths, device: (fitted.append(paths), ToyDetector())[1])
    return made, fitted


def add_test_set(root):
    for index in range(5):
        write_png(root / f"data/tiles/test/good/{index:03d}.png", pixels(100 + index)[0])
        image, mask = pixels(200 + index, defect=True)
        write_png(root / f"data/tiles/test/dent/{index:03d}.png", image)
        write_png(root / f"data/tiles/ground_truth/dent/{index:03d}_mask.png", mask)


def add_triplets(layout, shades=0):
    folder = layout.stage("synthesize")
    sources = [path.name for path in layout.split().fit]
    rows = []
    wanted = [("val", sources[0]), ("val", sources[1]), ("fit", sources[2]), *[("val", sources[3])] * shades]
    for number, (role, source) in enumerate(wanted):
        normal, _ = pixels(number)
        defect, mask = pixels(number, defect=True)
        if number >= 3:
            defect = normal  # the toy sees nothing in a shade
        name = f"{role}-{number:05d}"
        TripletFolder(folder).write(name, normal.transpose(2, 0, 1), defect.transpose(2, 0, 1), mask)
        rows.append({"triplet_id": name, "role": role, "source": source, "shade_change": 0.1 if number >= 3 else None})
    pd.DataFrame(rows).to_parquet(folder / "manifest.parquet")
    return sources


def test_labelled_surface_leaves_its_files(layout):
    made, fitted = layout
    add_test_set(made.root)
    evaluate.run(made)
    out = made.stage("evaluate")
    content = metrics_of(made)
    assert content["labelled"] is True
    assert content["image_auroc"] == content["image_auroc_ci"][0] == 1  # the toy's defects are plain
    assert content["n_good"] == content["n_defective"] == 5
    found = content["detection"]["own"]
    assert (found["unit"], found["images"]) == ("mm", len(made.split().calibration))
    assert 0 < found["found"] < found["defects"] <= 20
    assert found["real"]["defects"] == found["real"]["found"] == 5
    assert content["typical_score"] == pd.read_csv(out / "calibration_scores.csv")["score"].median()
    assert {path.name for path in out.iterdir()} == {
        *("metrics.json", "draws.npz", "roc.csv", "pr.csv", "curves", "scores.csv", "calibration_scores.csv"),
        *("figures", "gallery", "parity", "report.html", "summary", "network.onnx"),
    }
    summary = {path.stem: json.loads(path.read_text()) for path in (out / "summary").iterdir()}
    assert set(summary) == {"detector", "patchcore"}
    for name, values in summary.items():  # the same keys in every row of `dvc metrics show`, and metrics.json's values
        source = content if name == "detector" else content["baseline"]
        assert values == {key: pytest.approx(source[key], abs=1e-4) for key in KEYS}
    assert len(list((out / "parity").iterdir())) == 8
    assert fitted == [list(made.split().fit)]
    page = (out / "report.html").read_text()
    assert str(made.root) not in page
    assert "What it can find" in page
    assert "passed the quality gate with warnings (ddpm_ready). Not ready: 31 %." in page


def metrics_of(layout, stage="evaluate"):
    return json.loads((layout.stage(stage) / "metrics.json").read_text())


def set_settings(layout, **evaluate_settings):
    settings = replace(layout.settings, evaluate=replace(layout.settings.evaluate, **evaluate_settings))
    return replace(layout, settings=settings)


def test_a_half_is_judged_alone_and_every_output_says_so(layout):
    made, _ = layout
    add_test_set(made.root)
    seen = {}
    for part, size in (("research", 3), ("report", 2), ("all", 5)):
        evaluate.run(set_settings(made, part=part))
        out = made.stage("evaluate")
        content = metrics_of(made)
        assert (content["part"], content["n_good"], content["n_defective"]) == (part, size, size)
        for text in (content["scored_on"], (out / "report.html").read_text(), (out / "roc.csv").read_text()):
            assert (f"{part} half" in text) == (part != "all")
        seen[part] = set(pd.read_csv(out / "scores.csv")["file"])
    assert not seen["research"] & seen["report"]
    assert seen["research"] | seen["report"] == seen["all"]


def test_a_half_may_lack_a_type_but_no_class(layout):
    made, _ = layout
    add_test_set(made.root)
    image, mask = pixels(300, defect=True)
    write_png(made.root / "data/tiles/test/scratch/000.png", image)
    write_png(made.root / "data/tiles/ground_truth/scratch/000_mask.png", mask)
    for part, types in (("research", {"dent", "scratch"}), ("report", {"dent"})):
        evaluate.run(set_settings(made, part=part))
        assert set(metrics_of(made)["by_defect"]) == types
    for index in range(1, 5):
        (made.root / f"data/tiles/test/dent/{index:03d}.png").unlink()
    with pytest.raises(UserError, match=r"report half .* lacks .*evaluate\.part"):
        evaluate.run(set_settings(made, part="report"))


def test_the_baseline_alone_is_what_it_is_beside_the_detector(layout):
    made, fitted = layout
    add_test_set(made.root)
    evaluate.run(made)
    evaluate.run_baseline(made)  # the toy stands in for both models, so even detector and baseline must agree
    assert fitted[0] == fitted[1]
    beside, alone = made.stage("evaluate"), made.stage("patchcore")
    assert {path.name for path in alone.iterdir()} == {"metrics.json", "draws.npz", "scores.csv"}
    content, both = metrics_of(made, "patchcore"), metrics_of(made)
    ours_alone = ("baseline", "over_baseline", "training_precision", "detection")
    assert content == {key: value for key, value in both.items() if key not in ours_alone}
    assert content.items() >= both["baseline"].items()
    with np.load(alone / "draws.npz", allow_pickle=False) as one, np.load(beside / "draws.npz") as other:
        assert set(one) == set(other) == set(KEYS)
        for key in KEYS:  # the same resamples: draws may be subtracted
            assert one[key].shape == (made.settings.evaluate.bootstrap,)
            np.testing.assert_array_equal(one[key], other[key])
    scores = [pd.read_csv(folder / "scores.csv")[["file", "defect", "score", "verdict"]] for folder in (alone, beside)]
    assert scores[0].equals(scores[1])
    shutil.rmtree(made.root / "artifacts")  # no model is needed
    evaluate.run_baseline(made)
    assert metrics_of(made, "patchcore") == content


def test_unlabelled_surface_is_scored_on_held_out_triplets_and_says_so(layout):
    made, fitted = layout
    sources = add_triplets(made, shades=3)
    evaluate.run(made)
    content, page = metrics_of(made), (made.stage("evaluate") / "report.html").read_text()
    assert (content["labelled"], content["part"]) == (False, "all")
    assert (content["n_good"], content["n_defective"]) == (2, 2)  # neither the fit triplet nor shades are among them
    assert content["test_detection_rate"] == content["image_auroc"] == 1
    assert (content["shades"]["n"], content["shades"]["flagged_rate"]) == (3, 0)
    assert "Not measured on real defects" in page
    assert "real" not in content["detection"]["own"]
    assert "3 held-out shades are left out of every figure" in page
    # what the held-out triplets were made from, shades too, must be new to the baseline
    assert {path.name for path in fitted[0]} == set(sources) - {sources[0], sources[1], sources[3]}
    add_test_set(made.root)
    evaluate.run(made)
    assert "shades" not in metrics_of(made)


def test_held_out_shades_alone_can_stand_in_for_nothing(layout):
    made, _ = layout
    add_triplets(made, shades=1)
    for number in (0, 1):
        (made.stage("synthesize") / "mask" / f"val-{number:05d}.png").unlink()
    manifest = made.stage("synthesize") / "manifest.parquet"
    rows = pd.read_parquet(manifest)
    rows[rows["shade_change"].notna()].to_parquet(manifest)
    with pytest.raises(UserError, match=r"but shades.*lower illumination in synthesize\.mixture"):
        evaluate.run(made)


def test_unlabelled_surface_without_triplets_names_the_stage_to_run(layout):
    with pytest.raises(UserError, match="synthesize"):
        evaluate.run(layout[0])
    assert not layout[0].stage("evaluate").exists()


def test_the_detector_is_scored_by_the_exported_network_and_gives_the_scores_the_product_gives(
    layout, tmp_path, monkeypatch, caplog
):
    """The stage's scores and threshold, against the same detector exported with that threshold and `Predictor`."""
    made, _ = layout
    add_test_set(made.root)
    monkeypatch.setattr(evaluate, "export_network", export_network)
    tags = {}
    monkeypatch.setattr(StageRun, "set_tag", lambda run, name, value: tags.update({name: value}))
    with caplog.at_level("INFO"):
        evaluate.run(made)
    assert tags == {"provider": "cpu"}
    assert "(computed on cpu)" in caplog.text
    out = made.stage("evaluate")
    content = metrics_of(made)
    metadata = ModelMetadata(
        category="tiles",
        threshold=content["threshold"],
        pixel_threshold=content["pixel_threshold"],
        false_alarm_rate=content["false_alarm_rate"],
        map_low=0.0,
        map_high=1.0,
        detector_digest="",
        teacher="none",
        flawsmith_version="0",
    )
    write_model(onnx.load(out / "network.onnx"), metadata, tmp_path / "model.onnx")
    predictor = Predictor(tmp_path / "model.onnx")
    rows = pd.read_csv(out / "scores.csv")
    answers = [predictor.predict([read_image(made.root / "data/tiles/test" / name)])[0] for name in rows["file"]]
    np.testing.assert_array_equal(rows["score"].astype(np.float32), np.float32([item.score for item in answers]))
    assert list(rows["verdict"] == "defective") == [item.is_defective for item in answers]
    first = (out / "scores.csv").read_bytes()
    evaluate.run(made)
    assert (out / "scores.csv").read_bytes() == first


def test_a_detector_that_answers_nan_leaves_nothing(layout, monkeypatch):
    class Broken(ToyDetector):
        def forward(self, image):
            maps, scores = super().forward(image)
            return maps, scores / (scores - scores)

    made, _ = layout
    add_test_set(made.root)
    monkeypatch.setattr(evaluate, "load_detector", lambda folder: Broken().eval())
    monkeypatch.setattr(evaluate, "export_network", export_network)
    with pytest.raises(FlawsmithError, match="NaN"):
        evaluate.run(made)
    assert not made.stage("evaluate").exists()
