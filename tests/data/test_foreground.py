"""Objects on plain backgrounds are found, textures are left whole: judged on rendered shapes, whose truth is known."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from flawsmith.data.foreground import Foreground
from flawsmith.data.images import Mask
from flawsmith.errors import UserError

SIDE = 128
ROWS, COLUMNS = np.mgrid[0:SIDE, 0:SIDE].astype(np.float64) / (SIDE - 1)
Shape = Callable[[float, float], Mask]


def disc(dy: float, dx: float, radius: float = 0.3) -> Mask:
    return (ROWS - 0.5 - dy) ** 2 + (COLUMNS - 0.5 - dx) ** 2 < radius**2


def bar(dy: float, dx: float) -> Mask:
    """A screw: slim, slanted, 5 % of the image."""
    along, across = (ROWS - 0.5 - dy) + (COLUMNS - 0.5 - dx), (ROWS - 0.5 - dy) - (COLUMNS - 0.5 - dx)
    return (np.abs(along) < 0.5) & (np.abs(across) < 0.05)


def ring(dy: float, dx: float) -> Mask:
    """A nut: the hole shows the background, but belongs to the part."""
    return disc(dy, dx, 0.35) & ~disc(dy, dx, 0.12)


def strip(dy: float, dx: float) -> Mask:
    """A zipper: runs through the image from top to bottom."""
    return np.abs(COLUMNS - 0.5 - dx) < 0.2


def objects(shape: Shape, background: float, part: float, seed: int = 0, count: int = 8) -> tuple[NDArray, list[Mask]]:
    """Noisy parts with a grain of their own on a background with a gradient of 0.1 and a light that drifts."""
    generator = np.random.default_rng(seed)
    images, masks = [], []
    for _ in range(count):
        mask = shape(*generator.uniform(-0.08, 0.08, 2))
        light = generator.uniform(-0.03, 0.03) + 0.1 * (generator.uniform() * ROWS - generator.uniform() * COLUMNS)
        grain = ndimage.gaussian_filter(generator.normal(0, 0.3, (SIDE, SIDE)), 3)
        gray = np.where(ndimage.gaussian_filter(mask.astype(float), 0.7) > 0.5, part + grain, background + light)
        image = gray[None] * np.array([1.0, 0.97, 0.92])[:, None, None] + generator.normal(0, 0.012, (3, SIDE, SIDE))
        images.append(np.clip(image, 0, 1))
        masks.append(mask)
    return np.stack(images).astype(np.float32), masks


def textures(kind: str, seed: int = 0, count: int = 8) -> NDArray[np.float32]:
    generator = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        noise = generator.normal(size=(SIDE, SIDE))
        if kind == "grain":
            gray = 0.5 + 0.4 * ndimage.gaussian_filter(noise, 2)
        elif kind == "weave":
            gray = 0.5 + 0.2 * np.sin(COLUMNS * 100 + generator.uniform(0, 6)) * np.sin(ROWS * 100) + 0.03 * noise
        elif kind == "brushed with a hot spot":
            hot = np.exp(-((ROWS - 0.5) ** 2 + (COLUMNS - generator.uniform(0.4, 0.6)) ** 2) / 0.08)
            gray = 0.4 + 0.35 * hot + 0.05 * ndimage.gaussian_filter1d(noise, 8, axis=1)
        elif kind == "smooth with a vignette":
            gray = 0.7 - 0.6 * ((ROWS - 0.5) ** 2 + (COLUMNS - 0.5) ** 2) + 0.005 * noise
        elif kind == "blobs on a plain ground":
            gray = np.where(ndimage.gaussian_filter(noise, 3, mode="wrap") > 0.1, 0.2, 0.7) + 0.01 * noise
        elif kind == "plain":
            gray = 0.6 + 0.01 * noise
        else:  # tiles with dark joints
            gray = np.where((np.indices((SIDE, SIDE)) + generator.integers(0, 32) % 32 < 4).any(0), 0.2, 0.6)
            gray = gray + 0.02 * noise
        images.append(np.clip(np.repeat(gray[None], 3, axis=0), 0, 1))
    return np.stack(images).astype(np.float32)


def overlap(found: Mask, truth: Mask) -> float:
    return float((found & truth).sum() / (found | truth).sum())


@pytest.mark.parametrize("shape", [disc, bar, ring, strip])
@pytest.mark.parametrize(("background", "part"), [(0.85, 0.35), (0.08, 0.5), (0.5, 0.75)])
def test_object_on_plain_background_is_found(shape: Shape, background: float, part: float) -> None:
    images, _ = objects(shape, background, part)
    foreground = Foreground.estimate(images)
    assert foreground.is_object
    unseen, truths = objects(shape, background, part, seed=1)
    for image, truth in zip(unseen, truths, strict=True):
        # a rim of the blur's width all round is allowed, hence the slim bar's lower bound
        assert overlap(foreground.mask(image), ndimage.binary_fill_holes(truth)) > (0.7 if shape is bar else 0.9)
    assert np.allclose(foreground.background, background * np.array([1.0, 0.97, 0.92]), atol=0.08)


@pytest.mark.parametrize(
    "kind",
    [
        "grain",
        "weave",
        "brushed with a hot spot",
        "smooth with a vignette",
        "blobs on a plain ground",
        "plain",
        "tiles",
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_texture_is_left_whole(kind: str, seed: int) -> None:
    images = textures(kind, seed)
    foreground = Foreground.estimate(images)
    assert not foreground.is_object
    assert foreground.mask(images[0]).all()
    assert foreground.mask(images[0]).shape == (SIDE, SIDE)


def test_a_soft_shadow_beside_the_part_is_ground() -> None:
    images, truths = objects(disc, 0.8, 0.3)
    for image, truth in zip(images, truths, strict=True):
        shadow = 0.2 * ndimage.gaussian_filter(np.roll(truth, 12, axis=1).astype(np.float32), 8) * ~truth
        image -= shadow
    foreground = Foreground.estimate(images)
    assert foreground.is_object
    for image, truth in zip(images, truths, strict=True):
        assert overlap(foreground.mask(image), truth) > 0.9


def test_hole_belongs_to_the_part_and_dirt_does_not() -> None:
    images, _ = objects(ring, 0.85, 0.3)
    foreground = Foreground.estimate(images)
    image = images[0].copy()
    image[:, 4:9, 4:9] = 0.2
    found = foreground.mask(image)
    assert found[SIDE // 2, SIDE // 2]
    assert not found[:12, :12].any()


def test_image_without_a_part_counts_whole() -> None:
    images, _ = objects(disc, 0.85, 0.3)
    foreground = Foreground.estimate(images)
    assert foreground.mask(np.full((3, SIDE, SIDE), 0.85, np.float32)).all()


def test_mirrored_image_gives_the_mirrored_mask() -> None:
    images, _ = objects(bar, 0.85, 0.3)
    foreground = Foreground.estimate(images)
    flipped = np.ascontiguousarray(images[0][:, :, ::-1])
    assert (foreground.mask(flipped) == foreground.mask(images[0])[:, ::-1]).mean() > 0.999


def test_no_images_is_refused() -> None:
    with pytest.raises(UserError, match="at least one normal image"):
        Foreground.estimate(np.zeros((0, 3, 8, 8), np.float32))
