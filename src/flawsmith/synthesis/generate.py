"""Triplets (normal, defect, mask): normal images with defects of several sources, mixed by `synthesize.mixture`.

A *candidate* is fully decided by the seed, its role and its number; those of one source with windows of one size are
made in batches, and those whose change nobody can see are dropped. The batch a candidate belongs to is decided by its
number too, so that any triplet can be made again bit for bit (kernels round differently for other batch sizes).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from diffusers import DDPMScheduler
from numpy.typing import NDArray

from flawsmith.data.foreground import Foreground
from flawsmith.data.images import Mask
from flawsmith.data.triplets import FIT, VALIDATION
from flawsmith.devices import CPU, Compute
from flawsmith.diffusion.unet import Denoiser
from flawsmith.errors import UserError
from flawsmith.progress import bar
from flawsmith.randomness import numpy_generator
from flawsmith.synthesis.config import SynthesizeSettings
from flawsmith.synthesis.sources.base import Candidate, DefectSource, Normals
from flawsmith.synthesis.sources.cutpaste import CutPaste
from flawsmith.synthesis.sources.diffusion import Diffusion
from flawsmith.synthesis.sources.illumination import Illumination
from flawsmith.synthesis.sources.own import OwnTexture
from flawsmith.synthesis.sources.pieces import Pieces
from flawsmith.synthesis.sources.texture import MIN_PIXELS, largest_change

CHUNK_BATCHES = 4  # candidates are drawn in chunks of so many batches, then grouped by source and window size
MAX_TRIES = 5  # candidates drawn for each triplet wanted before giving up
MIN_SEEN = 0.5  # share of a mark whose pixels have themselves changed, as the quality gate demands of most


@dataclass(frozen=True)
class Triplet:
    """One accepted triplet: images (3, H, W) uint8 and the mask (H, W) of the pixels that really changed."""

    candidate: Candidate
    normal: NDArray[np.uint8]
    defect: NDArray[np.uint8]
    mask: Mask


@dataclass(frozen=True)
class TripletGenerator:
    """What every triplet of a category is made from.

    Attributes:
        denoiser, scheduler: needed for the source `diffusion` alone.
        normals: (N, 3, H, W) uint8, the fit part at the model's size: images, or tiles of them.
        names: N file names, the manifest's name of each normal; tiles of one image share it.
        compute: where the denoiser lies, and its precision.
        places: of each normal the tile's top and left in pixels at working resolution; None for whole images.
        twins: name → the name whose picture it shows too, of the files that are copies.
    """

    denoiser: Denoiser | None
    scheduler: DDPMScheduler | None
    normals: NDArray[np.uint8]
    names: Sequence[str]
    foreground: Foreground
    settings: SynthesizeSettings
    compute: Compute = CPU
    places: Sequence[tuple[int, int] | None] = ()
    twins: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def sources(self) -> dict[str, DefectSource]:
        """All sources by their names in `synthesize.mixture`."""
        settings, normals = self.settings, Normals(self.normals, self.foreground)
        return {
            "illumination": Illumination(settings, normals),
            "pieces": Pieces(settings, normals),
            "cutpaste": CutPaste(settings, normals),
            "own": OwnTexture(settings, normals),
            "diffusion": Diffusion(settings, normals, self.denoiser, self.scheduler, self.compute),
        }

    def normals_of(self, role: str) -> NDArray[np.int64]:
        """Indices of the normals of one role: those of validation show a fixed share of the pictures, of which no
        training triplet uses any part or copy."""
        names = [self.twins.get(name, name) for name in self.names]
        files = {name: place for place, name in enumerate(dict.fromkeys(names))}
        order = numpy_generator(self.settings.seed, "sources").permutation(len(files))
        held = min(max(1, round(self.settings.validation_fraction * len(order))), len(order) - 1)
        chosen = order[:held] if role == VALIDATION else order[held:]
        return np.flatnonzero(np.isin([files[name] for name in names], chosen))

    def candidate(self, role: str, number: int) -> Candidate:
        """Draw candidate `number` of a role: the same one whenever it is asked for."""
        seed, shares = self.settings.seed, self.settings.shares
        generator = numpy_generator(seed, "candidate", role, number)
        normals = self.normals_of(role)
        index = int(generator.choice(normals))
        # a stream of its own: a share given to another source moves no draw of the candidates that keep theirs
        chance = numpy_generator(seed, "shade", role, number).random()
        source = list(shares)[int(np.searchsorted(np.cumsum(list(shares.values()))[:-1], chance, "right"))]
        defect = self.sources[source].draw(generator, index, normals[normals != index])
        return Candidate(role, number, index, source, defect)

    def chunk(self, role: str, index: int) -> list[list[Candidate]]:
        """The candidates of one chunk as batches of one source and window size, each at most `settings.batch` long."""
        size = CHUNK_BATCHES * self.settings.batch
        alike: dict[tuple[int, str], list[Candidate]] = {}
        for number in range(index * size, (index + 1) * size):
            item = self.candidate(role, number)
            alike.setdefault((item.defect.outline.window[2], item.source), []).append(item)
        step = self.settings.batch
        return [
            items[first : first + step] for _, items in sorted(alike.items()) for first in range(0, len(items), step)
        ]

    def make(self, batch: Sequence[Candidate]) -> list[Triplet | None]:
        """Make the defects of one batch; None where a defect cannot be seen."""
        made = self.sources[batch[0].source].make(batch)
        return [self._seen(item, *one) for item, one in zip(batch, made, strict=True)]

    def _seen(self, item: Candidate, defect: NDArray[np.uint8], mask: Mask) -> Triplet | None:
        normal, settings = self.normals[item.normal], self.settings
        wanted = max(MIN_PIXELS, settings.min_changed * int(item.defect.outline.mask.sum()))
        # the mask may hold more than what changed, on a lively texture or of loose pixels
        visible = largest_change(normal, defect)[mask] > settings.visibility * 255
        is_seen = mask.sum() >= wanted and visible.sum() >= MIN_SEEN * mask.sum()
        return Triplet(item, normal, defect, mask) if is_seen else None

    def row(self, triplet_id: str, triplet: Triplet) -> dict[str, Any]:
        """One row of the manifest: everything that decides the triplet, in columns that depend on its source."""
        item = triplet.candidate
        outline, values = item.defect.outline, item.defect.values
        donor = {"donor": self.names[int(values["donor"])]} if "donor" in values else {}
        top, left, side = outline.window
        place = self.places[item.normal] if self.places else None
        return {
            "triplet_id": triplet_id,
            "role": item.role,
            "candidate": item.number,
            "seed": self.settings.seed,
            "source": self.names[item.normal],
            **({"source_top": place[0], "source_left": place[1]} if place else {}),
            "defect_source": item.source,
            "window_top": top,
            "window_left": left,
            "window_side": side,
            "mask_kind": outline.kind,
            "mask_period": outline.period,
            "mask_threshold": outline.threshold,
            "mask_angle": outline.angle,
            "mask_area": float(triplet.mask.mean()),
            **values,
            **donor,
        }


def generate(maker: TripletGenerator, role: str, count: int) -> Iterator[Triplet]:
    """Yield `count` triplets of one role, of each source as many as `quotas` says, in the order of their candidate
    numbers within each chunk.

    Sources are drawn a candidate, but what is dropped differs: nearly every shade can be seen, many a defect cannot. So
    candidates of a source that is complete are passed over.

    Raises:
        UserError: too many candidates of a source left no visible change.
    """
    wanted, index = quotas(maker.settings, count), 0
    left, tried = dict(wanted), Counter[str]()
    with bar(what=f"synthesize {role}", total=count, unit="triplet") as progress:
        while any(left.values()):
            # a batch is made whole or not at all: what a triplet looks like depends on its company
            batches = [batch for batch in maker.chunk(role, index) if left[batch[0].source]]
            tried.update(item.source for batch in batches for item in batch)
            results = [triplet for batch in batches for triplet in maker.make(batch) if triplet is not None]
            for triplet in sorted(results, key=lambda item: item.candidate.number):
                if left[triplet.candidate.source]:
                    left[triplet.candidate.source] -= 1
                    progress.update()
                    yield triplet
            index += 1
            for source, missing in left.items():
                if missing and tried[source] >= MAX_TRIES * max(wanted[source], CHUNK_BATCHES * maker.settings.batch):
                    raise UserError(
                        f"Only {wanted[source] - missing} of {tried[source]} synthetic defects from {source} could be "
                        f"seen; {maker.sources[source].remedy}lower synthesize.min_changed or visibility."
                    )


def quotas(settings: SynthesizeSettings, count: int) -> dict[str, int]:
    """How many of `count` triplets of one role are from each source: the shares are shares of triplets.

    The last of several sources gets one at least.
    """
    shares = settings.shares
    ends = [min(round(count * share), count - 1) for share in np.cumsum(list(shares.values()))[:-1]]
    return dict(zip(shares, np.diff([0, *ends, count]).tolist(), strict=True))


def remake(maker: TripletGenerator, role: str, number: int) -> Triplet | None:
    """Make the triplet of one candidate again, in the company of its own batch."""
    for batch in maker.chunk(role, number // (CHUNK_BATCHES * maker.settings.batch)):
        for place, candidate in enumerate(batch):
            if candidate.number == number:
                return maker.make(batch)[place]
    raise AssertionError("a chunk holds every number in its range")


def role_counts(settings: SynthesizeSettings) -> dict[str, int]:
    """How many triplets each role gets."""
    held = max(1, round(settings.validation_fraction * settings.triplets))
    return {FIT: settings.triplets - held, VALIDATION: held}
