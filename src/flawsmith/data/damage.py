"""Damaged files that decode all the same: a transfer cut them or overwrote a part. That is no defect of the surface.

Decoders fill what is missing and say so in warnings that Pillow drops. Only damage beyond doubt is reported: an image
that could be honest (a border of one colour, a part on an even background) passes.
"""

import io
import re
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PROBES = (b"\x5a\x96\x3c\xa5", b"\xa5\x69\xc3\x5a")  # put in the place of a JPEG's last data
PADDING = 512  # bytes of one value that a camera may put behind a scan
_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")


def find_damage(image: Image.Image, is_top_down: bool, content: bytes) -> str:
    """Say what is wrong with a decoded file (not rotated yet); "" if nothing is found.

    Args:
        image: as Pillow decoded it from `content`.
        is_top_down: whether the file's first row is the image's first.
        content: the bytes of the file.
    """
    pixels = np.asarray(image)
    if content.startswith(b"\xff\xd8"):
        return _jpeg_damage(content, pixels)
    if content.startswith(b"\x89PNG") and not _sums_agree(content):
        return "its data are not those that were written"
    rows = np.ascontiguousarray(pixels if is_top_down else pixels[::-1])
    return "its end was never written" if is_unwritten(rows.reshape(len(rows), -1).view(np.uint8)) else ""


def is_unwritten(rows: NDArray[np.uint8]) -> bool:
    """Whether the bytes of an image `(H, bytes a row)` end in the middle of a row, with one value in all that follow.

    An honest border begins with a whole row, and an object ends gradually. Here a row stops short, and neither it nor
    the row above held the value before.
    """
    height, width = rows.shape
    value = rows[-1, -1]
    tail = 0
    while tail < height and (rows[height - 1 - tail] == value).all():
        tail += 1
    if not max(2, height // 64) <= tail < height - 1:
        return False
    row, above = rows[height - 1 - tail] == value, rows[height - 2 - tail] == value
    written = width - int(np.argmin(row[::-1]))
    return bool(
        16 <= written <= width - 16
        and row[:written].mean() < 0.02
        and above.mean() < 0.02
        and rows[max(0, height - 10 - tail) : height - 1 - tail].max() > rows[max(0, height - 10 - tail)].min()
    )


def _sums_agree(content: bytes) -> bool:
    """Whether the checksums of a PNG's pixels are right; Pillow looks at those of other chunks alone."""
    place = 8
    while place + 12 <= len(content):
        end = place + 8 + int.from_bytes(content[place : place + 4], "big")
        stored = int.from_bytes(content[end : end + 4], "big")
        if content[place + 4 : place + 8] == b"IDAT" and zlib.crc32(content[place + 4 : end]) != stored:
            return False
        place = end + 4
    return True


def _jpeg_damage(content: bytes, pixels: NDArray[Any]) -> str:
    """Say whether the coded data of a JPEG end before or after its pixels do; a hole in the data causes that too.

    Data are whole if adding to them changes no pixel, and changing their end does.
    """
    scans = _scans(content)
    if not scans:
        return ""
    longer = bytearray(content)
    for _, end in reversed(scans):
        longer[end:end] = PROBES[0] * 16
    if _differ(bytes(longer), pixels):
        return "its data end before its last pixel"
    begin, end = scans[-1]
    if len(scans) == 1 and bytes(32) in content[begin:end] and _zeros_mean_nothing(content[:begin]):
        return "its data have a hole"
    if len(scans) > 1 or (pixels[-8:, -8:] == 128).all():
        return ""  # a later scan may change nothing that is seen, nor do missing blocks, which decode to this gray
    rest = content[begin:end]
    padding = len(rest) - len(rest.rstrip(rest[-1:]))
    kept = content[: end - (padding if padding <= PADDING else 0) - len(PROBES[0])]
    if len(kept) <= begin or any(_differ(kept + probe + b"\xff\xd9", pixels) for probe in (b"", *PROBES)):
        return ""
    return "its data do not end with its last pixel"


def _zeros_mean_nothing(head: bytes) -> bool:
    """Whether a long run of zeros cannot be data: a Huffman table of the file reads it as block after block of 63
    equal coefficients. (Where zero bits end a block at once, they are an even area.)"""
    tables = head.split(b"\xff\xc4")[1:]
    for table in tables:
        length, place = int.from_bytes(table[:2], "big"), 2
        while place + 17 < length:
            if table[place] >> 4 and table[place + 17]:
                return True
            place += 17 + sum(table[place + 1 : place + 17])
    return False


def _differ(content: bytes, pixels: NDArray[Any]) -> bool:
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            return not np.array_equal(np.asarray(image), pixels)
    except Exception:  # data that we made and no decoder takes
        return True


def _scans(content: bytes) -> list[tuple[int, int]]:
    """First and last byte of the coded data of each scan of the first image in a JPEG file."""
    found, place = [], 2
    while place + 4 <= len(content) and content[place] == 0xFF and content[place + 1] != 0xD9:
        if content[place + 1] == 0xFF:
            place += 1
            continue
        is_scan = content[place + 1] == 0xDA
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        if is_scan:
            match = _MARKER.search(content, place)
            found.append((place, match.start() if match else len(content)))
            place = found[-1][1]
    return found
