"""How images look: enough to tell copies of one picture and pictures of nothing, each file decoded once.

Two files of one picture must not stand on both sides of the fit/calibration split: a detector that has seen the twin
of a calibration image finds it far too normal, and flags more honest parts than were promised. Copies are told by what
they show, not by their bytes: another format, another size, a brighter exposure of the same part are copies of it. A
mirror image or a turned one is not: whoever turns images knows it.

What was seen of a file is kept by the digest of its content, so that every stage but the first only reads the bytes.
"""

import os
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b, sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse

from flawsmith.data import damage, images, masks
from flawsmith.data.images import FloatImage, Reading, read_image, resize_image
from flawsmith.errors import UserError
from flawsmith.files import atomic_file, digest_file
from flawsmith.progress import bar

THUMB = 64  # side of what is compared, in pixels
COARSE = 2.0  # px of it; sigma of what is taken away: light and shape, which honest parts of a kind share
LEVELS = 24.0  # steps a standard deviation, in which a thumb is kept as bytes
# Distances are 1 - correlation. Of one picture in JPEG 75, with a noise of 4 of 255, of half the size or brighter by
# 15: up to .012; of a part shot again: .03. Of two pictures of textures: .1 and more. But two parts of one shape that
# lie alike are as near as .005 (screws .027), so what is near is a copy only where that is rare, or where a gap tells
# it from the rest.
NEAR = 0.03
SAME = 0.0002  # whatever the others do
RARE = 0.05  # share of images
GAP = 4.0  # ratio of the next distance to a copy's
KINDS = 10  # a category holds parts of fewer kinds than this
BLOCK = 1024  # images compared at once with all
KEPT = 64  # nearest pairs an image that are looked at
FLAT = 0.002  # deviation over brightest value; a real image of anything has more noise than this
WORKERS = 4
NAMED = 5  # files that a sentence names

Group = tuple[Path, ...]


@dataclass(frozen=True)
class Look:
    """What is kept of one image.

    Attributes:
        pixels: digest of its decoded pixels, 16 bytes.
        deviation: standard deviation of its values over their maximum; 0 where all are 0.
        thumb: (THUMB, THUMB) int8, its gray without what is coarse, in units of its deviation / LEVELS.
    """

    pixels: bytes
    deviation: float
    thumb: NDArray[np.int8]

    @property
    def is_flat(self) -> bool:
        """Whether it shows nothing: one value all over, but for less than any camera's noise."""
        return self.deviation < FLAT


def look(image: FloatImage) -> Look:
    """Look at an image `(3, H, W)` in [0, 1]."""
    brightest = float(image.max())
    thumb = resize_image(image, THUMB).mean(axis=0, dtype=np.float64)
    thumb -= ndimage.gaussian_filter(thumb, COARSE)
    thumb -= thumb.mean()
    scale = float(thumb.std())
    steps = np.clip(np.rint(thumb * (LEVELS / scale)), -127, 127) if scale > 1e-9 else np.zeros_like(thumb)
    return Look(
        blake2b(str(image.shape).encode() + np.ascontiguousarray(image).tobytes(), digest_size=16).digest(),
        float(image.std(dtype=np.float64)) / brightest if brightest > 0 else 0.0,
        steps.astype(np.int8),
    )


def look_at(paths: Sequence[Path], reading: Reading, kept: Path | None = None) -> list[Look]:
    """Look at image files in their order; what an earlier call saw of the same contents is taken from the file `kept`.

    Raises:
        UserError: files that cannot be read, all of them.
    """
    seen, bad = try_looks(paths, reading, kept)
    if bad:
        raise UserError(" ".join(list(bad.values())[:NAMED]) + _more(len(bad), "cannot be read either."))
    return [seen[path] for path in paths]


def try_looks(
    paths: Sequence[Path], reading: Reading, kept: Path | None = None
) -> tuple[dict[Path, Look], dict[Path, str]]:
    """As `look_at`: the looks of what can be read, and for what cannot the sentence that says why."""
    known = _load(kept)
    looks: dict[Path, Look] = {}
    bad: dict[Path, str] = {}
    fresh = False

    def one(path: Path) -> tuple[str, Look | None, str]:
        digest = ""
        try:
            digest = digest_file(path) + f":{reading.max_pixels}:{reading.white_level}"
            return digest, known.get(digest) or look(read_image(path, reading)), ""
        except OSError as error:
            return (
                digest,
                None,
                f"{path} cannot be read ({error.strerror or error}); mend or remove it.",
            )
        except UserError as error:
            return digest, None, str(error)

    with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
        found = pool.map(one, paths)
        for path, (digest, seen, sentence) in zip(
            paths, bar(found, "looking at images", len(paths), unit="image", leave=False), strict=True
        ):
            if seen is None:
                bad[path] = sentence
            else:
                fresh |= digest not in known
                looks[path] = known[digest] = seen
    if kept is not None and fresh:
        _save(kept, known)
    return looks, bad


