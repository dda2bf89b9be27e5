"""The one door for pixels: every format a user may bring comes in right, every broken file is named and refused."""

import io
import struct
import tempfile
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from flawsmith import errors
from flawsmith.data.images import (
    READING,
    Reading,
    count_pixels,
    draw_outline,
    inspect_values,
    read_image,
    resize_image,
    resize_mask,
    to_uint8,
    write_png,
)
from flawsmith.errors import UserError

H, W = 6, 4
ORIENTATION = 0x0112
RGB = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
GRAY = RGB[..., 0]
DEEP = np.random.default_rng(1).integers(0, 65536, (H, W), dtype=np.uint16)


def as_float(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    return (pixels / np.float32(np.iinfo(pixels.dtype).max)).astype(np.float32).transpose(2, 0, 1)


def rounded(image: np.ndarray) -> np.ndarray:
    return (np.rint(image * 255) / 255).astype(np.float32)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def check_float_image(image: np.ndarray, height: int = H, width: int = W) -> None:
    assert image.shape == (3, height, width)
    assert image.dtype == np.float32
    assert image.flags.c_contiguous
    assert image.min() >= 0
    assert image.max() <= 1


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".PNG", ".bmp"])
@pytest.mark.parametrize("pixels", [RGB, GRAY, DEEP], ids=["rgb", "gray", "deep"])
def test_lossless_files_come_in_to_the_bit(tmp_path: Path, suffix: str, pixels: np.ndarray) -> None:
    if suffix == ".bmp":
        pixels = pixels.astype(np.uint8)  # it holds no more
    image = read_image(save(tmp_path / f"a{suffix}", Image.fromarray(pixels)))
    check_float_image(image)
    np.testing.assert_array_equal(image, rounded(as_float(pixels)))  # 16 bits on the levels of 8


def png(width: int, height: int, bits: int, *chunks: tuple[bytes, bytes], colours: int = 2) -> bytes:
    """A PNG put together by hand, of colour unless said otherwise, for what Pillow does not write."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0))
    packed = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in (header, *chunks, (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg(tmp_path: Path, mode: str) -> None:
    smooth = np.full((32, 48, 3), (200, 120, 40), np.uint8)
    image = read_image(save(tmp_path / "a.jpg", Image.fromarray(smooth).convert(mode), quality=95))
    check_float_image(image, 32, 48)
    expected = np.asarray(Image.fromarray(smooth).convert(mode).convert("RGB"), np.float32) / 255
    np.testing.assert_allclose(image, expected.transpose(2, 0, 1), atol=0.03)


def test_palette_and_bilevel(tmp_path: Path) -> None:
    palette = Image.fromarray(GRAY).convert("RGB").quantize(256)
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(read_image(save(tmp_path / "p.png", palette)), as_float(expected))
    bilevel = Image.fromarray(GRAY > 127)
    assert bilevel.mode == "1"
    np.testing.assert_array_equal(read_image(save(tmp_path / "b.png", bilevel))[0], (GRAY > 127).astype(np.float32))


def test_pillow_warns_of_nothing_in_any_thread_and_the_filters_stay_as_few(tmp_path: Path) -> None:
    palette = Image.fromarray(RGB).convert("P")
    palette.save(tmp_path / "a.png", transparency=b"\x00\x80\xff")
    read_image(tmp_path / "a.png")
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        assert all(image.shape == (3, H, W) for image in pool.map(read_image, [tmp_path / "a.png"] * 400))
    assert list(warnings.filters) == before


def test_the_header_alone_tells_the_number_of_pixels(tmp_path: Path) -> None:
    whole = save(tmp_path / "a.png", Image.fromarray(RGB))
    assert count_pixels(whole) == H * W
    whole.write_bytes(whole.read_bytes()[:-30])
    assert count_pixels(whole) == H * W
    for name, content in (("empty.png", b""), ("text.png", b"no image")):
        (tmp_path / name).write_bytes(content)
        assert count_pixels(tmp_path / name) == 0
    assert count_pixels(tmp_path / "absent.png") == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped(tmp_path: Path, mode: str) -> None:
    opaque = Image.fromarray(RGB if mode == "RGBA" else GRAY)
    with_alpha = opaque.convert(mode)
    with_alpha.putalpha(Image.fromarray(GRAY))
    image = read_image(save(tmp_path / "a.png", with_alpha))
    np.testing.assert_array_equal(image, as_float(np.asarray(opaque.convert("RGB"))))


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What EXIF 2.32, 4.6.5.A, says a viewer must show for stored `pixels` (H, W, ...)."""
    transposed = pixels.swapaxes(0, 1)
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: transposed,
        6: transposed[:, ::-1],
        7: transposed[::-1, ::-1],
        8: transposed[::-1],
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("pixels", [RGB, GRAY, DEEP], ids=["rgb8", "gray8", "gray16"])
def test_exif_rotation_at_both_depths(tmp_path: Path, orientation: int, suffix: str, pixels: np.ndarray) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = read_image(save(tmp_path / f"a{suffix}", Image.fromarray(pixels), exif=exif))
    np.testing.assert_array_equal(image, rounded(as_float(upright(pixels, orientation))))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_of_jpeg(tmp_path: Path, orientation: int) -> None:
    quadrants = np.zeros((32, 64, 3), np.uint8)
    quadrants[:16, :32], quadrants[:16, 32:], quadrants[16:, :32] = 255, 170, 85
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = read_image(save(tmp_path / "a.jpg", Image.fromarray(quadrants), exif=exif, quality=95))
    np.testing.assert_allclose(image, as_float(upright(quadrants, orientation)), atol=0.06)


