"""The one door for pixels from outside: decoding, EXIF rotation, bit depth, size limits, resizing, lossless writing.

A float image is RGB, `(3, H, W)`, float32 in [0, 1], on the 256 levels of 8 bits: training keeps no more, and what a
model was not trained on it must not see later. A mask is `(H, W)` bool. No torch here: inference imports this.
"""

import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from scipy import ndimage

from flawsmith.data.damage import find_damage
from flawsmith.data.depth import PixelFormat, decoder_arguments, read_format, scale_deep, swap_bytes
from flawsmith.errors import UserError, tell_once
from flawsmith.files import atomic_file

FloatImage = NDArray[np.float32]  # (3, H, W) in [0, 1]
Mask = NDArray[np.bool_]  # (H, W)
Shape = tuple[int, int]  # height and width in pixels

FORMATS = ("PNG", "JPEG", "BMP", "TIFF")  # by content: Pillow would hand a posted EPS to Ghostscript
PNG_LEVEL = 1  # of zlib's 9: far faster than the usual 6, for files that are a little larger
MAX_PIXELS = 100_000_000  # a decompression bomb is refused before its pixels are decoded
DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras give; files hold them in 16
SILENT = ("ignore", None, UserWarning, re.compile(r"PIL\..*"), 0)  # a filter as `warnings.filterwarnings` makes it

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        max_pixels: larger images are refused before they are decoded.
        white_level: the value that is white in files of more than 8 bits a sample; 0 is the largest that their header
            allows. Files of 8 bits ignore it.
        limit: what a person sets to raise `max_pixels`, for errors.
    """

    max_pixels: int = MAX_PIXELS
    white_level: int = 0
    limit: str = "data.max_megapixels"


READING = Reading()


def read_image(path: Path, reading: Reading = READING) -> FloatImage:
    """Decode one image file to RGB `(3, H, W)` float32 in [0, 1], on 256 levels.

    Gray is repeated to three channels, alpha is dropped, EXIF rotation is applied, a TIFF whose zero is white is
    inverted; more than 8 bits are divided by the white level and rounded. Float TIFFs must lie in [0, 1] already unless
    there is a white level. Of an animation the first frame counts. Colour profiles are ignored.

    Raises:
        UserError: the file is missing, empty, damaged, no image, too large, or its values cannot be what they seem.
    """
    # a stream, not a path: given a path, Pillow maps gray TIFFs into memory and then misreads the rotated ones
    with _named(path), path.open("rb") as stream:
        return decode_image(stream, str(path), reading)


def decode_image(stream: BinaryIO, name: str, reading: Reading = READING) -> FloatImage:
    """Decode an open file, or bytes in memory, as `read_image` does; `name` stands for it in errors.

    Raises:
        UserError: as `read_image`.
    """
    with _named(name):
        values, pixels = _decode(stream, name, reading)
        if values.is_deep:
            scaled = on_levels(scale_deep(pixels, values, name, reading.white_level))
        else:
            scaled = np.asarray(pixels, np.float32) / np.float32(255)
    if scaled.ndim == 2:
        return np.repeat(scaled[None], 3, axis=0)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))


def inspect_values(path: Path, reading: Reading = READING) -> PixelFormat:
    """Read the format of a file's values; its pixels are decoded only where a sample has more than 8 bits.

    Raises:
        UserError: as `read_image`; for files of 8 bits only what the header shows.
    """
    with _named(path), path.open("rb") as stream:
        with Image.open(stream, formats=FORMATS) as image:
            _check_pixels(image, path, reading)
            found = read_format(image, stream, path)
        if found.is_deep:
            stream.seek(0)
            _, pixels = _decode(stream, str(path), reading)
            rank = int(0.999 * (pixels.size - 1))
            bulk = np.partition(pixels, rank, axis=None)[rank]
            found = replace(found, largest=float(pixels.max()), bulk=float(bulk))
        return found


def find_white_level(paths: Sequence[Path], reading: Reading, category: str) -> int:
    """Find the value that is white in the normal images `paths` of more than 8 bits; 0 if all have 8 bits, or are
    floats in [0, 1].

    It is the end of the depth that their headers tell, or else of the smallest usual depth that holds all values.
    Images that do not fit together give a warning, once a category.

    Raises:
        UserError: only `data.white_level` can tell what is white.
    """
    found = {}
    for path in paths:
        with suppress(UserError):  # whoever reads them all tells all that cannot be read
            found[path] = inspect_values(path, reading)
    deep = {path: values for path, values in found.items() if values.is_deep}
    if not deep:
        return 0
    if len({values.kind for values in deep.values()}) > 1:
        raise UserError(f"{paths[0].parent} mixes whole numbers and floats; export all of it as 8 or 16 bit unsigned.")
    path, brightest = max(deep.items(), key=lambda item: item[1].largest)
    if brightest.kind == "int" or (brightest.kind == "float" and brightest.largest > 1):
        raise UserError(
            f"{path} does not tell what is white (its largest value is {brightest.largest:g}); export it as 8 or 16 "
            "bit unsigned, or set data.white_level."
        )
    if brightest.kind == "float":
        return 0
    told = max((values.significant for values in deep.values() if values.significant < DEPTHS[-1]), default=0)
    used = next(bits for bits in DEPTHS if brightest.largest < 2**bits)
    white = 2 ** max(told, used) - 1
    if len(deep) < len(found):
        other = next(path for path in found if path not in deep)
        tell_once(
            f"depths {category}",
            f"{category}: {len(deep)} of {len(found)} normal images have more than 8 bits ({white} is white in "
            f"them), the others, such as {other.name}, 8 bits; check that both look alike.",
        )
    if dark := [path for path, values in deep.items() if values.bulk <= white / 16]:
        tell_once(
            f"dark {category}",
            f"{category}: {len(dark)} of {len(found)} normal images (such as {dark[0].name}) are nearly black beside "
            f"the largest value of all, {brightest.largest:g} in {path.name}; export all in one depth, or set "
            "data.white_level.",
        )
    log.info("%s: %d is white in images of more than 8 bits.", category, white)
    return white


def count_pixels(path: Path) -> int:
    """Number of pixels that a file's header tells; 0 if it cannot be read."""
    try:
        return math.prod(stored_size(path))
    except UserError:
        return 0


