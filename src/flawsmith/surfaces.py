"""A category folder in MVTec AD layout: what lies where, and which normal image is used for what.

    <category>/train/good/*            normal images: split into fit (trains everything) and calibration (never trains)
    <category>/test/good/*             optional; normal images of the labelled test set
    <category>/test/<defect>/*         optional; defective images
    <category>/ground_truth/<defect>/<stem>_mask.png

Only `labelled_test` opens `test`, and only the evaluate stage calls it. `labelled_part` halves what it finds by a fixed
rule: a research half to look at as often as one likes, and a report half for final figures alone.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flawsmith.errors import UserError
from flawsmith.images import MAX_PIXELS, SUFFIXES, Mask, read_image, read_mask, resize_image, resize_mask, to_uint8

GOOD = "good"
PARTS = ("all", "research", "report")
MIN_FIT_IMAGES = 2  # fewer cannot even be told apart from memorised; the README recommends 30


@dataclass(frozen=True)
class Split:
    """The two parts of `train/good`: `fit` trains, `calibration` sets normalisation and threshold."""

    fit: tuple[Path, ...]
    calibration: tuple[Path, ...]


@dataclass(frozen=True)
class LabelledImage:
    """One test image: `defect` is "good" for a normal one; `mask_path` is None then."""

    path: Path
    defect: str
    mask_path: Path | None

    @property
    def is_defective(self) -> bool:
        return self.defect != GOOD


@dataclass(frozen=True)
class Surface:
    """A category on disk. Nothing is read before a method asks for it."""

    folder: Path
    max_pixels: int = MAX_PIXELS

    @property
    def category(self) -> str:
        return self.folder.name

    def normals(self) -> tuple[Path, ...]:
        """All images of `train/good`, sorted by name.

        Raises:
            UserError: the folder is missing or holds no image.
        """
        folder = self.folder / "train" / GOOD
        paths = _image_files(folder)
        if not paths:
            raise UserError(
                f"{folder} holds no image ({', '.join(SUFFIXES)}); put the defect-free images of "
                f"'{self.category}' there, or correct `categories` in params.yaml."
            )
        return paths

    def split(self, calibration_fraction: float, seed: int) -> Split:
        """Split the normals by a hash of each file name, so that adding an image moves at most one other.

        Raises:
            UserError: too few images for both parts.
        """
        ranked = sorted(self.normals(), key=lambda path: hashlib.sha256(f"{seed}/{path.name}".encode()).digest())
        count = max(1, round(len(ranked) * calibration_fraction))
        if len(ranked) - count < MIN_FIT_IMAGES:
            raise UserError(
                f"{self.folder}/train/{GOOD} holds {len(ranked)} image(s), too few to learn from and to calibrate on; "
                f"add normal images (30 or more are recommended) or lower data.calibration_fraction."
            )
        return Split(fit=tuple(sorted(ranked[count:])), calibration=tuple(sorted(ranked[:count])))

    def labelled_test(self) -> tuple[LabelledImage, ...]:
        """The labelled test set, or an empty tuple if there is none. For the evaluate stage alone.

        Raises:
            UserError: a defective image has no mask, or `test` holds only one of good and defective images.
        """
        root = self.folder / "test"
        if not root.is_dir():
            return ()
        found: list[LabelledImage] = []
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            for path in _image_files(folder):
                mask = None if folder.name == GOOD else self._mask_of(path)
                found.append(LabelledImage(path, folder.name, mask))
        if found and len({item.is_defective for item in found}) < 2:
            missing = f"test/{GOOD}" if found[0].is_defective else "test/<defect>"
            raise UserError(
                f"{self.folder} has a labelled test set without any image in {missing}; a score needs good and "
                "defective images: add them, or remove the folder `test`."
            )
        return tuple(found)

    def _mask_of(self, path: Path) -> Path:
        folder = self.folder / "ground_truth" / path.parent.name
        for suffix in SUFFIXES:
            for stem in (f"{path.stem}_mask", path.stem):
                if (folder / f"{stem}{suffix}").is_file():
                    return folder / f"{stem}{suffix}"
        raise UserError(f"{path} has no mask; expected {folder / (path.stem + '_mask.png')}.")


def labelled_part(images: Sequence[LabelledImage], part: str) -> tuple[LabelledImage, ...]:
    """One of PARTS of a labelled test set, in the order given.

    Within each type (good and each defect) the images, sorted by the SHA-256 of "<type>/<file stem>", go to research
    and report by turns: every type is halved, whatever else the folder holds, and a type of one image is research's.
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
        ranked = sorted(members, key=lambda image: (_rank(image), image.path.name))  # the name parts equal stems
        kept |= {image.path for image in ranked[PARTS.index(part) - 1 :: 2]}
    return tuple(image for image in images if image.path in kept)


def _rank(image: LabelledImage) -> bytes:
    return hashlib.sha256(f"{image.defect}/{image.path.stem}".encode()).digest()


def load_image(path: Path, size: int, max_pixels: int = MAX_PIXELS) -> NDArray[np.float32]:
    """Read one image and bring it to the model's `(3, size, size)`."""
    return resize_image(read_image(path, max_pixels), size)


def load_images(paths: Sequence[Path], size: int, max_pixels: int = MAX_PIXELS) -> NDArray[np.float32]:
    """Read images into one array `(N, 3, size, size)`."""
    return np.stack([load_image(path, size, max_pixels) for path in paths])


def load_images_uint8(paths: Sequence[Path], size: int, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Read images into one array `(N, 3, size, size)` of bytes: a quarter of the memory, and what PNG triplets hold."""
    return np.stack([to_uint8(load_image(path, size, max_pixels)).transpose(2, 0, 1) for path in paths])


def load_labelled(item: LabelledImage, size: int, max_pixels: int = MAX_PIXELS) -> tuple[NDArray[np.float32], Mask]:
    """Read one test image and its mask (all False for a normal one) at the model's size.

    Raises:
        UserError: the mask's size differs from the image's, or the mask of a defective image is empty.
    """
    image = read_image(item.path, max_pixels)
    if item.mask_path is None:
        return resize_image(image, size), np.zeros((size, size), np.bool_)
    mask = read_mask(item.mask_path, max_pixels)
    if mask.shape != image.shape[1:]:
        raise UserError(
            f"{item.mask_path} is {mask.shape[1]} x {mask.shape[0]} pixels but {item.path.name} is "
            f"{image.shape[2]} x {image.shape[1]}; a mask must have its image's size."
        )
    if not mask.any():
        raise UserError(f"{item.mask_path} marks no pixel; move its image to test/{GOOD} or correct the mask.")
    return resize_image(image, size), resize_mask(mask, size)


def _image_files(folder: Path) -> tuple[Path, ...]:
    if not folder.is_dir():
        return ()
    return tuple(
        sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
        )
    )
