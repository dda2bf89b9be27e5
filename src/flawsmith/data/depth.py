"""More than 8 bits a sample: what a file's header says of its values, and how they come to [0, 1].

Pillow reads some such files wrongly or by half. Those are put right here, or refused.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ImageFile

from flawsmith.errors import UserError, tell_once

COLOURS_OF_16_BITS = {f"{mode};16{order}" for mode in ("RGB", "RGBA", "RGBX") for order in "BLN"}


@dataclass(frozen=True)
class PixelFormat:
    """The values of one file.

    Attributes:
        mode: Pillow's name.
        bits: of a sample, by the header.
        significant: how many of them are used (sBIT of a PNG), else `bits`.
        kind: "uint", "float", or "int": signed, or of 32 bits.
        zero_is_white: the TIFF must be inverted.
        largest: the largest value; 0 where a sample has 8 bits or fewer.
        bulk: 99.9 % of the values lie at or below it; 0 where a sample has 8 bits or fewer.
    """

    mode: str
    bits: int
    significant: int
    kind: str
    zero_is_white: bool = False
    largest: float = 0.0
    bulk: float = 0.0

    @property
    def is_deep(self) -> bool:
        """Whether a sample has more than 8 bits."""
        return self.bits > 8


def read_format(image: ImageFile.ImageFile, stream: BinaryIO, name: Path | str) -> PixelFormat:
    """Read the format of an open file from its header.

    Raises:
        UserError: Pillow would misread its values, or a TIFF lacks strips.
    """
    raw = {str(args[0]) for args in decoder_arguments(image)}
    is_deep = image.mode.startswith(("I", "F")) or any(";16" in each for each in raw)
    bits, significant, kind, is_inverted = 16 if is_deep else 8, 0, "uint", False
    tags: Any = getattr(image, "tag_v2", None)
    if tags is not None:  # a TIFF
        declared, is_signed = max(tags.get(258, (1,))), max(tags.get(339, (1,))) == 2
        is_colour = declared > 8 and len(image.getbands()) > 1
        # libtiff decompresses to this machine's byte order; Pillow allows for that in unsigned 16 bits alone
        is_turned = image.mode in ("I", "F") and tags.prefix == b"MM" and image.tile[0][0] == "libtiff"
        is_misread = is_turned or (is_signed and not is_deep)
        is_misread |= is_colour and (tags.get(284, 1) == 2 or bool(raw - COLOURS_OF_16_BITS))
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
    return PixelFormat(image.mode, bits, significant or bits, kind, is_inverted)


def swap_bytes(image: ImageFile.ImageFile) -> bool:
    """Let Pillow decode the low bytes of a 16-bit file with several channels, of which it keeps the high ones alone.

    Its decoder is told the other byte order. For gray with alpha there is none: the four bytes of a pixel are read as
    RGBA instead, and True is returned.
    """
    (raw,) = {args[0] for args in decoder_arguments(image)}
    is_gray = raw == "LA;16B"
    ending = raw[-1] if raw[-1] != "N" else sys.byteorder[0].upper()
    swapped = "RGBA" if is_gray else raw[:-1] + ("L" if ending == "B" else "B")
    image.tile = [
        tile._replace(args=swapped if isinstance(tile.args, str) else (swapped, *(tile.args or ())[1:]))
        for tile in image.tile
    ]
    return bool(is_gray)


def decoder_arguments(image: ImageFile.ImageFile) -> list[tuple[Any, ...]]:
    """What Pillow's decoder is told of each part of a file; the first entry is the layout of its bytes."""
    return [tile.args if isinstance(tile.args, tuple) else (tile.args,) for tile in image.tile]


def scale_deep(pixels: NDArray[Any], values: PixelFormat, name: str, white: int) -> NDArray[np.float32]:
    """Divide values of more than 8 bits by the white level (0: the largest that the header allows), clipped to [0, 1].

    Raises:
        UserError: values are NaN, infinite or out of range, or nothing tells what is white.
    """
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
            f"{name} has values up to {high:g}. All above the white level of {top:g} count as white. Does it come from "
            "another camera? If not, set data.white_level and train again.",
        )
    elif not white and values.kind == "uint" and 0 < high <= top / 16:
        tell_once(
            "dark",
            f"{name} has no value above {high:g} of {top:g}, so it is nearly black; if its camera gives fewer bits, "
            "set data.white_level and train again.",
        )
    scaled /= np.float32(top)
    np.minimum(scaled, 1, out=scaled)
    return np.subtract(1, scaled, out=scaled) if values.zero_is_white else scaled


def _significant_bits(stream: BinaryIO) -> int:
    """How many bits of a sample the header of a PNG says are used (sBIT); 0 if it says nothing."""
    place = stream.tell()
    stream.seek(0)
    found = re.search(rb"\0\0\0[\x01-\x04]sBIT(.)", stream.read(4096).partition(b"IDAT")[0], re.DOTALL)
    stream.seek(place)
    return found[1][0] if found else 0
