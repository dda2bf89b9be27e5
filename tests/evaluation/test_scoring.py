"""The streaming pass: every image once, nothing kept in memory, nonsense refused."""

import numpy as np
import pytest
import torch
from synthetic import contrast_scorer, synthetic_sample
from torch import nn

from flawsmith.data.dataset import Dataset
from flawsmith.data.images import READING, write_png
from flawsmith.data.tiling import Tiling
from flawsmith.data.triplets import TripletFolder
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.evaluation.samples import SYNTHETIC, Sample, labelled_samples, normal_samples, triplet_samples
from flawsmith.evaluation.scoring import array_files, score_samples, torch_scorer

SAMPLES = [synthetic_sample(index, 32) for index in range(7)]


class ToyDetector(nn.Module):
    """The detector's forward with nothing learnt: distance from the mean gray."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)  # tells train mode from eval mode

    def forward(self, image):  # (B, 3, H, W)
        gray = self.dropout(image.mean(dim=1, keepdim=True))
        maps = (gray - gray.mean(dim=(2, 3), keepdim=True)).abs()
        return maps, maps.flatten(1).amax(dim=1)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_result_does_not_depend_on_the_batch(batch):
    with array_files(2) as (maps, masks):
        (found,) = score_samples([contrast_scorer], SAMPLES, batch, [maps], masks)
        for index, sample in enumerate(SAMPLES):
            image, mask = sample.load()
            expected_map, expected_score = contrast_scorer(image[None])
            np.testing.assert_allclose(maps.read(index), expected_map[0], atol=1e-6)
            np.testing.assert_array_equal(masks.read(index), mask)
            assert found.scores[index] == pytest.approx(expected_score[0], abs=1e-6)
            assert found.peaks[index] == maps.read(index).max()
        assert len(maps) == len(masks) == len(SAMPLES)


def test_each_image_is_loaded_once_for_all_scorers():
    loads = []
    samples = [
        Sample(sample.name, sample.defect, lambda sample=sample: (loads.append(sample.name), sample.load())[1])
        for sample in SAMPLES
    ]
    score_samples([contrast_scorer, contrast_scorer], samples, 2)
    assert loads == [sample.name for sample in SAMPLES]


def test_torch_module_is_scored_in_eval_mode():
    module = ToyDetector().train()
    images = np.stack([sample.load()[0] for sample in SAMPLES[:2]])
    maps, scores = torch_scorer(module, torch.device("cpu"))(images)
    assert maps.shape == (2, 32, 32)
    assert maps.dtype == scores.dtype == np.float32
    gray = images.mean(axis=1)
    np.testing.assert_allclose(maps, np.abs(gray - gray.mean(axis=(1, 2), keepdims=True)), atol=1e-6)


def test_nan_names_the_image():
    def broken(images):
        maps, scores = contrast_scorer(images)
        maps[1, 0, 0] = np.nan
        return maps, scores

    with pytest.raises(FlawsmithError, match=SAMPLES[1].name):
        score_samples([broken], SAMPLES, 4)


def test_wrong_shapes_are_refused():
    def broken(images):
        maps, scores = contrast_scorer(images)
        return maps[:, ::2, ::2], scores

    with pytest.raises(FlawsmithError, match="map of the image's size"):
        score_samples([broken], SAMPLES, 4)


def test_an_array_file_gives_back_what_it_took():
    generator = np.random.default_rng(0)
    arrays = [generator.random(shape) for shape in ((4, 6), (3,), (4, 6), (2, 1, 5), (7, 7))] + [np.ones(3, np.bool_)]
    with array_files(1) as (file,):
        for array in arrays:
            file.append(array)
        for index in (3, 0, 5, 4, 3):
            np.testing.assert_array_equal(file.read(index), arrays[index])
        file.append(arrays[0])  # appending after reading goes to the end
        np.testing.assert_array_equal(file.read(6), arrays[0])
        assert file.read(5).dtype == np.bool_
        assert len(file) == 7


def write_surface(folder, normals=6, defects=("dent", "scratch")):
    """A tiny category with bright squares as defects."""
    generator = np.random.default_rng(0)
    for part, count in (("train/good", normals), ("test/good", 4)):
        for index in range(count):
            write_png(folder / part / f"{index:03d}.png", generator.integers(90, 110, (40, 40, 3), np.uint8))
    for defect in defects:
        for index in range(3):
            pixels = generator.integers(90, 110, (40, 40, 3), np.uint8)
            mask = np.zeros((40, 40), np.bool_)
            mask[8 : 16 + index, 10:18] = True
            pixels[mask] = 200
            write_png(folder / "test" / defect / f"{index:03d}.png", pixels)
            write_png(folder / "ground_truth" / defect / f"{index:03d}_mask.png", mask)
    return Dataset(folder)


def test_labelled_samples_come_at_model_size_with_their_masks(tmp_path):
    surface = write_surface(tmp_path / "tiles")
    samples = labelled_samples(surface.labelled_test(), Tiling((32, 32)), READING)
    assert [sample.name for sample in samples][:2] == ["dent/000.png", "dent/001.png"]
    assert sum(sample.is_defective for sample in samples) == 6
    for sample in samples:
        image, mask = sample.load()
        assert image.shape == (3, 32, 32)
        assert mask.shape == (32, 32)
        assert mask.any() == sample.is_defective
        if sample.is_defective:
            assert image[:, mask].mean() > image[:, ~mask].mean() + 0.2
    normals = normal_samples(surface.normals(), Tiling((32, 32)), READING)
    assert len(normals) == 6
    assert not normals[0].load()[1].any()
    assert normals[1].name == "001.png"


def write_triplets(folder, sources):
    triplets = TripletFolder(folder)
    generator = np.random.default_rng(1)
    for name in sources:
        normal = generator.integers(90, 110, (3, 32, 32), np.uint8)
        mask = np.zeros((32, 32), np.bool_)
        mask[5:12, 5:12] = True
        triplets.write(name, normal, np.where(mask, np.uint8(220), normal), mask)
    return triplets


def test_triplets_become_a_test_set_with_each_normal_once(tmp_path):
    sources = {"val-00000": "a.png", "val-00001": "b.png", "val-00002": "a.png"}
    samples = triplet_samples(write_triplets(tmp_path, sources), sources, (32, 32))
    assert [sample.name for sample in samples if not sample.is_defective] == [
        "normal/val-00000.png",
        "normal/val-00001.png",
    ]
    assert [one.name for one in samples if one.defect == SYNTHETIC] == [f"defect/{name}.png" for name in sources]
    for sample in samples:
        image, mask = sample.load()
        assert mask.any() == sample.is_defective
        assert (image.max() > 0.8) == sample.is_defective


def test_without_any_test_image_the_remedy_is_named(tmp_path):
    with pytest.raises(UserError, match="validation_fraction"):
        triplet_samples(TripletFolder(tmp_path), {}, (32, 32))