def test_broken_exif_does_not_stop_a_good_image(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(RGB), exif=b"Exif\0\0" + b"\xff" * 40)
    np.testing.assert_array_equal(read_image(path), as_float(RGB))


def test_float_tiff(tmp_path: Path) -> None:
    values = np.random.default_rng(3).random((H, W), np.float32)
    image = read_image(save(tmp_path / "a.tif", Image.fromarray(values)))
    np.testing.assert_array_equal(image, np.repeat(rounded(values)[None], 3, axis=0))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -0.1, 1.1, 255.0])
def test_float_tiff_that_does_not_lie_in_its_range(tmp_path: Path, bad: float) -> None:
    values = np.full((H, W), 0.5, np.float32)
    values[1, 1] = bad
    reason = "has values outside its range" if np.isfinite(bad) else "holds NaN or infinite pixels"
    assert reason in refused(save(tmp_path / "a.tif", Image.fromarray(values)))


def test_the_first_frame_of_several_counts(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((H, W, 3), value, np.uint8)) for value in (10, 200)]
    path = save(tmp_path / "a.tif", frames[0], save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(read_image(path), np.full((3, H, W), np.float32(10) / np.float32(255)))


def test_the_suffix_does_not_decide(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, format="PNG")
    path = tmp_path / "really-a-png.jpg"
    path.write_bytes(buffer.getvalue())
    np.testing.assert_array_equal(read_image(path), as_float(RGB))


def refused(path: Path, reading: Reading = READING) -> str:
    with pytest.raises(UserError) as caught:
        read_image(path, reading)
    message = str(caught.value)
    assert str(path) in message
    assert message.count(str(path)) == 1
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("suffix", "form"), [(".png", "PNG"), (".jpg", "JPEG"), (".bmp", "BMP"), (".tif", "TIFF")])
@pytest.mark.parametrize("kept", [0, 1, 7, 0.3, 0.6, 0.9])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, form: str, kept: float) -> None:
    noise = np.random.default_rng(4).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format=form)
    whole = buffer.getvalue()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(len(whole) * kept)])
    assert "cannot be read as an image" in refused(path)


@pytest.mark.parametrize("content", [b"\0" * 5000, b"no image at all", b"\x89PNG\r\n\x1a\n" + b"\0" * 100,
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"])  # fmt: skip
def test_other_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert "cannot be read as an image" in refused(path)
    Image.fromarray(RGB).save(path, format="GIF")  # only the four formats are decoded
    assert "cannot be read as an image" in refused(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    assert "cannot be read as an image" in refused(tmp_path / "b.png")


def test_too_many_pixels_are_refused_before_decoding(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(np.zeros((100, 100), np.uint8)))
    read_image(path, Reading(10_000))
    message = refused(path, Reading(9_000, limit="--max-megapixels"))
    assert "100 x 100 pixels, over the limit of 0.009 megapixels; crop it, or raise --max-megapixels" in message
    assert "raise data.max_megapixels" in refused(path, Reading(9_000))


def test_the_limit_given_decides_and_not_pillows_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(40_000, 40_000, 8, (b"IDAT", b"")))  # 4.8 GB if the header were believed
    assert "over the limit of 100 megapixels" in refused(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # beyond twice of it Pillow raises, below it warns
    with ThreadPoolExecutor(4) as pool:
        scan = save(tmp_path / "scan.png", Image.fromarray(GRAY))
        assert all(image.shape == (3, H, W) for image in pool.map(read_image, [scan] * 40))


def test_a_bomb_of_text_is_refused(tmp_path: Path) -> None:
    megabyte = b"key\0\0" + zlib.compress(b"a" * 1_000_000)
    path = tmp_path / "a.png"
    path.write_bytes(png(W, H, 8, *[(b"zTXt", megabyte)] * 80, (b"IDAT", zlib.compress(b"\0" * 99))))
    assert path.stat().st_size < 200_000
    assert "cannot be read as an image" in refused(path)


@given(arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))))
def test_what_is_written_is_read_back_bit_for_bit(pixels: np.ndarray) -> None:
    with tempfile.TemporaryDirectory() as folder:  # hypothesis runs many examples inside one tmp_path
        path = Path(folder) / "a.png"
        write_png(path, pixels)
        image = read_image(path)
        np.testing.assert_array_equal(to_uint8(image), pixels)
        write_png(path, image)
        np.testing.assert_array_equal(read_image(path), image)


