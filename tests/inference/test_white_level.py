"""12 bits in 16, and their kin: training and prediction see what they would see of 8 bits."""

import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_settings import SHIPPED

from flawsmith import errors
from flawsmith.config import load_settings
from flawsmith.data.dataset import load_tiles, plan_tiles
from flawsmith.data.images import READING, Reading, find_white_level, read_image
from flawsmith.errors import UserError
from flawsmith.inference.predictor import Predictor
from flawsmith.layout import Layout

RNG = np.random.default_rng(0)
EIGHT = [np.clip(RNG.normal(140, 40, (64, 64)), 0, 255).astype(np.uint8) for _ in range(6)]


def scaled(pixels: np.ndarray, top: int) -> np.ndarray:
    return np.rint(pixels / 255 * top).astype(np.uint16)


def deep_set(folder: Path, tops: list[int]) -> list[Path]:
    folder.mkdir(parents=True)
    paths = [folder / f"{place}.png" for place in range(len(tops))]
    for path, top, pixels in zip(paths, tops, EIGHT, strict=True):
        Image.fromarray(scaled(pixels, top) if top > 255 else pixels).save(path)
    return paths


@pytest.mark.parametrize("top", [255, 1023, 4095, 16383, 65535])
def test_the_depth_that_normals_use_decides(tmp_path: Path, top: int) -> None:
    paths = deep_set(tmp_path / "good", [top] * 6)
    white = find_white_level(paths, READING, "part")
    assert white == (0 if top == 255 else top)
    for path, pixels in zip(paths, EIGHT, strict=True):
        np.testing.assert_array_equal(read_image(path, Reading(white_level=white))[0], pixels / np.float32(255))


def test_a_dark_set_is_as_deep_as_its_header_says(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(scaled(EIGHT[0] // 8, 4095)).save(path)
    assert find_white_level([path], READING, "part") == 1023
    content = path.read_bytes()
    chunk = b"sBIT\x0c"
    path.write_bytes(content[:33] + b"\0\0\0\1" + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:])
    assert find_white_level([path], READING, "part") == 4095


@pytest.mark.parametrize(("tops", "said"), [
    ([4095] * 5 + [255], "5 of 6 normal images have more than 8 bits"),
    ([4095] * 5 + [65535], "5 of 6 normal images (such as 0.png) are nearly black beside the largest value"),
    ([4095] * 6, ""),
])  # fmt: skip
def test_a_mixed_set_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture, tops: list[int], said: str) -> None:
    errors._told.clear()
    paths = deep_set(tmp_path / "good", tops)
    for _ in range(2):
        find_white_level(paths, READING, "part")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == bool(said)
    assert said in " ".join(warnings)


@pytest.mark.parametrize(("kind", "factor"), [(np.int32, 4095), (np.float32, 4095)])
def test_what_cannot_be_known_is_asked_for(tmp_path: Path, kind: type, factor: int) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray((EIGHT[0] / 255 * factor).astype(kind)).save(path)
    with pytest.raises(UserError, match=r"a\.tif does not tell what is white .* set data\.white_level"):
        find_white_level([path], READING, "part")


@pytest.mark.parametrize("size", [64, 96])
def test_training_and_prediction_see_of_12_bits_what_they_see_of_8(
    tmp_path: Path, size: int, write_model: Callable[..., Path]
) -> None:
    seen = {}
    for name, top in (("eight", 255), ("twelve", 4095)):
        paths = deep_set(tmp_path / "data" / name / "train" / "good", [top] * 6)
        settings = load_settings(SHIPPED)
        settings = replace(settings, data=replace(settings.data, root="data", image_size=size))
        layout = Layout(settings, name, tmp_path)
        assert layout.data.white_level == (0 if top == 255 else top)
        tiles = load_tiles(plan_tiles(paths, layout.data), layout.data)
        predictor = Predictor(write_model(white_level=layout.data.white_level))
        read = [read_image(path, predictor.reading()) for path in paths]
        prepared = [predictor.tiling.prepare(image) for image in read]
        seen[name] = tiles, prepared, [answer.score for answer in predictor.predict(read)]
    tolerance = 1 if size != 64 else 0  # resizing may round either way
    assert np.abs(seen["eight"][0].astype(int) - seen["twelve"][0]).max() <= tolerance
    np.testing.assert_allclose(seen["eight"][1], seen["twelve"][1], atol=1 / 255)
    np.testing.assert_allclose(seen["eight"][2], seen["twelve"][2], atol=1 / 255)
