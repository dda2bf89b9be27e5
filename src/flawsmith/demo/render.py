"""Renders one category of the demo data: normal images, and defective ones with the mask of what the defect changed."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from flawsmith.data.dataset import GOOD
from flawsmith.data.images import FloatImage, Mask, write_png
from flawsmith.demo.config import DemoDataSettings
from flawsmith.demo.defects import FABRIC_DEFECTS, METAL_DEFECTS
from flawsmith.demo.fabric import draw_fabric
from flawsmith.demo.metal import draw_metal
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.randomness import numpy_generator

VISIBLE = 0.030  # change of a channel, of 1, that counts as visible: about 1.5 times the grain
FAINTEST = 1.3 * VISIBLE  # least change where a defect shows most
MIN_AREA = 24  # pixels in one piece; a defect that shows less is drawn anew
TRIES, TRIES_A_PIECE = 200, 25  # draws of a defect, in all and on one piece
EIGHT = np.ones((3, 3), np.bool_)  # a pixel and its eight neighbours


@dataclass(frozen=True)
class Kind:
    """A kind of surface: how a piece of it is drawn, and what can be wrong with it."""

    draw: Callable[[np.random.Generator, int], Any]
    defects: Mapping[str, Callable[[Any, np.random.Generator], tuple[Any, Mask]]]


KINDS: Mapping[str, Kind] = {
    "brushed_metal": Kind(draw_metal, METAL_DEFECTS),
    "woven_fabric": Kind(draw_fabric, FABRIC_DEFECTS),
}


@dataclass(frozen=True)
class Twin:
    """The same piece, photographed without and with a defect; `mask` is where one sees the difference."""

    clean: FloatImage
    defective: FloatImage
    mask: Mask


def kind_of(surface: str) -> Kind:
    """The kind called `surface`.

    Raises:
        UserError: there is none of that name.
    """
    if surface not in KINDS:
        raise UserError(f"demo-data cannot render `{surface}`; there are {', '.join(KINDS)}.")
    return KINDS[surface]


def render_normal(surface: str, size: int, generator: np.random.Generator) -> FloatImage:
    """A picture `(3, size, size)` of a new flawless piece."""
    piece = kind_of(surface).draw(generator, size)
    return piece.camera.develop(piece.light())


def render_defective(surface: str, defect: str, size: int, generator: np.random.Generator) -> Twin:
    """A new piece with one defect, and its flawless twin.

    Raises:
        UserError: the surface or the defect is unknown.
    """
    kind = kind_of(surface)
    if defect not in kind.defects:
        raise UserError(f"{surface} has no defect `{defect}`; it has {', '.join(kind.defects)}.")
    for attempt in range(TRIES):
        if attempt % TRIES_A_PIECE == 0:  # the sheen of some pieces hides a faint defect everywhere
            piece = kind.draw(generator, size)
            light = piece.light()
            smooth = piece.camera.develop(light, grain=False)
        damaged, footprint = kind.defects[defect](piece, generator)
        # outside the footprint nothing may change, so nothing does, whatever tails a formula has
        damaged_light = np.where(footprint[..., None], damaged.light(), light)
        change = np.abs(piece.camera.develop(damaged_light, grain=False) - smooth).max(axis=0)
        mask = visible_mask(change)
        if largest_part(mask) >= MIN_AREA and change.max() >= FAINTEST:
            return Twin(piece.camera.develop(light), piece.camera.develop(damaged_light), mask)
    raise FlawsmithError(f"no visible {defect} came out of {TRIES} draws on {surface} at {size} pixels; report this.")


def visible_mask(change: np.ndarray[Any, np.dtype[np.float32]]) -> Mask:
    """Where a change `(H, W)` is visible: above the threshold at a pixel or around it, with the
    fainter pixels that continue it, without holes and specks."""
    around = ndimage.gaussian_filter(change, 1.0)
    seen = (change > 1.2 * VISIBLE) | (around > 0.8 * VISIBLE)
    # an eye follows a line over its faint stretches: grow what is seen along what is at least half as strong
    candidates = (np.minimum(change, around) > 0.5 * VISIBLE) | (change > VISIBLE)
    seen = ndimage.binary_propagation(seen & candidates, EIGHT, candidates)
    closed = ndimage.binary_fill_holes(ndimage.binary_closing(np.pad(seen, 3), EIGHT, iterations=2))[3:-3, 3:-3]
    labels, count = ndimage.label(closed, EIGHT)
    areas = ndimage.sum_labels(closed, labels, np.arange(count + 1))
    return np.asarray((areas >= 4)[labels] & closed, np.bool_)


def largest_part(mask: Mask) -> int:
    """Pixels of the largest connected part of a mask."""
    labels, _ = ndimage.label(mask, EIGHT)
    return int(np.bincount(labels.ravel())[1:].max(initial=0))


def write_category(folder: Path, surface: str, settings: DemoDataSettings) -> None:
    """Fill an empty folder with one surface in MVTec AD layout.

    Every image has a generator of its own, so that asking for more images changes none of the others.
    """
    kind, size = kind_of(surface), settings.image_size

    def generator(*names: str | int) -> np.random.Generator:
        return numpy_generator(settings.seed, "demo-data", surface, *names)

    def write_normal(part: str, index: int) -> None:
        image = render_normal(surface, size, generator(part, GOOD, index))
        write_png(folder / part / GOOD / f"{index:03d}.png", image)

    def write_defective(defect: str, index: int) -> None:
        twin = render_defective(surface, defect, size, generator("test", defect, index))
        write_png(folder / "test" / defect / f"{index:03d}.png", twin.defective)
        write_png(folder / "ground_truth" / defect / f"{index:03d}_mask.png", twin.mask)

    jobs = [
        partial(write_normal, part, index)
        for part, count in (("train", settings.train_good), ("test", settings.test_good))
        for index in range(count)
    ]
    jobs += [partial(write_defective, defect, i) for defect in kind.defects for i in range(settings.test_per_defect)]
    # threads: NumPy and SciPy let go of the interpreter for nearly all of the work
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda job: job(), jobs):  # the first error ends it
            pass
