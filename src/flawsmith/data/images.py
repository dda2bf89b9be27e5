"""The one door for pixels from outside: decoding, EXIF rotation, bit depth, size limits, resizing, lossless writing.

A float image is RGB, `(3, H, W)`, float32 in [0, 1], on the 256 levels of 8 bits: training keeps no more, and what a
model was not trained on it must not see later. A mask is `(H, W)` bool. No torch here: inference imports this.
"""

import logging
import math
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from scipy import ndimage

from flawsmith.data.damage import find_damage
from flawsmith.errors import UserError
from flawsmith.files import atomic_file

FloatImage = NDArray[np.float32]  # (3, H, W) in [0, 1]
Mask = NDArray[np.bool_]  # (H, W)

FORMATS = ("PNG", "JPEG", "BMP", "TIFF")  # by content: Pillow would hand a posted EPS to Ghostscript
PNG_LEVEL = 1  # of zlib's 9: a third of level 6's time for 6-17 % larger files; PNGs were 40 % of synthesis's time
MAX_PIXELS = 100_000_000  # a decompression bomb is refused before its pixels are decoded


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        max_pixels: larger images are refused before they are decoded.
        white_level: the value that is white in files of more than 8 bits a sample; 0 is the largest their header
            allows. Files of 8 bits do not ask.
        limit: what a person sets to raise `max_pixels`, for errors.
    """

    max_pixels: int = MAX_PIXELS
    white_level: int = 0
    limit: str = "data.max_megapixels"


READING = Reading()


@dataclass(frozen=True)
class Values:
    """What the values of one file are; `largest` and `bulk` (99.9 % of its values lie at or below) are 0 where a sample
    has 8 bits or less: those are not asked."""

    height: int
    width: int
    mode: str  # as Pillow names it
    bits: int  # that a sample has by the header
    significant: int  # that it says are used (PNG's sBIT), else `bits`
    kind: str  # "uint", "float", or "int": signed, or of 32 bits
    zero_is_white: bool = False
    largest: float = 0.0
    bulk: float = 0.0

    @property
    def is_deep(self) -> bool:
        return self.bits > 8


def read_image(path: Path, reading: Reading = READING) -> FloatImage:
    """Decode one image file to RGB `(3, H, W)` float32 in [0, 1], on 256 levels.

    Gray is repeated to three channels, alpha is dropped, EXIF rotation is applied, a TIFF whose zero is white is
    inverted; more than 8 bits are divided by the white level and rounded. Float TIFFs must lie in [0, 1] already unless
    there is a white level. Of an animation the first frame counts; colour profiles are passed over.

    Raises:
        UserError: the file is missing, empty, damaged, no image, too large, or its values cannot be what they seem.
    """
    # a stream, not a path: given a path, Pillow maps gray TIFFs into memory and then misreads the rotated ones
    with _named(path), path.open("rb") as stream:
        return decode_image(stream, str(path), reading)


def decode_image(stream: BinaryIO, name: str, reading: Reading = READING) -> FloatImage:
    """As `read_image`, of an open file or bytes in memory; `name` stands for it in errors.

    Raises:
        UserError: as `read_image`.
    """
    with _named(name):
        values, pixels = _decode(stream, name, reading)
        scaled = _scale_deep(pixels, values, name, reading.white_level) if values.is_deep else _eight_bits(pixels)
    if scaled.ndim == 2:
        return np.repeat(scaled[None], 3, axis=0)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))


def inspect_values(path: Path, reading: Reading = READING) -> Values:
    """What the values of a file are; only one of more than 8 bits is decoded for it.

    Raises:
        UserError: as `read_image`, of the header alone where that suffices.
    """
    with _named(path), path.open("rb") as stream:
        with Image.open(stream, formats=FORMATS) as image:
            _check_pixels(image, path, reading)
            found = _header(image, stream, path)
        if found.is_deep:
            stream.seek(0)
            _, pixels = _decode(stream, str(path), reading)
            rank = int(0.999 * (pixels.size - 1))
            bulk = np.partition(pixels, rank, axis=None)[rank]
            found = replace(found, largest=float(pixels.max()), bulk=float(bulk))
        return found


def count_pixels(path: Path) -> int:
    """How many pixels a file says it has, from its header alone; 0 if that cannot be read."""
    try:
        return math.prod(stored_size(path))
    except UserError:
        return 0


def stored_size(path: Path) -> tuple[int, int]:
    """Height and width that a file's header tells, before any rotation.

    Raises:
        UserError: it cannot be read.
    """
    with _named(path), path.open("rb") as stream, Image.open(stream, formats=FORMATS) as image:
        return image.height, image.width


def tell_once(key: str, sentence: str) -> None:
    """Log a warning unless one of the same key was logged by this process."""
    with _telling:
        if key in _told:
            return
        _told.add(key)
    log.warning("%s", sentence)


_telling, _told = threading.Lock(), set[str]()


def resize_image(image: FloatImage, size: int | tuple[int, int]) -> FloatImage:
    """Stretch `(3, H, W)` to `(3, size, size)`, or to the height and width of a pair, with an antialiased bilinear
    filter; the one resize of the product."""
    height, width = _pair(size)
    if image.shape[1:] == (height, width):
        return image
    resized = np.empty((len(image), height, width), np.float32)
    for channel, out in zip(image, resized, strict=True):  # into place: a large image is not held twice
        stretched = np.asarray(Image.fromarray(channel).resize((width, height), Image.Resampling.BILINEAR))
        np.clip(stretched, 0, 1, out=out)
    return resized


def resize_mask(mask: Mask, size: int | tuple[int, int]) -> Mask:
    """Stretch a mask `(H, W)` to `(size, size)`, or to a pair: a pixel is set if at least half of its area was.

    If that would lose a non-empty mask altogether, any coverage counts: a faint scratch stays a labelled defect.
    """
    height, width = _pair(size)
    if mask.shape == (height, width):
        return mask
    coverage = np.asarray(
        Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BOX), np.float32
    )
    half = coverage >= 0.5
    return half if half.any() or not mask.any() else coverage > 0


def read_size(path: Path, reading: Reading = READING) -> tuple[int, int]:
    """Height and width of what `read_image` answers, without its floats.

    Raises:
        UserError: as `read_image`, but for values out of range and damage that only shows in the pixels.
    """
    with _named(path), path.open("rb") as stream, Image.open(stream, formats=FORMATS) as image:
        _check_pixels(image, path, reading)
        upright = _upright(image)
        return upright.height, upright.width


def to_uint8(image: FloatImage) -> NDArray[np.uint8]:
    """`(3, H, W)` in [0, 1] to `(H, W, 3)` uint8, rounded: the exact inverse of reading an 8-bit file."""
    return np.ascontiguousarray(np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0))


def draw_outline(image: NDArray[np.uint8], mask: Mask, colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Draw a line just outside the mask `(H, W)` on an image `(H, W, 3)`: the pixels of the mask stay visible."""
    drawn = image.copy()
    drawn[ndimage.binary_dilation(mask, iterations=2) & ~ndimage.binary_dilation(mask)] = colour
    return drawn


