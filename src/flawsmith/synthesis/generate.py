"""Triplets (normal, defect, mask) from the disturbed reverse process, blended into normal images.

A *candidate* is fully decided by the seed, its role and its number; candidates are sampled in batches of windows of one
size, and those whose change nobody can see are dropped. The batch a candidate belongs to is decided by its number too,
so that any triplet can be made again bit for bit (kernels round differently for other batch sizes).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from numpy.typing import NDArray
from scipy import ndimage
from tqdm.auto import tqdm

from flawsmith.diffusion.sampler import Disturbance, sample_disturbed
from flawsmith.diffusion.unet import Denoiser
from flawsmith.errors import UserError
from flawsmith.foreground import Foreground
from flawsmith.images import Mask
from flawsmith.randomness import numpy_generator, torch_generator
from flawsmith.settings import SynthesizeSettings
from flawsmith.synthesis.masks import MaskDraw, feathered, sample_mask
from flawsmith.triplets import FIT, VALIDATION

CHUNK_BATCHES = 4  # candidates are drawn in chunks of so many batches, then grouped by window size
MAX_TRIES = 5  # candidates drawn for each triplet wanted before giving up
CLOSING = 2  # pixels: radius of the square that closes gaps in the mask of changed pixels
MIN_PIXELS = 4  # a visible defect has at least so many changed pixels


@dataclass(frozen=True)
class Candidate:
    """All that is drawn for one triplet before diffusion."""

    role: str
    number: int
    source: int  # index of the normal image
    strength: float
    start: float
    opacity: float
    outline: MaskDraw


@dataclass(frozen=True)
class Triplet:
    """One accepted triplet: images (3, S, S) uint8 and the mask (S, S) of the pixels that really changed."""

    candidate: Candidate
    normal: NDArray[np.uint8]
    defect: NDArray[np.uint8]
    mask: Mask


@dataclass(frozen=True)
class Workshop:
    """What every triplet of a category is made from.

    Attributes:
        normals: (N, 3, S, S) uint8, the fit part at the model's size.
        names: N file names, the streams' and the manifest's name of each normal.
    """

    denoiser: Denoiser
    scheduler: DDPMScheduler
    normals: NDArray[np.uint8]
    names: Sequence[str]
    foreground: Foreground
    settings: SynthesizeSettings
    device: torch.device

    def sources(self, role: str) -> NDArray[np.int64]:
        """Indices of the normals of one role: validation sources are a fixed share that no training triplet uses."""
        order = numpy_generator(self.settings.seed, "sources").permutation(len(self.names))
        share = self.settings.validation_fraction
        held = min(max(1, round(share * len(order))), len(order) - 1) if share > 0 else 0
        return np.sort(order[:held] if role == VALIDATION else order[held:])

    def candidate(self, role: str, number: int) -> Candidate:
        """Draw candidate `number` of a role: the same one whenever it is asked for."""
        settings = self.settings
        generator = numpy_generator(settings.seed, "candidate", role, number)
        source = int(generator.choice(self.sources(role)))
        strength, start, opacity = (
            float(generator.uniform(*bounds)) for bounds in (settings.strength, settings.start, settings.opacity)
        )
        normal = self.normals[source].astype(np.float32) / np.float32(255)
        allowed = self.foreground.mask(normal) if self.foreground.is_object else None
        outline = sample_mask(generator, normal.shape[1], settings, allowed)
        return Candidate(role, number, source, strength, start, opacity, outline)

    def chunk(self, role: str, index: int) -> list[list[Candidate]]:
        """The candidates of one chunk as batches of equal windows, each at most `settings.batch` long."""
        size = CHUNK_BATCHES * self.settings.batch
        drawn = [self.candidate(role, number) for number in range(index * size, (index + 1) * size)]
        batches = []
        for side in sorted({candidate.outline.window[2] for candidate in drawn}):
            alike = [candidate for candidate in drawn if candidate.outline.window[2] == side]
            starts = range(0, len(alike), self.settings.batch)
            batches += [alike[first : first + self.settings.batch] for first in starts]
        return batches

    def make(self, batch: Sequence[Candidate]) -> list[Triplet | None]:
        """Sample one batch and blend it in; None where the defect cannot be seen."""
        settings = self.settings
        windows = np.stack([_window(self.normals[item.source], item) for item in batch])
        sampled = sample_disturbed(
            self.denoiser,
            self.scheduler,
            torch.from_numpy(windows.astype(np.float32) / np.float32(127.5) - np.float32(1)),
            [item.start for item in batch],
            [item.strength for item in batch],
            settings.steps,
            Disturbance(settings.rule, settings.disturb_until, settings.octaves),
            [torch_generator(settings.seed, "texture", item.role, item.number) for item in batch],
            self.device,
        )
        textures = ((sampled.numpy() + np.float32(1)) * np.float32(127.5)).astype(np.float32)
        return [self._blend(item, texture) for item, texture in zip(batch, textures, strict=True)]

    def _blend(self, item: Candidate, texture: NDArray[np.float32]) -> Triplet | None:
        """defect = normal + opacity * alpha * (texture - normal) inside the window, untouched outside."""
        settings, normal = self.settings, self.normals[item.source]
        if (normal == normal[:1]).all():  # a gray surface has gray defects
            texture = np.repeat(texture.mean(axis=0, keepdims=True), 3, axis=0)
        alpha = feathered(item.outline.mask, settings.feather)
        inside = _window(normal, item).astype(np.float32)
        weight = np.float32(item.opacity) * _window(alpha[None], item)
        defect = normal.copy()
        _window(defect, item)[:] = np.rint(np.clip(inside + weight * (texture - inside), 0, 255)).astype(np.uint8)
        mask = changed_mask(normal, defect, alpha > 0, settings.visibility)
        # what changed too little to be marked is put back, so that nothing changes far from the mask
        defect = np.where(ndimage.distance_transform_edt(~mask) <= settings.feather + 1, defect, normal)
        wanted = max(MIN_PIXELS, settings.min_changed * int(item.outline.mask.sum()))
        return Triplet(item, normal, defect, mask) if mask.sum() >= wanted else None


def generate(workshop: Workshop, role: str, count: int) -> Iterator[Triplet]:
    """Yield `count` triplets of one role, in the order of their candidate numbers within each chunk.

    Raises:
        UserError: too many candidates left no visible change.
    """
    made, tried, index = 0, 0, 0
    with tqdm(total=count, desc=f"synthesize {role}", disable=None) as progress:
        while made < count:
            results = [triplet for batch in workshop.chunk(role, index) for triplet in workshop.make(batch)]
            tried += len(results)
            visible = [triplet for triplet in results if triplet is not None]
            for triplet in sorted(visible, key=lambda item: item.candidate.number)[: count - made]:
                made += 1
                progress.update()
                yield triplet
            index += 1
            if made < count and tried >= MAX_TRIES * max(count, len(results)):
                raise UserError(
                    f"Only {made} of {tried} synthetic defects could be seen; raise synthesize.strength, start or "
                    "opacity, or lower synthesize.min_changed or visibility."
                )


def remake(workshop: Workshop, role: str, number: int) -> Triplet | None:
    """Make the triplet of one candidate again, in the company of its own batch."""
    for batch in workshop.chunk(role, number // (CHUNK_BATCHES * workshop.settings.batch)):
        for place, candidate in enumerate(batch):
            if candidate.number == number:
                return workshop.make(batch)[place]
    raise AssertionError("a chunk holds every number in its range")


def changed_mask(
    normal: NDArray[np.uint8], defect: NDArray[np.uint8], region: Mask, visibility: float
) -> NDArray[np.bool_]:
    """Where a defect can be seen: pixels of `region` (S, S) moved by more than `visibility` in any channel.

    Gaps of up to four pixels between changed pixels are closed (texture crosses its own brightness there); lone specks
    of fewer than four pixels are dropped.
    """
    change = np.abs(defect.astype(np.int16) - normal.astype(np.int16)).max(axis=0)
    closed = ndimage.binary_closing(np.pad(change > visibility * 255, CLOSING), np.ones((2 * CLOSING + 1,) * 2, bool))
    mask = closed[CLOSING:-CLOSING, CLOSING:-CLOSING] & region
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= MIN_PIXELS)[labels]


def manifest_row(workshop: Workshop, triplet_id: str, triplet: Triplet) -> dict[str, Any]:
    """One row of the manifest: everything that decides the triplet."""
    item, settings = triplet.candidate, workshop.settings
    top, left, side = item.outline.window
    return {
        "triplet_id": triplet_id,
        "role": item.role,
        "candidate": item.number,
        "seed": settings.seed,
        "source": workshop.names[item.source],
        "window_top": top,
        "window_left": left,
        "window_side": side,
        "rule": settings.rule,
        "strength": item.strength,
        "start": item.start,
        "steps": settings.steps,
        "disturb_until": settings.disturb_until,
        "octaves": settings.octaves,
        "opacity": item.opacity,
        "feather": settings.feather,
        "mask_kind": item.outline.kind,
        "mask_period": item.outline.period,
        "mask_threshold": item.outline.threshold,
        "mask_angle": item.outline.angle,
        "mask_area": float(triplet.mask.mean()),
    }


def role_counts(settings: SynthesizeSettings) -> dict[str, int]:
    """How many triplets each role gets."""
    held = max(1, round(settings.validation_fraction * settings.triplets)) if settings.validation_fraction else 0
    return {FIT: settings.triplets - held, VALIDATION: held}


def _window(image: NDArray[Any], item: Candidate) -> NDArray[Any]:
    top, left, side = item.outline.window
    return image[:, top : top + side, left : left + side]
