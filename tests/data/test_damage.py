"""Damage that decodes is found; honest images that resemble it are not."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flawsmith.data.images import read_image
from flawsmith.errors import UserError

SIDE = 96
RNG = np.random.default_rng(0)
NOISY = np.clip(RNG.normal(150, 25, (SIDE, SIDE, 3)) + np.arange(SIDE)[:, None, None] / 3, 1, 254).astype(np.uint8)


def encoded(pixels: np.ndarray, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=form, **options)
    return stream.getvalue()


UNFINISHED = np.frombuffer(NOISY.tobytes()[:20000] + bytes(NOISY.size - 20000), np.uint8).reshape(NOISY.shape)
JPEG = encoded(NOISY, "JPEG", quality=92)
PROGRESSIVE = encoded(NOISY, "JPEG", quality=92, progressive=True)
HALF = len(JPEG) // 2


def half_written(form: str, fill: int = 0) -> bytes:
    content = encoded(NOISY, form)
    return content[: len(content) // 2] + bytes([fill]) * (len(content) - len(content) // 2)


@pytest.mark.parametrize(
    "content",
    [
        JPEG[:HALF] + b"\xff\xd9",
        PROGRESSIVE[:HALF] + b"\xff\xd9",
        JPEG[:HALF] + bytes(40) + JPEG[HALF + 40 :],
        JPEG[:HALF] + JPEG[HALF + 200 :],
        JPEG[:HALF] + JPEG[HALF - 200 :],
        JPEG[:HALF] + bytes(len(JPEG) - HALF),
        half_written("BMP"),
        half_written("TIFF"),
        half_written("TIFF", 255),
        half_written("BMP")[:-1000],
        half_written("PNG"),
        encoded(UNFINISHED, "PNG"),
    ],
)
def test_files_that_are_not_whole_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"(is damaged|cannot be read as an image) \(.*\); replace or remove it"):
        read_image(path)


def bordered(value: int, rows: int) -> np.ndarray:
    pixels = NOISY.copy()
    pixels[-rows:] = value
    return pixels


def disc(value: int) -> np.ndarray:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return np.where((np.hypot(rows - 40, columns - 48) < 36)[..., None], NOISY, value).astype(np.uint8)


HONEST = {
    "noise": NOISY,
    "gray": NOISY[..., 0],
    "black": np.zeros_like(NOISY),
    "white": np.full_like(NOISY, 255),
    "the gray of missing blocks": np.full_like(NOISY, 128),
    "half that gray": bordered(128, 48),
    "black border": bordered(0, 30),
    "white border": bordered(255, 30),
    "part on black": disc(0),
    "part on white": disc(255),
    "overexposed": np.where(NOISY > 150, 255, NOISY).astype(np.uint8),
    "nearly black": NOISY // 60,
}


@pytest.mark.parametrize("kind", HONEST)
def test_honest_images_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    for form in ("PNG", "BMP", "TIFF"):
        path.write_bytes(encoded(HONEST[kind], form))
        read_image(path)
    for options in ({"quality": 30}, {"quality": 100}, {"optimize": True}, {"progressive": True}, {"subsampling": 0}):
        path.write_bytes(encoded(HONEST[kind], "JPEG", **options))
        read_image(path)
