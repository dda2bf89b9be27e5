"""The one door for pixels from outside: decoding, EXIF rotation, bit depth, size limits, resizing, lossless writing.

A float image is RGB, `(3, H, W)`, float32 in [0, 1]; a mask is `(H, W)` bool. No torch here: inference imports this.
"""

import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy import ndimage

from flawsmith.errors import UserError
from flawsmith.files import atomic_file

FloatImage = NDArray[np.float32]  # (3, H, W) in [0, 1]
Mask = NDArray[np.bool_]  # (H, W)

FORMATS = ("PNG", "JPEG", "BMP", "TIFF")  # by content: Pillow would hand a posted EPS to Ghostscript
PNG_LEVEL = 1  # of zlib's 9: a third of level 6's time for 6-17 % larger files; PNGs were 40 % of synthesis's time
MAX_PIXELS = 100_000_000  # a decompression bomb is refused before its pixels are decoded


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> FloatImage:
    """Decode one image file to RGB `(3, H, W)` float32 in [0, 1].

    Gray is repeated to three channels, alpha is dropped, EXIF rotation is applied, 16-bit values are divided by 65535
    and float TIFFs must already lie in [0, 1]. Of an animation the first frame counts.

    Raises:
        UserError: the file is missing, empty, truncated, no image, larger than `max_pixels`, or holds NaN.
    """
    # a stream, not a path: given a path, Pillow maps gray TIFFs into memory and then misreads the rotated ones
    with _named(path), path.open("rb") as stream:
        return decode_image(stream, str(path), max_pixels)


def decode_image(stream: BinaryIO, name: str, max_pixels: int = MAX_PIXELS) -> FloatImage:
    """As `read_image`, of an open file or bytes in memory; `name` stands for it in errors.

    Raises:
        UserError: as `read_image`.
    """
    with _named(name), Image.open(stream, formats=FORMATS) as image:
        _check_pixels(image, name, max_pixels)
        upright = _upright(image)
        if upright.mode.startswith(("I", "F")):  # one channel of more than 8 bits: convert("RGB") would clip it
            pixels = np.repeat(_scale_deep(np.asarray(upright), name)[..., None], 3, axis=2)
        else:
            pixels = np.asarray(upright.convert("RGB"), np.float32) / np.float32(255)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def count_pixels(path: Path) -> int:
    """How many pixels a file says it has, from its header alone; 0 if that cannot be read."""
    try:
        with _named(path), path.open("rb") as stream, Image.open(stream, formats=FORMATS) as image:
            return int(image.width * image.height)
    except UserError:
        return 0


def read_mask(path: Path, max_pixels: int = MAX_PIXELS) -> Mask:
    """Decode a ground-truth mask to `(H, W)` bool: a pixel belongs to the defect if it is above half of full scale.

    MVTec AD masks are {0, 255}; resampled ones have soft edges, hence the half. A mask whose largest value is 1 is
    taken as {0, 1}.

    Raises:
        UserError: as `read_image`.
    """
    gray = read_image(path, max_pixels).max(axis=0)  # a colour mask marks a defect in any channel
    if 0 < gray.max() <= 1.5 / 255:
        return gray > 0
    return gray > 0.5


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


def read_size(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width of what `read_image` answers, without its floats.

    Raises:
        UserError: as `read_image`, but for values out of range.
    """
    with _named(path), path.open("rb") as stream, Image.open(stream, formats=FORMATS) as image:
        _check_pixels(image, path, max_pixels)
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
    """Which of Pillow's warnings are errors, and which say nothing, while any thread decodes.

    Python's filters belong to the process: threads that set and restored them each for itself would leave them wrong.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._outer: warnings.catch_warnings[None] | None = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._outer = warnings.catch_warnings()
                self._outer.__enter__()
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\..*")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._outer is not None:
                self._outer.__exit__(None, None, None)


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
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path} is too large to decode safely ({error}); crop or tile it first.") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError and more
        reason = re.sub(r"<_io\.[^>]*>", "the file", str(error)).replace(str(path), "the file") or type(error).__name__
        raise UserError(f"{path} cannot be read as an image ({reason}); replace or remove it.") from error


def _check_pixels(image: Image.Image, path: Path | str, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise UserError(
            f"{path} has {image.width} x {image.height} pixels, over the limit of {max_pixels:,}; "
            "crop or tile it first."
        )


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # outside the `try`: what is wrong with the pixels must not pass
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a camera's broken EXIF block raises SyntaxError, struct.error and more; the pixels are good
        return image


def _scale_deep(pixels: NDArray[np.generic], path: str) -> FloatImage:
    """16-bit integers and floats to [0, 1]."""
    values = np.asarray(pixels, np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"{path} holds NaN or infinite pixels; export it again.")
    if np.issubdtype(pixels.dtype, np.integer):
        values = values / np.float32(65535)
    if values.min() < 0 or values.max() > 1:
        raise UserError(f"{path} has values outside its range; export it as 8 or 16 bit, or as floats in [0, 1].")
    return values
