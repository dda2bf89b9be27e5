"""A category folder in MVTec AD layout: what lies where, and which normal image is used for what.

    <category>/train/good/**           normal images: split into fit (trains everything) and calibration (never trains)
    <category>/test/good/**            optional; normal images of the labelled test set
    <category>/test/<defect>/**        optional; defective images
    <category>/ground_truth/<defect>/**/<stem>_mask.png  optional; an image without a mask has a verdict alone

It is also decided here whether models see whole images or tiles (`plan_tiles`).

Nothing is learned from `test`: only `labelled_test` opens it, for those who judge finished models (`evaluate`,
`promote`, study and bench). `labelled_part` halves the test set by a fixed rule: a research half to look at as often
as one likes, and a report half for final figures alone.
"""

import hashlib
import logging
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from flawsmith.data.config import DataSettings
from flawsmith.data.images import (
    READING,
    FloatImage,
    Mask,
    Reading,
    Shape,
    read_image,
    read_size,
    resize_image,
    stored_size,
    to_uint8,
)
from flawsmith.data.masks import load_mask
from flawsmith.data.tiling import Place, Tiling
from flawsmith.data.walk import SUFFIXES, Found, find, listed
from flawsmith.errors import UserError, tell_once
from flawsmith.sequences import evenly

GOOD = "good"
GOOD_NAMES = {GOOD, "ok", "okay", "normal", "pass"}  # folders of `test`, in any case
MASK_WORDS = ("_mask", "", "_label", "_gt", "-mask", "_groundtruth", "_ground_truth", "_seg")  # behind an image's stem
PARTS = ("all", "research", "report")
MIN_FIT_IMAGES = 8  # fewer show no surface, only themselves; the README recommends 30
GOLDEN_RATIO = 0.6180339887498949  # multiples of it, modulo 1, fill [0, 1) evenly however many there are
MIN_CALIBRATION_IMAGES = 2  # of one there is no deviation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """The two parts of `train/good`: `fit` trains, `calibration` sets normalisation and threshold.

    Attributes:
        fit, calibration: paths. Copies of one picture are all in `fit`, or the first of them alone is in `calibration`.
        copies: groups of files that show one picture, each in the order of the split.
    """

    fit: tuple[Path, ...]
    calibration: tuple[Path, ...]
    copies: tuple[tuple[Path, ...], ...] = ()

    @property
    def twins(self) -> dict[str, str]:
        """For each file that has copies: its name → the name of the first of them."""
        return {normal_name(path): normal_name(group[0]) for group in self.copies for path in group}

    def fit_without(self, names: Iterable[str]) -> list[Path]:
        """The fit images without those of the given names, and without copies of those."""
        twins = self.twins
        left_out = {twins.get(name, name) for name in names}
        return [path for path in self.fit if twins.get(name := normal_name(path), name) not in left_out]


@dataclass(frozen=True)
class LabelledImage:
    """One test image.

    Attributes:
        path: its file.
        defect: its type, the name of its folder in `test`; "good" for a normal image, whatever the folder is called.
        mask_path: None for a normal image, and where nobody drew a mask.
        inside: the folders between that of its type and the file, with forward slashes; empty if there are none.
        folder: the folder of its type as it is called on disk (`OK` for good ones).
    """

    path: Path
    defect: str
    mask_path: Path | None
    inside: str = ""
    folder: str = ""

    @property
    def shown_name(self) -> str:
        """Its path below `test`."""
        return f"{self.folder or self.defect}/{self.name}"

    @property
    def has_pixel_labels(self) -> bool:
        """Whether the truth of every pixel is known."""
        return not self.is_defective or self.mask_path is not None

    @property
    def name(self) -> str:
        """Its path below the folder of its type."""
        return f"{self.inside}/{self.path.name}" if self.inside else self.path.name

    @property
    def is_defective(self) -> bool:
        """Whether it shows a defect."""
        return self.defect != GOOD


@dataclass(frozen=True)
class Dataset:
    """A category on disk. Nothing is read before a method asks for it."""

    folder: Path

    @property
    def category(self) -> str:
        """The name of the folder."""
        return self.folder.name

    def find_normals(self) -> Found:
        """Find the images of `train/good`.

        Raises:
            UserError: the folder is missing, holds no image, or cannot be read as a whole.
        """
        found = find(self.folder / "train" / GOOD)
        found.check()
        if not found.images:
            raise UserError(
                f"{found.folder} holds no image ({', '.join(SUFFIXES)}): {found}; put the defect-free images of "
                f"'{self.category}' there, or correct `categories` in params.yaml."
            )
        return found

    def normals(self) -> tuple[Path, ...]:
        """All images of `train/good`, sorted by name; raises as `find_normals`."""
        return self.find_normals().images

    def find_test(self) -> Found:
        """Find the images of `test`, which may be missing. For those who judge finished models alone.

        Raises:
            UserError: a part of it cannot be read, or an image lies in no type's folder.
        """
        found = find(self.folder / "test")
        found.check()
        if stray := [path for path in found.images if path.parent == found.folder]:
            raise UserError(
                f"{stray[0]} lies in no folder of a type ({len(stray)} such in all); move it to test/{GOOD} or "
                "test/<defect>."
            )
        return found

    def split(self, calibration_fraction: float, seed: int, copies: Sequence[Sequence[Path]] = ()) -> Split:
        """Split the normal images by a hash of their `normal_name`, so that adding an image moves at most one other.

        Args:
            calibration_fraction: share of the pictures that calibrate.
            seed: of the hash.
            copies: groups of paths that show one picture (`statistics.find_copies`).

        Raises:
            UserError: too few images for both parts.
        """
        found = self.find_normals()
        normals = found.images
        ranked = sorted(normals, key=lambda path: split_rank(path, seed))
        rank = {path: place for place, path in enumerate(ranked)}
        groups = tuple(tuple(sorted(group, key=rank.__getitem__)) for group in copies)
        repeated = {path for group in groups for path in group[1:]}
        pictures = [path for path in ranked if path not in repeated]
        count = max(MIN_CALIBRATION_IMAGES, round(len(pictures) * calibration_fraction))
        if len(pictures) - count < MIN_FIT_IMAGES:
            least = MIN_FIT_IMAGES + MIN_CALIBRATION_IMAGES
            lacking = least - len(pictures)
            remedy = f"add {lacking} or more" if lacking > 0 else "lower data.calibration_fraction, or add some"
            shown = f" of {len(pictures)} different pictures" if repeated else ""
            raise UserError(
                f"{found.folder} holds {len(ranked)} image(s){shown}, too few to learn from "
                f"({MIN_FIT_IMAGES} at least) and to calibrate on ({MIN_CALIBRATION_IMAGES}); {remedy} "
                "(30 or more normal images are recommended)."
            )
        calibration = set(pictures[:count])
        kept_out = calibration.union(*(group for group in groups if group[0] in calibration))
        return Split(
            fit=tuple(path for path in normals if path not in kept_out),
            calibration=tuple(path for path in normals if path in calibration),
            copies=groups,
        )

    def labelled_test(self) -> tuple[LabelledImage, ...]:
        """The labelled test set, or an empty tuple if there is none. For those who judge finished models alone.

        Raises:
            UserError: `test` holds only one of good and defective images, or masks that belong to none of its images.
        """
        test = self.find_test()
        found: list[LabelledImage] = []
        for path in test.images:
            folder, *folders, _ = test.name_of(path).split("/")
            defect = GOOD if folder.casefold() in GOOD_NAMES else folder
            found.append(LabelledImage(path, defect, None, "/".join(folders), folder))
        if found and len({item.is_defective for item in found}) < 2:
            missing = f"test/{GOOD}" if found[0].is_defective else "test/<defect>"
            raise UserError(
                f"{self.folder} has a labelled test set without any image in {missing}; a score needs good and "
                "defective images: add them, or remove the folder `test`."
            )
        return self._with_masks(found)

    def _with_masks(self, images: Sequence[LabelledImage]) -> tuple[LabelledImage, ...]:
        """Give each image its mask, if there is one.

        A mask has the image's stem with one of MASK_WORDS behind it, in any case. It lies in the same folder of
        `ground_truth`, or in that of the type if no other image of the type has this stem.
        """
        drawn = find(self.folder / "ground_truth")
        drawn.check()
        if drawn.passed_over:
            tell_once(
                f"masks passed over {self.category}", f"{drawn.folder}: {drawn}; a mask is one of {listed(SUFFIXES)}."
            )
        masks: dict[str, Path] = {}
        for mask in drawn.images:
            place = PurePosixPath(drawn.name_of(mask).casefold())
            if place.parts[0] not in GOOD_NAMES:
                masks.setdefault(str(place.with_suffix("")), mask)
        stems = [PurePosixPath(item.shown_name.casefold()).with_suffix("") for item in images]
        tops = [PurePosixPath(stem.parts[0], stem.name) for stem in stems]
        counted = Counter(tops)
        found, used = [], set()
        for item, stem, top in zip(images, stems, tops, strict=True):
            places = (stem, top) if counted[top] == 1 else (stem,)
            keys = (f"{place}{word}" for place in places if item.is_defective for word in MASK_WORDS)
            key = next((key for key in keys if key in masks), "")
            found.append(replace(item, mask_path=masks.get(key)))
            used.add(key)
        foreign = [path for key, path in masks.items() if key not in used]
        if foreign:
            sentence = (
                f"{foreign[0]} is the mask of no image in test ({len(foreign)} such in all); a mask lies in the folder "
                "of its image's type and is named like it, as ground_truth/scratch/001_mask.png is for "
                "test/scratch/001.jpg."
            )
            if len(foreign) == len(masks):
                raise UserError(sentence)
            tell_once(f"foreign masks {self.category}", sentence)
        return tuple(found)


def normal_name(path: Path) -> str:
    """The name that no other normal image of the category has: its path below `train/good`, or its file name where it
    lies in no such folder."""
    parts = path.parts
    ends = [place for place in range(2, len(parts)) if parts[place - 2 : place] == ("train", GOOD)]
    return "/".join(parts[ends[0] :]) if ends else path.name


def split_rank(path: Path, seed: int) -> bytes:
    """What the split sorts a normal image by: the lowest ones calibrate."""
    return hashlib.sha256(os.fsencode(f"{seed}/{normal_name(path)}")).digest()


def labelled_part(images: Sequence[LabelledImage], part: str) -> tuple[LabelledImage, ...]:
    """One of PARTS of a labelled test set, in the order given.

    Each type (good and each defect) is halved for itself: its images, sorted by the SHA-256 of "<type>/<name without
    suffix>", go to research and report by turns. A single image goes to research.
    """
    if part not in PARTS:
        raise ValueError(f"part is {part!r}, not one of {PARTS}")
    if part == "all":
        return tuple(images)
    by_type: dict[str, list[LabelledImage]] = {}
    for image in images:
        by_type.setdefault(image.defect, []).append(image)
    kept: set[Path] = set()
    for members in by_type.values():
        ranked = sorted(members, key=lambda image: (_rank(image), image.name))  # the name decides between equal stems
        kept |= {image.path for image in ranked[PARTS.index(part) - 1 :: 2]}
    return tuple(image for image in images if image.path in kept)


def _rank(image: LabelledImage) -> bytes:
    name = image.name.removesuffix(image.path.suffix)
    return hashlib.sha256(os.fsencode(f"{image.defect}/{name}")).digest()


@dataclass(frozen=True)
class Tile:
    """What a model sees of an image at once: all of it, resized (`place` is None), or a tile.

    `place` is the tile's top and left in pixels at working resolution (`tiling.Tiling`).
    """

    path: Path
    place: Place | None = None


def plan_tiles(paths: Sequence[Path], data: DataSettings) -> tuple[Tile, ...]:
    """Choose what training sees of images, in their order: each image once, or with `data.scale` up to
    `data.max_tiles` tiles.

    Where there are more tiles, each image gives equally many, as far as it has them. They are evenly spaced over the
    image and shifted from image to image, so that together they show all parts. Images are decoded for their size.

    Raises:
        UserError: an image cannot be read.
    """
    tiling = Tiling.of(data)
    if not tiling.is_tiled:
        return tuple(Tile(path) for path in paths)
    found = [tiling.places(*tiling.working_shape(*read_size(path, data.reading))) for path in paths]
    shares = even_shares([len(places) for places in found], data.max_tiles)
    return tuple(
        Tile(path, places[place])
        for number, (path, places, share) in enumerate(zip(paths, found, shares, strict=True))
        for place in evenly(len(places), share, start=number * GOLDEN_RATIO % 1.0)
    )


def even_shares(available: Sequence[int], limit: int) -> list[int]:
    """Share `limit` among givers as evenly as what is `available` from each allows; a remainder of less than one each
    is taken from evenly spaced givers."""
    limit = min(limit, sum(available))
    levels = range(max(available, default=0) + 1)
    level = bisect_right(levels, limit, key=lambda level: sum(min(count, level) for count in available)) - 1
    shares = [min(count, level) for count in available]
    open_ = [place for place, count in enumerate(available) if count > level]
    for place in evenly(len(open_), limit - sum(shares), start=0.0):
        shares[open_[place]] += 1
    return shares


def iter_tiles(tiles: Sequence[Tile], data: DataSettings) -> Iterator[FloatImage]:
    """Yield the pixels `(3, H, W)` of tiles, `data.shape` each, in their order; tiles of one image that follow each
    other decode it once."""
    tiling = Tiling.of(data)
    path, padded = None, np.zeros((3, 0, 0), np.float32)
    for tile in tiles:
        if tile.path != path:
            path, padded = tile.path, tiling.pad(load_prepared(tile.path, data))
        yield padded if tile.place is None else tiling.cut(padded, tile.place)


def load_tiles(tiles: Sequence[Tile], data: DataSettings) -> NDArray[np.uint8]:
    """Load tiles as one array `(N, 3, H, W)` uint8: as exact as PNGs, in a quarter of the memory."""
    pixels = np.empty((len(tiles), 3, *data.shape), np.uint8)
    for place, tile in enumerate(iter_tiles(tiles, data)):
        pixels[place] = to_uint8(tile).transpose(2, 0, 1)
    return pixels


def tell_losses(paths: Sequence[Path], data: DataSettings, category: str) -> None:
    """Log one warning if images lose more than they should by being seen whole."""
    tiling = Tiling.of(data)
    found = [(path, said) for path in paths if (said := tiling.objection(*stored_size(path)))]
    if found:
        path, said = found[0]
        counts = f"{len(found)} of {len(paths)} normal images lose detail"
        log.warning("%s: %s, such as %s: %s", category, counts, path.name, said)


def load_prepared(path: Path, data: DataSettings) -> FloatImage:
    """Read one image `(3, H, W)` at its working resolution: `data.shape` without tiles."""
    return Tiling.of(data).prepare(read_image(path, data.reading))


def load_images(paths: Sequence[Path], shape: Shape, reading: Reading = READING) -> NDArray[np.float32]:
    """Read images into one array `(N, 3, H, W)`, each resized to `shape`."""
    return np.stack([resize_image(read_image(path, reading), shape) for path in paths])


def load_labelled(
    item: LabelledImage, tiling: Tiling, reading: Reading = READING, original: bool = False
) -> tuple[FloatImage, Mask]:
    """Read one test image, at working resolution or as it is (`original`), and its mask at working resolution (all
    False for a normal image).

    Raises:
        UserError: the mask's size differs from the image's, or the mask of a defective image is empty.
    """
    image = read_image(item.path, reading)
    shown = image if original else tiling.prepare(image)
    if item.mask_path is None:
        return shown, np.zeros(tiling.working_shape(*image.shape[1:]), np.bool_)
    return shown, tiling.prepare_mask(load_mask(item.mask_path, image.shape[1:], item.defect, reading))
