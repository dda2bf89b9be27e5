"""The stage with a toy in the detector's place: labelled and unlabelled surfaces, and who opens `test`."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from torch import nn

from flawsmith.errors import UserError
from flawsmith.evaluation.assess import KEYS
from flawsmith.images import write_png
from flawsmith.layout import Layout
from flawsmith.settings import load_settings
from flawsmith.stages import evaluate
from flawsmith.triplets import TripletFolder


class ToyDetector(nn.Module):
    """Distance from the mean gray."""

    def forward(self, image):  # (B, 3, H, W)
        gray = image.mean(dim=1, keepdim=True)
        maps = (gray - gray.mean(dim=(2, 3), keepdim=True)).abs()
        return maps, maps.flatten(1).amax(dim=1)


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
    }
    made = Layout(load_settings(params_path, overrides), "tiles", tmp_path)
    for index in range(12):
        write_png(tmp_path / f"data/tiles/train/good/{index:03d}.png", pixels(index)[0])
    weights = made.stage("distill") / "detector.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"toy")
    monkeypatch.setattr(evaluate, "load_detector", lambda folder: ToyDetector())
    fitted: list[list[Path]] = []
    monkeypatch.setattr(evaluate, "fit_baseline", lambda where, paths: (fitted.append(paths), ToyDetector())[1])
    return made, fitted


def add_test_set(root):
    for index in range(5):
        write_png(root / f"data/tiles/test/good/{index:03d}.png", pixels(100 + index)[0])
        image, mask = pixels(200 + index, defect=True)
        write_png(root / f"data/tiles/test/dent/{index:03d}.png", image)
        write_png(root / f"data/tiles/ground_truth/dent/{index:03d}_mask.png", mask)


def add_triplets(layout):
    folder = layout.stage("synthesize")
    sources = [path.name for path in layout.split().fit]
    rows = []
    for number, (role, source) in enumerate([("val", sources[0]), ("val", sources[1]), ("fit", sources[2])]):
        normal, _ = pixels(number)
        defect, mask = pixels(number, defect=True)
        name = f"{role}-{number:05d}"
        TripletFolder(folder).write(name, normal.transpose(2, 0, 1), defect.transpose(2, 0, 1), mask)
        rows.append({"triplet_id": name, "role": role, "source": source})
    pd.DataFrame(rows).to_parquet(folder / "manifest.parquet")
    return sources


def test_labelled_surface_leaves_its_files(layout):
    made, fitted = layout
    add_test_set(made.root)
    evaluate.run(made)
    out = made.stage("evaluate")
    content = json.loads((out / "metrics.json").read_text())
    assert content["labelled"] is True
    assert content["image_auroc"] == content["image_auroc_ci"][0] == 1  # the toy's defects are plain
    assert content["n_good"] == content["n_defective"] == 5
    assert {path.name for path in out.iterdir()} == {
        *("metrics.json", "roc.csv", "pr.csv", "curves", "scores.csv", "calibration_scores.csv"),
        *("figures", "gallery", "parity", "report.html", "summary"),
    }
    summary = {path.stem: json.loads(path.read_text()) for path in (out / "summary").iterdir()}
    assert set(summary) == {"detector", "knn-baseline"}
    for name, values in summary.items():  # the same keys in every row of `dvc metrics show`, and metrics.json's values
        source = content if name == "detector" else content["baseline"]
        assert values == {key: pytest.approx(source[key], abs=1e-4) for key in KEYS}
    assert len(list((out / "parity").iterdir())) == 8
    assert fitted == [list(made.split().fit)]
    assert str(made.root) not in (out / "report.html").read_text()


def test_unlabelled_surface_is_scored_on_held_out_triplets_and_says_so(layout):
    made, fitted = layout
    sources = add_triplets(made)
    evaluate.run(made)
    content = json.loads((made.stage("evaluate") / "metrics.json").read_text())
    assert content["labelled"] is False
    assert (content["n_good"], content["n_defective"]) == (2, 2)  # the fit triplet is not among them
    assert "Not measured on real defects" in (made.stage("evaluate") / "report.html").read_text()
    # what the held-out triplets were made from must be new to the baseline too
    assert {path.name for path in fitted[0]} == set(sources) - {sources[0], sources[1]}


def test_unlabelled_surface_without_triplets_names_the_stage_to_run(layout):
    with pytest.raises(UserError, match="synthesize"):
        evaluate.run(layout[0])
    assert not layout[0].stage("evaluate").exists()
