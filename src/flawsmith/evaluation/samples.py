"""What detectors are judged on: images with their labels, of the test set or of held-out triplets in its place."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flawsmith.data.dataset import GOOD, LabelledImage, Split, labelled_part, load_labelled, normal_name
from flawsmith.data.images import FloatImage, Mask, Reading, Shape, resize_image, resize_mask
from flawsmith.data.tiling import Tiling
from flawsmith.data.triplets import VALIDATION, TripletFolder, is_illumination_defect, read_manifest
from flawsmith.errors import UserError
from flawsmith.layout import Layout

SYNTHETIC = "synthetic"  # the defect type of held-out triplets

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One image to score.

    Attributes:
        name: for people.
        defect: its defect type, GOOD for a normal image.
        load: reads the image (3, H, W) in [0, 1] and its mask (H, W).
        has_pixel_labels: False if nobody has drawn its mask, which is then empty.
    """

    name: str
    defect: str
    load: Callable[[], tuple[FloatImage, Mask]]
    has_pixel_labels: bool = True

    @property
    def is_defective(self) -> bool:
        """Whether it shows a defect."""
        return self.defect != GOOD


@dataclass(frozen=True)
class EvaluationSet:
    """The images that finished models are judged on.

    Attributes:
        samples: images of the labelled test set, or where there is none held-out triplets, or for a quick look the
            calibration normals.
        labelled: whether they are of the labelled test set.
        part: which half of the labelled test set they are, one of `dataset.PARTS`.
        held_out: of the triplets, id → name of the source image.
        shades: held-out triplets that change the light alone: no defects to find, so they are told apart.
    """

    samples: tuple[Sample, ...]
    labelled: bool
    part: str = "all"
    held_out: Mapping[str, str] = field(default_factory=dict)
    shades: tuple[Sample, ...] = ()

    @property
    def has_defects(self) -> bool:
        """Whether any image is defective: without one nothing is known about misses."""
        return any(sample.is_defective for sample in self.samples)

    @property
    def scored_on(self) -> str:
        """What the figures stand for, in words that every output carries."""
        if not self.has_defects:
            return "calibration normals, no defective image"
        if not self.labelled:
            return "held-out synthetic triplets, no labelled test set"
        return "labelled test set" if self.part == "all" else f"labelled test set, {self.part} half"

    @property
    def pixel_note(self) -> str:
        """What the figures of pixels leave out, in a sentence; "" if nothing."""
        defective = [sample for sample in self.samples if sample.is_defective]
        masks = sum(sample.has_pixel_labels for sample in defective)
        if masks == len(defective):
            return ""
        if not masks:
            return "Pixels are not measured, since no defective image has a mask."
        return (
            f"Pixels are measured on the good images and the {masks} of {len(defective)} defective ones that have a "
            "mask."
        )

    def foreign_to(self, split: Split) -> list[Path]:
        """The fit normals that no held-out triplet was made from, so that a baseline may remember them."""
        return split.fit_without(self.held_out.values())


def evaluation_set(layout: Layout, original: bool = False) -> EvaluationSet:
    """The part of the labelled test set that `evaluate.part` names, or held-out triplets where there is no test set.

    Images come at working resolution. With `original`, those of a labelled test set come as they are; their masks are
    at working resolution always.

    Raises:
        UserError: the test set is not usable as it is, its part lacks good or defective images, or there is neither it
            nor a held-out triplet.
    """
    data, part = layout.data, layout.settings.evaluate.part
    surface = layout.surface()
    labelled = surface.labelled_test()
    if labelled:
        kept = labelled_part(labelled, part)
        if len({image.is_defective for image in kept}) < 2:
            raise UserError(
                f"The {part} half of {surface.folder / 'test'} lacks good or defective images: each type's images go "
                "to research and report by turns, so it takes two or more of a type; add images, or set "
                "evaluate.part to `all`."
            )
        return EvaluationSet(labelled_samples(kept, Tiling.of(data), data.reading, original), True, part)
    manifest = layout.input("synthesize", "manifest.parquet")
    rows = {str(row["triplet_id"]): row for row in read_manifest(manifest).to_pylist() if row["role"] == VALIDATION}
    log.warning("%s has no labelled test set: held-out synthetic triplets are scored instead.", layout.category)
    normals = {name: _normal_of(row) for name, row in rows.items() if not is_illumination_defect(row)}
    triplets = TripletFolder(manifest.parent)
    samples = triplet_samples(triplets, normals, data.shape)
    shades = defect_samples(triplets, rows.keys() - normals.keys(), data.shape)
    return EvaluationSet(samples, False, "all", {name: row["source"] for name, row in rows.items()}, shades)


def _normal_of(row: Mapping[str, Any]) -> str:
    """The normal that a triplet was made from: the image's name, with its place where it is a tile of one."""
    return f"{row['source']}@{row['source_top']},{row['source_left']}" if "source_top" in row else str(row["source"])


def labelled_samples(
    images: Sequence[LabelledImage], tiling: Tiling, reading: Reading, original: bool = False
) -> tuple[Sample, ...]:
    """Labelled images at working resolution, or as they are (`original`); nothing is read yet."""
    return tuple(
        Sample(
            image.shown_name,
            image.defect,
            partial(load_labelled, image, tiling, reading, original),
            image.has_pixel_labels,
        )
        for image in images
    )


def normal_samples(
    paths: Iterable[Path], tiling: Tiling, reading: Reading, original: bool = False
) -> tuple[Sample, ...]:
    """Normal images (calibration) with empty masks, as `labelled_samples` gives them; nothing is read yet."""
    return tuple(
        Sample(
            normal_name(path),
            GOOD,
            partial(load_labelled, LabelledImage(path, GOOD, None), tiling, reading, original),
        )
        for path in paths
    )


def triplet_samples(triplets: TripletFolder, sources: Mapping[str, str], shape: Shape) -> tuple[Sample, ...]:
    """Held-out triplets as a test set: each distinct normal once, as good, and each defect image with its mask.

    Args:
        triplets: what the synthesize stage wrote.
        sources: triplet id → name of what its normal is, of the triplets to score. Shades do not belong among them.
        shape: height and width of the model's input in pixels.

    Raises:
        UserError: there is no triplet.
    """
    if not sources:
        raise UserError(
            f"{triplets.folder} holds no held-out (`{VALIDATION}-`) triplets but shades, and there is no labelled test "
            "set, so nothing can be scored; raise synthesize.validation_fraction or synthesize.triplets, or lower "
            "illumination in synthesize.mixture."
        )

    def normal(identity: str) -> tuple[FloatImage, Mask]:
        return resize_image(triplets.read(identity)[0], shape), np.zeros(shape, np.bool_)

    first_of_source = {source: identity for identity, source in sorted(sources.items(), reverse=True)}
    goods = (
        Sample(f"normal/{identity}.png", GOOD, partial(normal, identity))
        for identity in sorted(first_of_source.values())
    )
    return (*goods, *defect_samples(triplets, sources, shape))


def defect_samples(triplets: TripletFolder, ids: Iterable[str], shape: Shape) -> tuple[Sample, ...]:
    """The defect images of triplets, with their masks."""

    def defect(identity: str) -> tuple[FloatImage, Mask]:
        _, image, mask = triplets.read(identity)
        return resize_image(image, shape), resize_mask(mask, shape)

    return tuple(Sample(f"defect/{identity}.png", SYNTHETIC, partial(defect, identity)) for identity in sorted(ids))
