"""One reader for masks, whatever tool wrote them: what is in the file decides, and what was assumed is said."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from flawsmith.data.images import write_png
from flawsmith.data.masks import inspect_mask, read_mask

MASK = np.zeros((48, 64), np.bool_)
MASK[10:30, 20:50] = True
CORE = np.zeros_like(MASK)
CORE[16:24, 30:40] = True
VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128, 128, 0, 128, 0, 128, 128, 128, 128, 128, 64, 0, 0]
GRAYS = [value for level in range(256) for value in (level, level, level)]


def gray(values: np.ndarray, kind: type = np.uint8) -> Image.Image:
    return Image.fromarray(values.astype(kind))


def with_alpha(colours: np.ndarray, alpha: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([np.broadcast_to(colours, (*MASK.shape, 3)), alpha]).astype(np.uint8))


def with_palette(classes: np.ndarray, palette: list[int]) -> Image.Image:
    image = Image.fromarray(classes.astype(np.uint8)).convert("L")
    image = Image.fromarray(np.asarray(image), "L")
    image.putpalette(palette)
    return image


FILES = {
    "plain": (gray(MASK * 255), ""),
    "0 and 1": (gray(MASK), ""),
    "bilevel": (Image.fromarray(MASK), ""),
    "16 bits": (gray(MASK * 65535, np.uint16), ""),
    "red": (Image.fromarray((MASK[..., None] * np.array([255, 0, 0])).astype(np.uint8)), ""),
    "opaque": (with_alpha(np.where(MASK, 255, 0)[..., None], np.full(MASK.shape, 255)), ""),
    "alpha": (with_alpha(np.uint8([255, 255, 255]), MASK * 255), "alpha channel"),
    "alpha, black": (with_alpha(np.uint8([0, 0, 0]), MASK * 200), "alpha channel"),
    "painted on glass": (with_alpha(np.where(CORE, 90, 255)[..., None], MASK * 255), "every value but 0"),
    "levels": (gray(np.where(CORE, 255, MASK * 100)), "every value but 0"),
    "class 2": (gray(MASK * 2), "every value but 0"),
    "classes": (gray(np.where(CORE, 9, MASK * 4)), "every value but 0"),
    "classes in 16 bits": (gray(np.where(CORE, 9, MASK * 4), np.uint16), "every value but 0"),
    "voc": (with_palette(np.where(CORE, 8, MASK * 6), VOC), "every class of its palette"),
    "palette of no colours": (with_palette(MASK * 3, [0] * 30), "every class of its palette"),
    "palette without black": (with_palette(MASK * 1, [90, 0, 90, 250, 9, 9]), "every class of its palette"),
    "palette turned round": (with_palette(~MASK * 1, [255, 255, 255, 0, 0, 0]), ""),
    "palette of grays": (with_palette(MASK * 255, GRAYS), ""),
}


@pytest.mark.parametrize("kind", FILES)
def test_masks_of_every_kind(tmp_path: Path, kind: str) -> None:
    image, assumed = FILES[kind]
    image.save(tmp_path / "a.png")
    found = inspect_mask(tmp_path / "a.png")
    np.testing.assert_array_equal(found.mask, MASK)
    assert assumed in found.assumed
    assert bool(assumed) == bool(found.assumed)


@pytest.mark.parametrize("values", [MASK * 255, np.where(CORE, 255, MASK * 100), MASK * 60], ids=["one", "two", "dim"])
@pytest.mark.parametrize("blur", ["resized", "jpeg"])
def test_soft_edges_and_noise_are_divided_in_the_middle(tmp_path: Path, values: np.ndarray, blur: str) -> None:
    image, path = gray(values), tmp_path / "a.png"
    if blur == "jpeg":
        path = tmp_path / "a.jpg"
        image.save(path, quality=75)
    else:
        width, height = image.size
        image.resize((width * 5, height * 5), Image.Resampling.BICUBIC).resize((width, height)).save(path)
    found = inspect_mask(path)
    assert (found.mask != MASK).mean() < 0.03
    assert "soft edges" in found.assumed


def test_a_jpeg_of_noise_marks_nothing(tmp_path: Path) -> None:
    gray(np.random.default_rng(0).integers(0, 4, MASK.shape)).save(tmp_path / "a.jpg")
    assert not read_mask(tmp_path / "a.jpg").any()


@given(arrays(np.bool_, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_masks_are_written_and_read_back(mask: np.ndarray) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.png"
        write_png(path, mask)
        np.testing.assert_array_equal(read_mask(path), mask)
        with Image.open(path) as stored:
            assert stored.mode == "L"
            assert set(np.unique(np.asarray(stored))) <= {0, 255}
