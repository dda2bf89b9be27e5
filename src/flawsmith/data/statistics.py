"""Image statistics: enough of every image to find copies of one picture and pictures of nothing.

Two files of one picture must not stand on both sides of the fit/calibration split: a detector that has seen the twin
of a calibration image finds it far too normal, and flags more honest parts than were promised. Copies are found by what
they show, not by their bytes: another format, another size, a brighter exposure of the same part are copies of it. A
mirrored or rotated image is none: whoever augments by hand knows it.

Statistics are kept in a file by the digest of each image's content, so that every stage but the first only reads bytes.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b, sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse

from flawsmith.data.images import FloatImage, Reading, read_image, resize_image
from flawsmith.errors import UserError
from flawsmith.files import atomic_file, digest_file
from flawsmith.progress import bar

THUMB = 64  # side of what is compared, in pixels
COARSE = 2.0  # px of the thumb; sigma of what is subtracted: light and shape, which honest parts of a kind share
LEVELS = 24.0  # steps a standard deviation in which a thumb is kept as bytes
# Distances are 1 - correlation. One picture in JPEG 75, with a noise of 4 of 255, at half the size or brighter by 15
# is within .012; a part shot again within .03; two pictures of textures are .1 apart and more. But two parts of one
# shape that lie alike are as near as .005 (screws .027). So a near pair is a copy only where near pairs are rare, or
# where a gap separates them from the rest.
NEAR = 0.03
SAME = 0.0002  # a copy, whatever the other distances are
RARE = 0.05  # share of images
GAP = 4.0  # ratio of the next distance to a copy's
KINDS = 10  # a category holds parts of fewer kinds than this
BLOCK = 1024  # images compared at once with all
KEPT = 64  # nearest pairs an image that are considered
FLAT = 0.002  # deviation over brightest value; a real image of anything has more noise than this
WORKERS = 4
NAMED = 5  # files that a sentence names

ROW = [("maker", "U64"), ("file", "U128"), ("pixels", "U32"), ("deviation", "f8"), ("thumb", "i1", (THUMB, THUMB))]
Group = tuple[Path, ...]


@dataclass(frozen=True)
class ImageStatistics:
    """What is kept of one image.

    Attributes:
        pixels: digest of its decoded pixels, 32 hex digits.
        deviation: standard deviation of its values over their maximum; 0 where all are 0.
        thumb: (THUMB, THUMB) int8, its gray without what is coarse, in units of its deviation / LEVELS.
    """

    pixels: str
    deviation: float
    thumb: NDArray[np.int8]

    @property
    def is_flat(self) -> bool:
        """Whether it shows nothing: one value all over, but for less than any camera's noise."""
        return self.deviation < FLAT

    @classmethod
    def of(cls, image: FloatImage) -> "ImageStatistics":
        """Measure an image `(3, H, W)` in [0, 1]."""
        brightest = float(image.max())
        thumb = resize_image(image, (THUMB, THUMB)).mean(axis=0, dtype=np.float64)
        thumb -= ndimage.gaussian_filter(thumb, COARSE)
        thumb -= thumb.mean()
        scale = float(thumb.std())
        steps = np.clip(np.rint(thumb * (LEVELS / scale)), -127, 127) if scale > 1e-9 else np.zeros_like(thumb)
        return cls(
            blake2b(str(image.shape).encode() + np.ascontiguousarray(image).tobytes(), digest_size=16).hexdigest(),
            float(image.std(dtype=np.float64)) / brightest if brightest > 0 else 0.0,
            steps.astype(np.int8),
        )


def read_statistics(paths: Sequence[Path], reading: Reading, kept: Path | None = None) -> list[ImageStatistics]:
    """Measure image files in their order; those whose contents an earlier call has measured come from the file `kept`.

    Raises:
        UserError: it names the files that cannot be read.
    """
    found, bad = try_statistics(paths, reading, kept)
    if bad:
        raise UserError(" ".join(list(bad.values())[:NAMED]) + _more(len(bad), "cannot be read either."))
    return [found[path] for path in paths]


def try_statistics(
    paths: Sequence[Path], reading: Reading, kept: Path | None = None
) -> tuple[dict[Path, ImageStatistics], dict[Path, str]]:
    """As `read_statistics`: path → statistics of what can be read, path → the sentence that says why of what cannot."""
    known = _load(kept)
    before = len(known)

    def measure(path: Path) -> tuple[str, ImageStatistics | str]:
        try:
            digest = f"{digest_file(path)}:{reading.max_pixels}:{reading.white_level}"
            return digest, known.get(digest) or ImageStatistics.of(read_image(path, reading))
        except OSError as error:
            return "", f"{path} cannot be read ({error.strerror or error}); mend or remove it."
        except UserError as error:
            return "", str(error)

    found: dict[Path, ImageStatistics] = {}
    bad: dict[Path, str] = {}
    with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
        measured = bar(pool.map(measure, paths), "looking at images", len(paths), unit="image", leave=False)
        for path, (digest, answer) in zip(paths, measured, strict=True):
            if isinstance(answer, str):
                bad[path] = answer
            else:
                found[path] = known[digest] = answer
    if kept is not None and len(known) > before:
        _save(kept, known)
    return found, bad