def write_png(path: Path, pixels: NDArray[np.uint8] | FloatImage | Mask) -> None:
    """Write a lossless 8-bit PNG from a float image, an `(H, W[, 3])` uint8 array or a mask (as {0, 255})."""
    if pixels.dtype == np.bool_:
        encoded = pixels.astype(np.uint8) * np.uint8(255)
    elif pixels.dtype == np.uint8:
        encoded = np.asarray(pixels, np.uint8)
    else:
        encoded = to_uint8(np.asarray(pixels, np.float32))
    with atomic_file(path) as temporary:
        Image.fromarray(encoded).save(temporary, format="PNG", compress_level=PNG_LEVEL)


class _Filters:
    """What Pillow says nothing of while any thread decodes: warnings, and its own limit of pixels, since ours decides.

    Both belong to the process: threads that set and restored them each for itself would leave them wrong.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._outer: tuple[warnings.catch_warnings[None], int | None] | None = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._outer = (warnings.catch_warnings(), Image.MAX_IMAGE_PIXELS)
                self._outer[0].__enter__()
                warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\..*")
                Image.MAX_IMAGE_PIXELS = None
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._outer is not None:
                self._outer[0].__exit__(None, None, None)
                Image.MAX_IMAGE_PIXELS = self._outer[1]


_filters = _Filters()


@contextmanager
def _named(path: Path | str) -> Iterator[None]:
    """Turn whatever a decoder raises into one sentence that names the file."""
    try:
        with _filters:
            yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path.") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError and more
        if isinstance(error, UnidentifiedImageError):
            error = ValueError("no PNG, JPEG, BMP, or TIFF of 1 to 8, 12, 16 or 32 bits a sample")
        reason = re.sub(r"<_io\.[^>]*>", "the file", str(error)).replace(str(path), "the file") or type(error).__name__
        raise UserError(f"{path} cannot be read as an image ({reason}); replace or remove it.") from error


def _check_pixels(image: Image.Image, path: Path | str, reading: Reading) -> None:
    if image.width * image.height > reading.max_pixels:
        raise UserError(
            f"{path} has {image.width} x {image.height} pixels, over the limit of {reading.max_pixels / 1e6:g} "
            f"megapixels; crop it, or raise {reading.limit}."
        )


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # outside the `try`: what is wrong with the pixels must not pass
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a camera's broken EXIF block raises SyntaxError, struct.error and more; the pixels are good
        return image


def open_upright(path: Path, reading: Reading) -> Image.Image:
    """A file as Pillow decodes it, upright and undamaged, for what its palette or alpha say.

    Raises:
        UserError: as `read_image`.
    """
    with _named(path), path.open("rb") as stream:
        return _open(stream, str(path), reading)[1]


def _open(stream: BinaryIO, name: str, reading: Reading) -> tuple[Values, Image.Image]:
    with Image.open(stream, formats=FORMATS) as image:
        _check_pixels(image, name, reading)
        values = _header(image, stream, name)
        is_top_down = not (image.format == "BMP" and any(args[-1:] == (-1,) for args in _arguments(image)))
        image.load()
        damage = find_damage(image, is_top_down, _content(stream))
        if damage:
            raise UserError(f"{name} is damaged ({damage}); replace or remove it.")
        return values, _upright(image)


def _decode(stream: BinaryIO, name: str, reading: Reading) -> tuple[Values, NDArray[Any]]:
    """The file's values as they are, upright: `(H, W)` or `(H, W, 3)`; uint8 unless they are deep."""
    values, upright = _open(stream, name, reading)
    if "A" in upright.getbands() and upright.getchannel("A").getextrema() == (0, 0):
        tell_once(
            "transparent", f"{name} is transparent everywhere; the colours behind are read. Export without alpha."
        )
    if not values.is_deep:
        return values, np.asarray(upright if upright.mode == "L" else upright.convert("RGB"))
    pixels = np.asarray(upright)
    return values, pixels if pixels.ndim == 2 else _both_bytes(pixels, stream)


