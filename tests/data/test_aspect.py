"""The shape of the image that every model sees: its aspect is that of the normals, its shorter side is set."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_settings import SHIPPED

from flawsmith.config import load_settings
from flawsmith.data.config import DataSettings
from flawsmith.data.dataset import load_tiles, plan_tiles
from flawsmith.data.images import find_aspect, read_size, stored_size
from flawsmith.layout import Layout

ORIENTATION = 274  # of EXIF and TIFF alike


def save(path: Path, height: int, width: int, orientation: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image.save(path, **({"tiffinfo": {ORIENTATION: orientation}} if path.suffix == ".tif" else {"exif": exif}))
    return path


@pytest.fixture
def layout_of(tmp_path: Path) -> Callable[..., Layout]:
    def make(**data: object) -> Layout:
        return Layout(load_settings(SHIPPED, {f"data.{key}": value for key, value in data.items()}), "part", tmp_path)

    return make


@pytest.mark.parametrize(("aspect", "shape"), [
    (0.0, (256, 256)), (1.0, (256, 256)), (1.05, (256, 256)), (1.5, (256, 384)), (1 / 1.5, (384, 256)),
    (4.0, (256, 1024)), (0.25, (1024, 256)), (1e6, (256, 1024)), (0.1, (1024, 256)),
])  # fmt: skip
def test_the_longer_side_follows_the_aspect(aspect: float, shape: tuple[int, int]) -> None:
    assert DataSettings(aspect=aspect).shape == shape
    assert DataSettings(aspect=aspect, scale=0.5).shape == (256, 256)  # tiles are square


@given(st.integers(2, 20).map(lambda n: 32 * n), st.floats(0.25, 4))
def test_sides_are_multiples_of_32_and_the_shorter_one_is_as_set(size: int, aspect: float) -> None:
    height, width = DataSettings(image_size=size, aspect=aspect).shape
    assert min(height, width) == size
    assert height % 32 == width % 32 == 0
    assert abs(max(height, width) - size * max(aspect, 1 / aspect)) <= 16


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_header_tells_the_size_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = save(tmp_path / f"a{suffix}", 20, 30, orientation)
    assert stored_size(path) == read_size(path) == ((20, 30) if orientation < 5 else (30, 20))


def test_a_broken_exif_block_turns_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("RGB", (30, 20)).save(path, exif=b"Exif\0\0garbage")
    assert stored_size(path) == read_size(path) == (20, 30)


def test_the_median_counts_and_what_cannot_be_read_does_not(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{width}.png", 20, width) for width in (20, 40, 400)]
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert find_aspect([*paths, tmp_path / "bad.png"]) == 2
    assert find_aspect([tmp_path / "bad.png"]) == 1


def test_all_images_of_a_category_come_to_the_shape_of_its_normals(
    tmp_path: Path, layout_of: Callable[..., Layout]
) -> None:
    good = tmp_path / "data" / "part" / "train" / "good"
    sizes = [(90, 160), (100, 160), (96, 150), (160, 90), (96, 161)]
    paths = [save(good / f"{index}.png", *size) for index, size in enumerate(sizes)]
    data = layout_of(image_size=64).data
    assert data.shape == (64, 96)
    assert load_tiles(plan_tiles(paths, data), data).shape == (5, 3, 64, 96)
    assert layout_of(image_size=64, aspect=0.5).data.shape == (128, 64)