def find_copies(paths: Sequence[Path], looks: Sequence[Look]) -> list[Group]:
    """Groups of two or more paths that show the same picture, each in the order of `paths`."""
    if not looks:
        return []
    first: dict[bytes, int] = {}
    same = [(first.setdefault(one.pixels, place), place) for place, one in enumerate(looks)]
    labels = _connected([*same, *near_pairs(np.stack([one.thumb for one in looks]))], len(looks))
    groups: dict[int, list[Path]] = {}
    for path, label in zip(paths, labels, strict=True):
        groups.setdefault(label, []).append(path)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _connected(pairs: Sequence[tuple[int, int]], count: int) -> list[int]:
    """Of `count` places the number of the group that pairs join it to."""
    rows, columns = np.asarray(pairs, np.intp).reshape(-1, 2).T
    graph = sparse.coo_array((np.ones(len(rows)), (rows, columns)), (count, count))
    return [int(label) for label in sparse.csgraph.connected_components(graph, directed=False)[1]]


def near_pairs(thumbs: NDArray[np.generic]) -> list[tuple[int, int]]:
    """Pairs of thumbs (N, h, w) that are too near for two pictures, flat ones left out."""
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
    count = copies_among(distances, pairs, len(unit))
    return [(int(places[one]), int(places[other])) for one, other in pairs[:count]]


def copies_among(distances: NDArray[np.float32], pairs: NDArray[np.intp], images: int) -> int:
    """How many of the nearest `pairs` (P, 2), in the order of their `distances` (P,), are copies."""
    near = int(np.searchsorted(distances, NEAR, side="right"))
    if len(np.unique(pairs[:near])) <= RARE * images:
        return near
    beyond = GAP * NEAR if len(distances) < KEPT * images else distances[-1]
    bounded = np.maximum(np.append(distances, beyond), SAME)
    gaps = np.flatnonzero(bounded[1:] >= GAP * bounded[:-1]) + 1
    for count in gaps[gaps <= near][::-1]:
        # else it is parts of a few kinds that the gap tells apart
        if 2 * count <= images or len(set(_connected(pairs[:count].tolist(), images))) >= KINDS:
            return int(count)
    return int(np.searchsorted(distances, SAME, side="right"))


def copies_sentence(groups: Sequence[Group]) -> str:
    """Which files show the same, and what is done about it."""
    named = "; ".join(_named(group, " = ") for group in groups[:NAMED]) + _more(len(groups), "group(s)")
    return (
        f"{sum(map(len, groups))} images show only {len(groups)} pictures ({named}): copies stay on one side of the "
        "fit/calibration split and count once for the threshold; remove all but one of each to be rid of this notice."
    )


def flat_sentence(paths: Sequence[Path]) -> str:
    """Which files show nothing, and the remedy."""
    return (
        f"{paths[0].parent}: {len(paths)} image(s) show one value all over ({_named(paths, ', ')}), as a covered or "
        "overexposed camera gives; remove them, or correct the exposure."
    )


def _named(paths: Sequence[Path], joint: str) -> str:
    return joint.join(path.name for path in paths[:NAMED]) + _more(len(paths))


def _more(count: int, what: str = "") -> str:
    return f" and {count - NAMED} more {what}".rstrip() if count > NAMED else ""


@cache
def source_digest() -> str:
    """Digest of the code that reads images: what older code saw is seen anew."""
    sources = (Path(__file__), Path(damage.__file__), Path(images.__file__), Path(masks.__file__))
    return sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def _load(kept: Path | None) -> dict[str, Look]:
    """What is kept; nothing where it is not there, older than the code, or damaged: it can all be seen again."""
    if kept is None or not kept.is_file():
        return {}
    try:
        with np.load(kept, allow_pickle=False) as content:
            if str(content["maker"]) != source_digest():
                return {}
            kept_of = (content[name] for name in ("pixels", "deviations", "thumbs"))
            rows = zip(content["digests"].tolist(), *kept_of, strict=True)
            return {
                digest: Look(pixels.tobytes(), float(deviation), thumb) for digest, pixels, deviation, thumb in rows
            }
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        return {}


def _save(kept: Path, known: dict[str, Look]) -> None:
    looks = list(known.values())
    try:
        with atomic_file(kept) as temporary, temporary.open("wb") as stream:
            np.savez(
                stream,
                maker=np.array(source_digest()),
                digests=np.array(list(known)),
                pixels=np.frombuffer(b"".join(one.pixels for one in looks), np.uint8).reshape(len(looks), -1),
                deviations=np.array([one.deviation for one in looks]),
                thumbs=np.stack([one.thumb for one in looks]),
            )
    except (OSError, UserError):
        pass  # it saves time and decides nothing: where it cannot be written, images are looked at again