def _both_bytes(high: NDArray[np.uint8], stream: BinaryIO) -> NDArray[np.uint16]:
    """16-bit colours `(H, W, 3)`, or gray `(H, W)` of a gray PNG with alpha, of which Pillow has read the `high` bytes
    alone: read as if the order of bytes were the other, it gives the low ones."""
    stream.seek(0)
    with Image.open(stream, formats=FORMATS) as image:
        (raw,) = {args[0] for args in _arguments(image)}
        if raw == "LA;16B":
            swapped = "RGBA"  # its four bytes a pixel
        else:
            ending = raw[-1] if raw[-1] != "N" else sys.byteorder[0].upper()
            swapped = raw[:-1] + ("L" if ending == "B" else "B")
        image.tile = [
            tile._replace(args=swapped if isinstance(tile.args, str) else (swapped, *(tile.args or ())[1:]))
            for tile in image.tile
        ]
        low = np.asarray(_upright(image)).astype(np.uint16)
    deep = low[..., 0] << 8 | low[..., 1] if swapped == "RGBA" else high[..., :3].astype(np.uint16) << 8 | low[..., :3]
    return np.asarray(deep, np.uint16)


def _content(stream: BinaryIO) -> bytes:
    place = stream.tell()
    stream.seek(0)
    content = stream.read()
    stream.seek(place)
    return content


def _arguments(image: ImageFile.ImageFile) -> list[tuple[Any, ...]]:
    """What Pillow's decoder is told of each part of a file; the first is how its bytes lie."""
    return [tile.args if isinstance(tile.args, tuple) else (tile.args,) for tile in image.tile]


