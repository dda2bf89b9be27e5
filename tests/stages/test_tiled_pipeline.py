"""Every stage on images of several shapes cut into tiles: fabric with holes, from normals to a proven model."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from all_stages import run_all
from numpy.typing import NDArray
from scipy import ndimage

from flawsmith.data.dataset import plan_tiles
from flawsmith.data.images import read_image
from flawsmith.data.tiling import Tiling
from flawsmith.data.triplets import TripletFolder, read_manifest
from flawsmith.files import digest_path, read_json
from flawsmith.inference.folder import predict_folder
from flawsmith.inference.options import PredictOptions
from flawsmith.inference.predictor import Predictor
from flawsmith.layout import Layout
from flawsmith.stages import promote, synthesize
from flawsmith.stages.explain import explain

pytestmark = pytest.mark.timeout(1200)

SHAPES = ((192, 320), (320, 192), (100, 256), (48, 200))
TILED = {
    "data.scale": 0.8,
    "data.tile_overlap": 16,
    "data.max_tiles": 30,
    "synthesize.triplets": 10,
    "promote.bootstrap": 100,
}


def weave(seed: int) -> NDArray[np.uint8]:
    height, width = SHAPES[seed % len(SHAPES)]
    rows, columns = np.mgrid[:height, :width]
    generator = np.random.default_rng(seed)
    gray = 120 + 25 * np.sin(rows / 2.5) * np.sin(columns / 2.5) + generator.normal(0, 5, (height, width))
    return np.repeat(np.clip(ndimage.gaussian_filter(gray, 0.6), 0, 255)[..., None], 3, axis=2).astype(np.uint8)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return run_all(tmp_path_factory.mktemp("tiled"), "weave", weave, (slice(-30, -16), slice(-44, -24)), TILED)


def test_triplets_are_tiles_and_the_roles_share_no_image(made: Layout) -> None:
    folder = TripletFolder(made.stage("synthesize"))
    rows = read_manifest(folder.folder / "manifest.parquet").to_pylist()
    tiles = {(tile.path.name, tile.place) for tile in plan_tiles(made.split().fit, made.settings.data)}
    sources: dict[str, set[str]] = {"fit": set(), "val": set()}
    for row in rows:
        sources[row["role"]].add(row["source"])
        assert (row["source"], (row["source_top"], row["source_left"])) in tiles
        assert folder.read(row["triplet_id"])[0].shape == (3, 64, 64)
    assert sources["fit"]
    assert sources["val"]
    assert not sources["fit"] & sources["val"]


def test_a_triplet_of_a_tile_is_explained_bit_for_bit(made: Layout, tmp_path: Path) -> None:
    assert explain(made, "fit-00001", tmp_path / "why.png")


def test_how_much_each_map_counts_is_told(made: Layout) -> None:
    counts = read_json(made.stage("distill") / "config.json")["counts"]
    assert set(counts) == {"memory_fine", "memory_coarse", "student", "head"}
    assert counts["memory_fine"] + counts["memory_coarse"] == pytest.approx(1, abs=1e-3)
    assert all(0 <= count <= 1 for count in counts.values())


def test_the_stage_scores_what_the_exported_model_answers(made: Layout) -> None:
    """On test images of every shape; a batch of other tiles may move the last digits. Metrics are of whole images."""
    predictor = Predictor(made.stage("export") / "model.onnx")
    assert predictor.tiling == Tiling((64, 64), 0.8, 16)
    metrics = json.loads((made.stage("evaluate") / "metrics.json").read_text())
    assert (metrics["n_good"], metrics["n_defective"], metrics["labelled"]) == (4, 4, True)
    assert 0 <= metrics["aupro"] <= 1
    assert 0 <= metrics["baseline"]["aupro"] <= 1
    with (made.stage("evaluate") / "scores.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        image = read_image(made.surface().folder / "test" / row["file"])
        (answer,) = predictor.predict([image])
        assert answer.score == pytest.approx(float(row["score"]), abs=1e-4)
        assert answer.anomaly_map.shape == predictor.tiling.working_shape(*image.shape[1:])
    calibration = made.stage("evaluate") / "calibration_scores.csv"
    with calibration.open() as stream:
        assert len(list(csv.DictReader(stream))) == len(made.split().calibration)


def test_parity_is_proven_on_tiles(made: Layout) -> None:
    images = sorted((made.stage("evaluate") / "parity").glob("*.png"))
    assert {read_image(path).shape for path in images} == {(3, 64, 64)}
    assert any((read_image(path) > 0.85).mean() > 0.02 for path in images if "hole" in path.name)
    proof = json.loads((made.stage("export") / "parity.json").read_text())
    assert all(batch["decision_flips"] == 0 for batch in proof["batches"].values())


def test_a_folder_is_scored_at_the_places_of_the_originals(made: Layout, tmp_path: Path) -> None:
    predictor = Predictor(made.stage("export") / "model.onnx", pixel_threshold=-1e6)
    predict_folder(predictor, [made.surface().folder / "test"], tmp_path / "out", PredictOptions())
    for row in json.loads((tmp_path / "out" / "results.json").read_text())["images"]:
        shape = read_image(made.surface().folder / "test" / row["file"]).shape
        assert (row["height"], row["width"]) == shape[1:]
        assert 0 <= row["peak_x"] < shape[2]
        assert 0 <= row["peak_y"] < shape[1]
        assert read_image(tmp_path / "out" / "overlays" / row["file"]).shape[2] >= shape[2]


def test_promotion_compares_models_of_different_scales_on_the_same_images(
    made: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(layout: Layout, compare: Any, **_: Any) -> Any:
        challenger = Predictor(layout.stage("export") / "model.onnx")
        champion = Predictor(layout.stage("export") / "model.onnx")
        champion.tiling = Tiling((64, 64))  # the same network on whole images
        return compare(challenger, champion), compare(challenger, challenger)

    monkeypatch.setattr(promote, "promote", judge)
    (found, labelled), (same, _) = promote.run(made)
    assert labelled
    metrics = json.loads((made.stage("evaluate") / "metrics.json").read_text())
    assert found.challenger.values["aupro"].value == pytest.approx(metrics["aupro"], abs=0.02)
    assert found.challenger.values["image_auroc"].value == pytest.approx(metrics["image_auroc"])
    assert set(same.differences.values()) == {(0, 0, 0)}
    assert found.champion != found.challenger


def test_the_triplets_are_the_same_bytes_again(made: Layout) -> None:
    before = digest_path(made.stage("synthesize"))
    synthesize.run(made)
    assert digest_path(made.stage("synthesize")) == before