@given(st.floats(0, 1, width=32), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_resizing_keeps_a_constant_and_the_range(value: float, height: int, width: int, size: int) -> None:
    resized = resize_image(np.full((3, height, width), value, np.float32), (size, size))
    check_float_image(resized, size, size)
    np.testing.assert_allclose(resized, value, atol=1e-6)


def test_resizing_to_the_same_size_changes_nothing() -> None:
    image = as_float(np.random.default_rng(5).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    assert resize_image(image, (8, 8)) is image
    mask = image[0] > 0.5
    assert resize_mask(mask, (8, 8)) is mask


@given(
    arrays(np.bool_, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.just(False)),
    st.data(),
    st.integers(1, 40),
)
def test_a_defect_of_one_pixel_never_vanishes(mask: np.ndarray, data: st.DataObject, size: int) -> None:
    assert not resize_mask(mask, (size, size)).any()
    mask[data.draw(st.integers(0, mask.shape[0] - 1)), data.draw(st.integers(0, mask.shape[1] - 1))] = True
    resized = resize_mask(mask, (size, size))
    assert resized.shape == (size, size)
    assert resized.dtype == np.bool_
    assert resized.any()
    assert resize_mask(np.ones_like(mask), (size, size)).all()


def test_a_mask_keeps_its_place_and_share() -> None:
    mask = np.zeros((64, 64), np.bool_)
    mask[16:32, 32:64] = True
    resized = resize_mask(mask, (32, 32))
    np.testing.assert_array_equal(np.argwhere(resized).min(axis=0), [8, 16])
    assert resized.mean() == mask.mean()


def test_eight_bits_round_and_clip() -> None:
    image = np.array([-1.0, 0.0, 0.5 / 255 - 1e-4, 0.5 / 255 + 1e-4, 1.0, 2.0], np.float32)
    pixels = to_uint8(np.broadcast_to(image, (3, 1, 6)))
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 0, 0, 1, 255, 255])
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(as_float(every[None]))[0, :, 0], every)


def test_outline_surrounds_the_mask_and_spares_it() -> None:
    image, mask = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.bool_)
    mask[10:20, 12:18] = True
    drawn = draw_outline(image, mask, (255, 0, 200))
    marked = (drawn == (255, 0, 200)).all(axis=2)
    assert marked.any()
    assert not (marked & mask).any()
    assert (drawn[~marked] == 0).all()
    assert not draw_outline(image, np.zeros_like(mask), (255, 0, 200)).any()


def tiff(
    pixels: bytes,
    bits: int,
    photometric: int = 1,
    sample_format: int = 1,
    samples: int = 1,
    order: str = "<",
    compressed: bool = False,
) -> bytes:
    """A TIFF of H x W in one strip, for what Pillow does not write."""
    pixels = zlib.compress(pixels) if compressed else pixels
    tags = [(256, 4, W), (257, 4, H), (258, 3, bits), (259, 3, 8 if compressed else 1), (262, 3, photometric),
            (273, 4, 0), (277, 3, samples), (278, 4, H), (279, 4, len(pixels)), (339, 3, sample_format)]  # fmt: skip
    start = 8 + 2 + 12 * len(tags) + 4
    content = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    for tag, kind, value in tags:
        value = start if tag == 273 else value
        content += struct.pack(f"{order}HHI", tag, kind, 1)
        content += struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}I", value)
    return content + struct.pack("<I", 0) + pixels


TWELVE = np.rint(GRAY / 255 * 4095).astype("<u2")


def packed(values: np.ndarray) -> bytes:
    """12-bit samples, two in three bytes, high bits first."""
    pairs = values.reshape(-1, 2).astype(np.uint32)
    out = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
    return out.astype(np.uint8).tobytes()