def stored_size(path: Path) -> Shape:
    """Height and width of what `read_image` returns, as far as a file's header tells.

    Raises:
        UserError: it cannot be read.
    """
    with _named(path), path.open("rb") as stream, Image.open(stream, formats=FORMATS) as image:
        turned = False
        with suppress(Exception):  # as in `_upright`
            # not `image.getexif()`, which decodes a PNG to look behind its pixels; of a TIFF Pillow tells the size
            # upright
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
            turned = image.format != "TIFF" and orientation in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def find_aspect(paths: Sequence[Path]) -> float:
    """The median width over height of images, by their headers; 1 where none can be read."""
    sizes = []
    for path in paths:
        with suppress(UserError):  # whoever reads them all tells all that cannot be read
            sizes.append(stored_size(path))
    return float(np.median([width / height for height, width in sizes])) if sizes else 1.0


def read_size(path: Path, reading: Reading = READING) -> Shape:
    """Height and width of what `read_image` returns.

    Raises:
        UserError: as `read_image`, but for values out of range and damage that only shows in the pixels.
    """
    with _named(path), path.open("rb") as stream, Image.open(stream, formats=FORMATS) as image:
        _check_pixels(image, path, reading)
        upright = _upright(image)
        return upright.height, upright.width


def open_upright(path: Path, reading: Reading) -> Image.Image:
    """Decode a file and rotate it, but keep its palette and alpha.

    Raises:
        UserError: as `read_image`.
    """
    with _named(path), path.open("rb") as stream:
        return _open(stream, str(path), reading)[1]


