"""The demo data: deterministic, varied, honest masks, and a layout that the reader of users' folders reads."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

from flawsmith.data.dataset import GOOD, Dataset
from flawsmith.data.images import read_image, to_uint8
from flawsmith.data.masks import read_mask
from flawsmith.demo import render
from flawsmith.demo.config import DemoDataSettings
from flawsmith.demo.render import KINDS, largest_part, render_defective, render_normal, visible_mask, write_category
from flawsmith.errors import UserError

SIZE = 128
SMALL = DemoDataSettings(seed=3, image_size=SIZE, train_good=4, test_good=1, test_per_defect=1)
EVERY_DEFECT = [(surface, defect) for surface, kind in KINDS.items() for defect in kind.defects]


@pytest.fixture(scope="module", params=sorted(KINDS))
def category(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("demo") / request.param
    write_category(folder, request.param, SMALL)
    return Dataset(folder)


def test_the_layout_is_read_like_a_users_folder(category: Dataset) -> None:
    assert len(category.normals()) == SMALL.train_good
    labelled = category.labelled_test()
    assert {item.defect for item in labelled} == {GOOD, *KINDS[category.category].defects}
    for item in labelled:
        assert read_image(item.path).shape == (3, SIZE, SIZE)
        if item.mask_path is not None:
            assert read_mask(item.mask_path).shape == (SIZE, SIZE)
            assert read_mask(item.mask_path).any()


def test_another_seed_gives_other_images(category: Dataset, tmp_path: Path) -> None:
    write_category(tmp_path / "other", category.category, replace(SMALL, seed=4))
    for path in category.folder.rglob("*.png"):
        assert path.read_bytes() != (tmp_path / "other" / path.relative_to(category.folder)).read_bytes()


def test_the_same_seed_gives_the_same_bytes_however_many_images_are_asked_for(
    category: Dataset, tmp_path: Path
) -> None:
    write_category(tmp_path / "more", category.category, replace(SMALL, train_good=5, test_per_defect=2))
    for path in category.folder.rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "more" / path.relative_to(category.folder)).read_bytes()


@pytest.mark.parametrize("surface", KINDS)
def test_normal_images_are_of_one_product_but_no_two_alike(surface: str) -> None:
    images = np.stack([render_normal(surface, SIZE, np.random.default_rng(seed)) for seed in range(4)])
    assert images.dtype == np.float32
    assert 0 <= images.min() < images.max() <= 1
    assert (images.max(axis=(1, 2, 3)) < 1).all(), "an overexposed picture has lost its texture"
    means = images.mean(axis=(2, 3))  # (N, 3)
    assert np.ptp(means, axis=0).max() < 0.15, "tones too far apart for one product"
    for first in range(len(images)):
        for second in range(first):
            difference = np.abs(images[first] - images[second]).mean()
            assert difference > 0.01
            assert np.ptp(means[[first, second]], axis=0).max() > 1e-3


@pytest.mark.parametrize(("surface", "defect"), EVERY_DEFECT)
@pytest.mark.parametrize("seed", range(2))
def test_a_mask_holds_what_changed_and_nothing_else(surface: str, defect: str, seed: int) -> None:
    twin = render_defective(surface, defect, SIZE, np.random.default_rng(seed))
    change = np.abs(twin.defective - twin.clean).max(axis=0)  # (H, W)
    assert twin.mask.sum() < 0.3 * twin.mask.size
    assert largest_part(twin.mask) >= render.MIN_AREA
    inside, outside = change[twin.mask], change[~twin.mask]
    assert (inside > render.VISIBLE / 2).mean() > 0.6
    assert inside.mean() > 5 * outside.mean()
    assert inside.max() > render.FAINTEST - 0.01
    assert (outside > 1.5 * render.VISIBLE).mean() < 2e-3
    assert (outside == 0).mean() > 0.5, "a defect is local"


@pytest.mark.parametrize(("surface", "defect"), EVERY_DEFECT)
def test_defects_differ_in_place_and_strength(surface: str, defect: str) -> None:
    twins = [render_defective(surface, defect, SIZE, np.random.default_rng(seed)) for seed in range(2)]
    places = {tuple(np.argwhere(twin.mask).mean(axis=0).round()) for twin in twins}
    strengths = {float(np.abs(twin.defective - twin.clean).max().round(4)) for twin in twins}
    assert len(places) == len(strengths) == len(twins)


@pytest.mark.parametrize("surface", KINDS)
def test_a_clean_twin_is_a_normal_image(surface: str) -> None:
    defect = next(iter(KINDS[surface].defects))
    twin = render_defective(surface, defect, SIZE, np.random.default_rng(5))
    assert np.array_equal(to_uint8(twin.clean), to_uint8(render_normal(surface, SIZE, np.random.default_rng(5))))


def test_faint_and_clear_defects_are_both_there() -> None:
    contrasts = []
    for surface, defect in EVERY_DEFECT:
        for seed in range(2):
            twin = render_defective(surface, defect, SIZE, np.random.default_rng(50 + seed))
            contrasts.append(float(np.abs(twin.defective - twin.clean).max(axis=0)[twin.mask].mean()))
    assert min(contrasts) < 0.06
    assert max(contrasts) > 0.12


def test_an_unseen_change_gives_an_empty_mask_and_a_hole_in_a_seen_one_is_filled() -> None:
    assert not visible_mask(np.full((20, 20), render.VISIBLE / 3, np.float32)).any()
    ring = np.zeros((20, 20), np.float32)
    ring[5:15, 5:15] = 1
    ring[8:12, 8:12] = 0
    mask = visible_mask(ring)
    assert mask[5:15, 5:15].all()
    assert not mask[:3].any()


RENDER = """
import sys
import numpy as np
from flawsmith.demo.render import KINDS, render_defective, render_normal
images = []
for surface, kind in KINDS.items():
    images.append(render_normal(surface, 256, np.random.default_rng(1)))
    images += [render_defective(surface, name, 256, np.random.default_rng(2)).defective for name in kind.defects]
np.save(sys.argv[1], np.stack(images))
"""


def test_every_cpu_renders_the_same(tmp_path: Path) -> None:
    def rendered(name: str, **environment: str) -> np.ndarray:
        path = tmp_path / f"{name}.npy"
        subprocess.run([sys.executable, "-c", RENDER, path], env=os.environ | environment, check=True)
        return np.load(path)

    without = " ".join(name for name in __cpu_dispatch__ if __cpu_features__.get(name))
    if not without:
        pytest.skip("NumPy has one kind of kernels for this CPU")
    ours, theirs = rendered("ours"), rendered("theirs", NPY_DISABLE_CPU_FEATURES=without)
    assert np.array_equal(to_uint8_stack(ours), to_uint8_stack(theirs))
    # millions of pixels are rendered and a few are looked at here: what differs before they are rounded must be far
    # rarer than a pixel in 65,000 whose rounding the last bit of a float32 could decide
    assert (ours != theirs).mean() < 1e-4


def to_uint8_stack(images: np.ndarray) -> np.ndarray:
    return np.stack([to_uint8(image) for image in images])


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    generator = np.random.default_rng(0)
    with pytest.raises(UserError, match="brushed_metal, woven_fabric"):
        render_normal("granite", SIZE, generator)
    with pytest.raises(UserError, match="scratch"):
        render_defective("brushed_metal", "rust", SIZE, generator)