def find_copies(paths: Sequence[Path], statistics: Sequence[ImageStatistics]) -> list[Group]:
    """Group paths that show the same picture: two or more a group, each in the order of `paths`."""
    if not statistics:
        return []
    first: dict[str, int] = {}
    same = [(first.setdefault(one.pixels, place), place) for place, one in enumerate(statistics)]
    labels = _connected([*same, *_near_pairs(np.stack([one.thumb for one in statistics]))], len(statistics))
    groups: dict[int, list[Path]] = {}
    for path, label in zip(paths, labels, strict=True):
        groups.setdefault(label, []).append(path)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def copies_sentence(groups: Sequence[Group]) -> str:
    """Say which files show the same, and what is done about it."""
    named = "; ".join(_named(group, " = ") for group in groups[:NAMED]) + _more(len(groups), "group(s)")
    found = f"{sum(map(len, groups))} images show only {len(groups)} different picture(s) ({named})"
    return (
        f"{found}: copies stay on one side of the fit/calibration split and count once for the threshold; remove all "
        "but one of each to silence this warning."
    )


def flat_sentence(paths: Sequence[Path]) -> str:
    """Say which files show nothing, and the remedy."""
    return (
        f"{paths[0].parent}: {len(paths)} image(s) show one value all over ({_named(paths, ', ')}), as a covered or "
        "overexposed camera gives; remove them, or correct the exposure."
    )


@cache
def source_digest() -> str:
    """SHA-256 of the code that reads images: what older code has measured is measured anew."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def _connected(pairs: Sequence[tuple[int, int]], count: int) -> list[int]:
    """For each of `count` places the number of the group that pairs join it to."""
    rows, columns = np.asarray(pairs, np.intp).reshape(-1, 2).T
    graph = sparse.coo_array((np.ones(len(rows)), (rows, columns)), (count, count))
    return [int(label) for label in sparse.csgraph.connected_components(graph, directed=False)[1]]


def _near_pairs(thumbs: NDArray[np.int8]) -> list[tuple[int, int]]:
    """Pairs of thumbs (N, h, w) that are too near for two pictures; flat ones have no pairs."""
    flat = thumbs.reshape(len(thumbs), -1).astype(np.float32)
    norms = np.linalg.norm(flat, axis=1)
    places = np.flatnonzero(norms > 0)
    unit = flat[places] / norms[places, None]
    pairs, distances = np.empty((0, 2), np.intp), np.empty(0, np.float32)
    for start in range(0, len(unit), BLOCK):
        found = 1 - unit[start : start + BLOCK] @ unit.T
        found[np.tril_indices(len(found), start, len(unit))] = np.inf  # itself, and pairs that were seen before
        rows, columns = np.nonzero(found <= GAP * NEAR)
        pairs = np.concatenate([pairs, np.stack([rows + start, columns], axis=1)])
        distances = np.concatenate([distances, found[rows, columns]])
        order = np.argsort(distances, kind="stable")[: KEPT * len(unit)]
        pairs, distances = pairs[order], distances[order]
    count = _count_copies(distances, pairs, len(unit))
    return [(int(places[one]), int(places[other])) for one, other in pairs[:count]]


def _count_copies(distances: NDArray[np.float32], pairs: NDArray[np.intp], images: int) -> int:
    """How many of the `pairs` (P, 2) of places, nearest first by their `distances` (P,), are copies."""
    near = int(np.searchsorted(distances, NEAR, side="right"))
    if len(np.unique(pairs[:near])) <= RARE * images:
        return near
    beyond = GAP * NEAR if len(distances) < KEPT * images else distances[-1]
    bounded = np.maximum(np.append(distances, beyond), SAME)
    gaps = np.flatnonzero(bounded[1:] >= GAP * bounded[:-1]) + 1
    for count in gaps[gaps <= near][::-1]:
        # else the gap separates parts of a few kinds, not copies
        if 2 * count <= images or len(set(_connected(pairs[:count].tolist(), images))) >= KINDS:
            return int(count)
    return int(np.searchsorted(distances, SAME, side="right"))


def _named(paths: Sequence[Path], joint: str) -> str:
    return joint.join(path.name for path in paths[:NAMED]) + _more(len(paths))


def _more(count: int, what: str = "") -> str:
    return f" and {count - NAMED} more {what}".rstrip() if count > NAMED else ""


def _load(kept: Path | None) -> dict[str, ImageStatistics]:
    """What is kept; nothing where it is not there, older than the code, or damaged: all can be measured again."""
    if kept is None or not kept.is_file():
        return {}
    try:
        rows = [row for row in np.load(kept, allow_pickle=False) if row["maker"] == source_digest()]
        return {
            str(row["file"]): ImageStatistics(str(row["pixels"]), float(row["deviation"]), row["thumb"]) for row in rows
        }
    except (OSError, ValueError, IndexError, EOFError, TypeError):
        return {}


def _save(kept: Path, known: dict[str, ImageStatistics]) -> None:
    rows = [(source_digest(), file, one.pixels, one.deviation, one.thumb) for file, one in known.items()]
    try:
        with atomic_file(kept) as temporary, temporary.open("wb") as stream:
            np.save(stream, np.array(rows, ROW), allow_pickle=False)
    except (OSError, UserError):
        pass  # it saves time and decides nothing: where it cannot be written, images are measured again
