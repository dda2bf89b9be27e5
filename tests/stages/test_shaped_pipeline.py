"""Every stage on a category whose images are wider than high and differ a little in size, from normals to masks."""

import json
from pathlib import Path

import numpy as np
import pytest
from all_stages import run_all
from numpy.typing import NDArray
from scipy import ndimage

from flawsmith.data.images import read_image
from flawsmith.data.masks import read_mask
from flawsmith.data.triplets import TripletFolder
from flawsmith.detector.model import load_detector
from flawsmith.files import read_json
from flawsmith.inference.folder import predict_folder
from flawsmith.inference.options import PredictOptions
from flawsmith.inference.predictor import Predictor
from flawsmith.layout import Layout
from flawsmith.stages.explain import explain

pytestmark = pytest.mark.timeout(1200)

SIZES = ((96, 160), (100, 160), (96, 152), (90, 150))
SHAPE = (64, 96)  # of what models see: the sizes' median aspect, to a multiple of 32


def strip(seed: int) -> NDArray[np.uint8]:
    height, width = SIZES[seed % len(SIZES)]
    gray = np.random.default_rng(seed).normal(120, 20, (height, width))
    return np.repeat(np.clip(ndimage.gaussian_filter(gray, 0.8), 0, 255)[..., None], 3, axis=2).astype(np.uint8)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    upper_right = slice(10, 26), slice(-40, -20)  # off the diagonal
    return run_all(tmp_path_factory.mktemp("shaped"), "strip", strip, upper_right, {})


def test_triplets_have_the_shape_of_the_normals(made: Layout, tmp_path: Path) -> None:
    folder = TripletFolder(made.stage("synthesize"))
    shapes = {folder.read(name)[1].shape for role in ("fit", "val") for name in folder.ids(role)}
    assert shapes == {(3, *SHAPE)}
    assert explain(made, "fit-00000", tmp_path / "why.png")


def test_the_model_takes_that_shape_and_agrees_with_the_detector(made: Layout) -> None:
    assert load_detector(made.stage("distill")).config.shape == SHAPE
    assert Predictor(made.stage("export") / "model.onnx").input_shape == SHAPE
    assert {read_image(path).shape[1:] for path in (made.stage("evaluate") / "parity").glob("*.png")} == {SHAPE}
    proof = read_json(made.stage("export") / "parity.json")
    assert all(batch["decision_flips"] == 0 for batch in proof["batches"].values())


def test_heat_is_where_the_defect_is(made: Layout) -> None:
    metrics = read_json(made.stage("evaluate") / "metrics.json")
    assert metrics["pixel_auroc"] > 0.9
    assert metrics["baseline"]["pixel_auroc"] > 0.9


def test_a_folder_gets_masks_of_the_originals_sizes_at_the_right_places(made: Layout, tmp_path: Path) -> None:
    folder, model = made.surface().folder, made.stage("export") / "model.onnx"
    (answer,) = Predictor(model).predict([read_image(folder / "test/hole/000.png")])
    hot = float(np.quantile(answer.anomaly_map, 0.85))  # so brief a training leaves heat elsewhere too
    predictor = Predictor(model, threshold=-1e6, pixel_threshold=hot)
    predict_folder(predictor, [folder / "test" / "hole"], tmp_path / "out", PredictOptions(masks=True))
    for row in json.loads((tmp_path / "out" / "results.json").read_text())["images"]:
        truth = read_mask(folder / "ground_truth" / "hole" / row["file"].replace(".png", "_mask.png"))
        found = read_mask(tmp_path / "out" / "masks" / row["file"])
        assert (row["height"], row["width"]) == found.shape == truth.shape
        assert read_image(tmp_path / "out" / "overlays" / row["file"]).shape[1:] == truth.shape
        share = found[truth].mean()
        assert share > 0.5
        assert all(share > 2 * found[np.flip(truth, axis)].mean() for axis in (0, 1, (0, 1)))