def resize_image(image: FloatImage, shape: Shape) -> FloatImage:
    """Stretch `(3, H, W)` to the height and width of `shape` with an antialiased bilinear filter; the one resize of the
    product."""
    height, width = shape
    if image.shape[1:] == shape:
        return image
    resized = np.empty((len(image), height, width), np.float32)
    for channel, out in zip(image, resized, strict=True):  # into place: a large image is not held twice
        stretched = np.asarray(Image.fromarray(channel).resize((width, height), Image.Resampling.BILINEAR))
        np.clip(stretched, 0, 1, out=out)
    return resized


def resize_mask(mask: Mask, shape: Shape) -> Mask:
    """Stretch a mask `(H, W)` to the height and width of `shape`: a pixel is set if at least half of its area was.

    If that would lose a non-empty mask altogether, any coverage counts: a faint scratch stays a labelled defect.
    """
    height, width = shape
    if mask.shape == shape:
        return mask
    coverage = np.asarray(
        Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BOX), np.float32
    )
    half = coverage >= 0.5
    return half if half.any() or not mask.any() else coverage > 0


def fitted(shape: tuple[int, ...], side: int) -> Shape:
    """Height and width of an image `(H, W)` whose longer side is brought to `side`."""
    height, width = (max(1, round(side * length / max(shape))) for length in shape)
    return height, width


def on_levels(image: FloatImage) -> FloatImage:
    """Round values in [0, 1] to the 256 levels of 8 bits, in place."""
    image *= 255
    np.rint(image, out=image)
    image /= 255
    return image


def to_uint8(image: FloatImage) -> NDArray[np.uint8]:
    """Round `(3, H, W)` in [0, 1] to `(H, W, 3)` uint8: the exact inverse of reading an 8-bit file."""
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


@contextmanager
def _named(path: Path | str) -> Iterator[None]:
    """Turn whatever a decoder raises into one sentence that names the file."""
    Image.MAX_IMAGE_PIXELS = None  # `Reading.max_pixels` decides, before anything is decoded
    # For good and for all threads: a filter that each thread set and restored would be lost to the others. Asked first,
    # since a change of filters makes Python show again what it has shown once.
    if warnings.filters[:1] != [SILENT]:
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\..*")
    try:
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


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # outside the `try`: what is wrong with the pixels must not pass
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a camera's broken EXIF block raises SyntaxError, struct.error and more; the pixels are good
        return image


def _open(stream: BinaryIO, name: str, reading: Reading) -> tuple[PixelFormat, Image.Image]:
    with Image.open(stream, formats=FORMATS) as image:
        _check_pixels(image, name, reading)
        values = read_format(image, stream, name)
        is_top_down = not (image.format == "BMP" and any(args[-1:] == (-1,) for args in decoder_arguments(image)))
        image.load()
        stream.seek(0)
        damage = find_damage(image, is_top_down, stream.read())
        if damage:
            raise UserError(f"{name} is damaged ({damage}); replace or remove it.")
        return values, _upright(image)


def _decode(stream: BinaryIO, name: str, reading: Reading) -> tuple[PixelFormat, NDArray[Any]]:
    """The file's values as they are, upright: `(H, W)` or `(H, W, 3)`; uint8 unless they are deep."""
    values, upright = _open(stream, name, reading)
    if "A" in upright.getbands() and upright.getchannel("A").getextrema() == (0, 0):
        tell_once(
            "transparent", f"{name} is transparent everywhere; the colours behind are read. Export without alpha."
        )
    if not values.is_deep:
        return values, np.asarray(upright if upright.mode == "L" else upright.convert("RGB"))
    pixels = np.asarray(upright)
    if pixels.ndim == 2:
        return values, pixels
    stream.seek(0)
    with Image.open(stream, formats=FORMATS) as image:  # Pillow gave the high bytes of 16 bits; here come the low ones
        is_gray = swap_bytes(image)
        low = np.asarray(_upright(image)).astype(np.uint16)
    deep = low[..., 0] << 8 | low[..., 1] if is_gray else pixels[..., :3].astype(np.uint16) << 8 | low[..., :3]
    return values, np.asarray(deep, np.uint16)