@pytest.mark.parametrize(
    ("content", "white"),
    [
        (tiff(TWELVE.tobytes(), 16), 4095),
        (tiff(TWELVE.astype(">u2").tobytes(), 16, order=">"), 4095),
        (tiff(packed(TWELVE), 12), 0),  # the header tells
        (tiff((4095 - TWELVE).tobytes(), 16, photometric=0), 4095),  # zero is white
        (tiff((65535 - GRAY.astype("<u2") * 257).tobytes(), 16, photometric=0), 0),
        (tiff((255 - GRAY).tobytes(), 8, photometric=0), 4095),  # 8 bits do not ask for the white level
        (tiff(TWELVE.astype("<i2").tobytes(), 16, sample_format=2), 4095),
        (tiff(TWELVE.astype("<u4").tobytes(), 32), 4095),
        (tiff(TWELVE.astype("<f4").tobytes(), 32, sample_format=3), 4095),
        (tiff((GRAY / 255).astype("<f4").tobytes(), 32, sample_format=3), 0),
        (tiff((1 - GRAY / 255).astype("<f4").tobytes(), 32, photometric=0, sample_format=3), 0),
    ],
)
def test_what_a_header_says_of_the_values_is_honoured(tmp_path: Path, content: bytes, white: int) -> None:
    (tmp_path / "a.tif").write_bytes(content)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", Reading(white_level=white)), as_float(GRAY))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tiff(TWELVE.astype("<i2").tobytes(), 16, sample_format=2), "set data.white_level"),
        (tiff(TWELVE.astype("<i4").tobytes(), 32, sample_format=2), "set data.white_level"),
        (tiff(GRAY.tobytes(), 8, sample_format=2), "would be misread"),
        (tiff(TWELVE.astype(">f4").tobytes(), 32, sample_format=3, order=">", compressed=True), "would be misread"),
        (tiff(bytes(H * W * 2), 10), "TIFF of 1 to 8, 12, 16 or 32 bits"),
        (tiff(bytes(H * W * 2), 14), "cannot be read as an image"),
    ],
)
def test_values_that_would_be_misread_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.tif").write_bytes(content)
    assert reason in refused(tmp_path / "a.tif")


def test_strips_that_are_missing_are_damage(tmp_path: Path) -> None:
    content = bytearray(tiff(GRAY.tobytes(), 8))
    place = content.index(struct.pack("<HHI", 279, 4, 1)) + 8
    content[place : place + 4] = bytes(4)
    (tmp_path / "a.tif").write_bytes(bytes(content))
    assert "strips of its pixels are missing" in refused(tmp_path / "a.tif")


@pytest.mark.parametrize("top", [4095, 65535])
@pytest.mark.parametrize("colours", [2, 4, 6], ids=["rgb", "gray-alpha", "rgba"])
def test_colours_of_more_than_eight_bits_are_scaled_like_gray(tmp_path: Path, colours: int, top: int) -> None:
    """12 bits in 16: the high byte, which Pillow keeps, would have 16 levels."""
    shown = GRAY if colours == 4 else RGB
    deep = np.rint(shown.reshape(H, W, -1) / 255 * top).astype(">u2")
    alpha = np.full((H, W, 1), 65535, ">u2")
    rows = deep if colours == 2 else np.concatenate([deep, alpha], axis=2)
    body = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows))
    (tmp_path / "a.png").write_bytes(png(W, H, 16, (b"IDAT", body), colours=colours))
    (tmp_path / "a.tif").write_bytes(tiff(deep.astype("<u2").tobytes(), 16, photometric=2, samples=3))
    for name in ("a.png", "a.tif") if colours == 2 else ("a.png",):
        np.testing.assert_array_equal(read_image(tmp_path / name, Reading(white_level=top)), as_float(shown))


def test_values_say_how_deep_a_file_is(tmp_path: Path) -> None:
    values = inspect_values(save(tmp_path / "a.png", Image.fromarray(TWELVE.astype(np.uint16))))
    assert (values.bits, values.significant, values.kind, values.largest) == (16, 16, "uint", TWELVE.max())
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in TWELVE.astype(">u2")))
    (tmp_path / "b.png").write_bytes(png(W, H, 16, (b"sBIT", b"\x0c"), (b"IDAT", body), colours=0))
    assert inspect_values(tmp_path / "b.png").significant == 12
    shallow = inspect_values(save(tmp_path / "c.png", Image.fromarray(RGB)))
    assert (shallow.is_deep, shallow.bits) == (False, 8)


def test_what_looks_wrong_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    errors._told.clear()
    clear = Image.fromarray(RGB).convert("RGBA")
    clear.putalpha(0)
    for name in ("a.png", "b.png"):
        read_image(save(tmp_path / name, clear))
        read_image(save(tmp_path / f"dark-{name}", Image.fromarray(TWELVE // np.uint16(2))))
        read_image(save(tmp_path / f"bright-{name}", Image.fromarray(DEEP)), Reading(white_level=4095))
    said = " ".join(caplog.messages)
    assert len(caplog.messages) == 3
    for part in ("is transparent everywhere", "so it is nearly black", "above the white level of 4095"):
        assert part in said