def _header(image: ImageFile.ImageFile, stream: BinaryIO, name: Path | str) -> Values:
    """What a file's header says of its values.

    Raises:
        UserError: they are of a kind that would be misread.
    """
    raw = {str(args[0]) for args in _arguments(image)}
    is_deep = image.mode.startswith(("I", "F")) or any(";16" in each for each in raw)
    bits, significant, kind, is_inverted = 16 if is_deep else 8, 0, "uint", False
    tags: Any = getattr(image, "tag_v2", None)
    if tags is not None:  # a TIFF
        declared, is_signed = max(tags.get(258, (1,))), max(tags.get(339, (1,))) == 2
        is_colour = declared > 8 and len(image.getbands()) > 1
        # what libtiff has decompressed is in this machine's order, which Pillow knows of unsigned 16 bits alone
        is_turned = image.mode in ("I", "F") and tags.prefix == b"MM" and image.tile[0][0] == "libtiff"
        is_misread = is_turned or (is_signed and not is_deep)
        is_misread |= is_colour and (tags.get(284, 1) == 2 or bool(raw - _COLOURS_OF_16_BITS))
        if is_misread:
            raise UserError(
                f"{name} is a TIFF whose values ({declared} bits, {image.mode}; signed, in planes, multiplied by alpha "
                "or compressed big-endian) would be misread; export it as 8 or 16 bit RGB or gray."
            )
        if 0 in tags.get(273, tags.get(324, (1,))) or 0 in tags.get(279, tags.get(325, (1,))):
            raise UserError(f"{name} is damaged (strips of its pixels are missing); replace or remove it.")
        if is_deep:
            bits, is_inverted = declared, tags.get(262) == 0
            kind = "float" if image.mode == "F" else "int" if is_signed or bits == 32 else "uint"
    elif is_deep:
        significant = _significant_bits(stream)
    return Values(image.height, image.width, image.mode, bits, significant or bits, kind, is_inverted)


_COLOURS_OF_16_BITS = {f"{mode};16{order}" for mode in ("RGB", "RGBA", "RGBX") for order in "BLN"}


def _significant_bits(stream: BinaryIO) -> int:
    """How many bits of a sample the header of a PNG says are used (sBIT), 0 if it does not."""
    place = stream.tell()
    stream.seek(0)
    found = re.search(rb"\0\0\0[\x01-\x04]sBIT(.)", stream.read(4096).partition(b"IDAT")[0], re.DOTALL)
    stream.seek(place)
    return found[1][0] if found else 0


def _eight_bits(pixels: NDArray[np.uint8]) -> FloatImage:
    return np.asarray(pixels, np.float32) / np.float32(255)


def on_levels(image: FloatImage) -> FloatImage:
    """Values in [0, 1] rounded to the 256 levels of 8 bits, in place."""
    image *= 255
    np.rint(image, out=image)
    image /= 255
    return image


def _scale_deep(pixels: NDArray[Any], values: Values, name: str, white: int) -> FloatImage:
    """More than 8 bits a sample to [0, 1], on 256 levels."""
    scaled = np.array(pixels, np.float32)
    if not np.isfinite(scaled).all():
        raise UserError(f"{name} holds NaN or infinite pixels; export it again.")
    low, high = float(scaled.min()), float(scaled.max())
    remedy = "export it as 8 or 16 bit unsigned, or set data.white_level to the value that is white."
    if not white and values.kind == "int":
        raise UserError(f"{name} holds signed or 32-bit whole numbers, which do not tell what is white; {remedy}")
    top = float(white or (1 if values.kind == "float" else 2**values.bits - 1))
    if low < 0 or (high > top and not white):
        raise UserError(f"{name} has values outside its range ({low:g} to {high:g}, not 0 to {top:g}); {remedy}")
    if high > top:
        tell_once(
            "above white",
            f"{name} has values up to {high:g}, above the white level of {top:g}, that all count as white; is it of "
            "another camera? Else set data.white_level and train again.",
        )
    elif not white and values.kind == "uint" and 0 < high <= top / 16:
        tell_once(
            "dark",
            f"{name} has no value above {high:g} of {top:g}, so it is nearly black; if its camera gives fewer bits, "
            "set data.white_level and train again.",
        )
    scaled /= np.float32(top)
    np.minimum(scaled, 1, out=scaled)
    return on_levels(np.subtract(1, scaled, out=scaled) if values.zero_is_white else scaled)
