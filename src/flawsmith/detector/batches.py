"""Training batches for the detector, with everything that is computed of an image but once.

The teacher is frozen and images are not augmented during training. So the teacher's features are computed once and kept
in memory as half floats, as many as fit. A training step then costs the student alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from flawsmith.data.triplets import FIT, TripletArrays
from flawsmith.detector.augmentation import SAMPLE
from flawsmith.detector.config import DistillSettings
from flawsmith.detector.memory import MemoryBank, as_patches
from flawsmith.detector.model import Detector
from flawsmith.detector.teacher import Features, Teacher, as_batch
from flawsmith.devices import Compute
from flawsmith.randomness import numpy_generator
from flawsmith.sequences import batched, evenly

BLOCK = 8  # images whose features are computed together
STUDENT, HEAD, LOCALISATION = "student", "head", "localisation"  # the phases in order
STREAMS = {STUDENT: "student", HEAD: "head", LOCALISATION: "locator"}  # of draws: another name draws other batches


class FeatureBank:
    """Teacher features of images by index, computed on first use and kept while they fit into `limit_bytes`.

    Kernels round differently for other batch sizes. An image is therefore always computed in the same batch, so that a
    resumed run sees the same features: in its block of BLOCK neighbours if all images fit, else alone.
    """

    def __init__(self, teacher: Teacher, images: NDArray[np.uint8], compute: Compute, limit_bytes: int) -> None:
        self.teacher, self.images, self.compute = teacher, images, compute
        self._kept: dict[int, Features] = {}
        size = sum(level.numel() * level.element_size() for level in self._compute(0, 1)[0])
        self._capacity = limit_bytes // size  # in images
        self._block = BLOCK if self._capacity >= len(images) else 1

    def __getitem__(self, indices: NDArray[np.int64]) -> Features:
        """Features (B, C_k, h_k, w_k) float32 of the images at `indices`, on the device."""
        return self.stack([self.one(int(index)) for index in indices])

    def stack(self, chosen: Sequence[Features]) -> Features:
        """Stack what `one` returned, of this bank or another, to one batch of float32 on the device."""
        with self.compute.exactly():  # autocast knows no half floats
            return tuple(torch.stack(level).to(self.compute.device).float() for level in zip(*chosen, strict=True))

    def one(self, index: int) -> Features:
        """Features (C_k, h_k, w_k) float16 of one image, where they are kept."""
        if index in self._kept:
            return self._kept[index]
        first = index // self._block * self._block
        fresh = self._compute(first, first + self._block)
        for offset, features in enumerate(fresh[: max(0, self._capacity - len(self._kept))]):
            self._kept[first + offset] = features
        return fresh[index - first]

    def _compute(self, first: int, end: int) -> list[Features]:
        with torch.inference_mode():
            batch = as_batch(self.images[first:end], self.compute.device)
            # not in bfloat16, which moves deep features by several percent: a model that is used sees those of float32
            with self.compute.exactly():
                levels = [level.half().cpu() for level in self.teacher(batch)]
        # cloned outside inference mode, so that autograd may use them
        return [tuple(level[row].clone() for level in levels) for row in range(len(batch))]


class DistanceBank:
    """Distances of a `FeatureBank`'s images to the memory bank, computed on first use and kept.

    A triplet's own normal image lies in the memory bank. Its patches do not count here, for at inspection no part was
    seen before.

    Args:
        source_ids: (M,) the normal image behind each patch of the memory bank.
        sources: (N,) the normal image behind each image of the feature bank; -1 if the memory bank does not hold it.
    """

    def __init__(self, memory: MemoryBank, bank: FeatureBank, source_ids: Tensor, sources: NDArray[np.int64]) -> None:
        self.memory, self.bank, self.sources = memory, bank, sources
        self.source_ids = source_ids.to(bank.compute.device)
        self._kept: dict[int, Tensor] = {}

    def one(self, index: int) -> Tensor:
        """Distances (1, 1, h, w) of one image, on the device."""
        if index not in self._kept:
            # the same whether a training step (under autocast) or a resumed run asks first
            with torch.no_grad(), self.bank.compute.exactly():
                patches = as_patches(self.bank.stack([self.bank.one(index)])[-1])
                self._kept[index] = self.memory(patches, self.source_ids == int(self.sources[index]))
        return self._kept[index]


@dataclass(frozen=True)
class TripletSources:
    """What the triplets of one role were made from.

    Attributes:
        sources: (N,) the normal image behind each triplet; -1 if the memory bank does not hold it.
        textured: indices of the triplets whose defect has a texture of its own. The segmentation head learns from these
            alone: from illumination defects it would learn to take any exposure for a defect.
    """

    sources: NDArray[np.int64]
    textured: NDArray[np.int64]

    @classmethod
    def unknown(cls, count: int) -> "TripletSources":
        """The sources of `count` triplets, all textured, whose normal images no memory bank holds."""
        return cls(np.full(count, -1), np.arange(count))


@dataclass(frozen=True)
class TrainingTriplets:
    """The triplets of both roles, and what is known of their sources.

    Attributes:
        arrays: role → triplets.
        source_ids: (M,) the normal image behind each patch of the detector's memory bank, which is filled already; None
            without a memory bank.
        sources: role → sources of its triplets; `TripletSources.unknown` for a role that is missing.
    """

    arrays: Mapping[str, TripletArrays]
    source_ids: Tensor | None = None
    sources: Mapping[str, TripletSources] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchIndices:
    """Which triplets a training step sees.

    Attributes:
        indices: (B,) of triplets.
        clean: (B,) whether the step sees the normal image instead of the defect image.
        generator: the step's random stream, for whatever else is drawn.
    """

    indices: NDArray[np.int64]
    clean: NDArray[np.bool_]
    generator: np.random.Generator


@dataclass(frozen=True)
class Batch:
    """One training batch.

    Attributes:
        target: teacher features of the normal images, (B, C_k, h_k, w_k) a level.
        seen: teacher features of the images seen: defect images, for a part of the rows normal ones.
        remembered: distance of `seen` to the memory bank, (B, 1, h, w); empty without one.
        mask: (B, 1, h, w) in [0, 1], the defective share of each cell of the maps.
    """

    target: Features
    seen: Features
    remembered: Features
    mask: Tensor


class TripletBatches:
    """Batches of triplets by role."""

    def __init__(
        self, detector: Detector, triplets: TrainingTriplets, settings: DistillSettings, compute: Compute
    ) -> None:
        arrays = triplets.arrays
        self._counts = {role: len(part.ids) for role, part in arrays.items()}
        self._sources = {
            role: triplets.sources.get(role, TripletSources.unknown(count)) for role, count in self._counts.items()
        }
        self._settings, self._device = settings, compute.device
        limit = int(settings.cache_gigabytes * 2**30) // (2 * len(arrays))  # normal and defect images of each role
        self._banks = {
            role: tuple(FeatureBank(detector.teacher, images, compute, limit) for images in (part.normal, part.defect))
            for role, part in arrays.items()
        }
        self._distances: dict[str, tuple[DistanceBank, ...]] = {}
        if detector.memory is not None and triplets.source_ids is not None:
            for role, banks in self._banks.items():
                known = triplets.source_ids, self._sources[role].sources
                self._distances[role] = tuple(DistanceBank(detector.memory, bank, *known) for bank in banks)
        self._masks = {
            role: F.avg_pool2d(torch.from_numpy(part.mask).float().unsqueeze(1), detector.stride).to(compute.device)
            for role, part in arrays.items()
        }

    def of(self, role: str, indices: NDArray[np.int64], clean: NDArray[np.bool_]) -> Batch:
        """The triplets at `indices` (B,); rows that are `clean` (B,) see the normal image."""
        normal, defect = self._banks[role]
        rows = [(int(index), bool(kept)) for index, kept in zip(indices, clean, strict=True)]
        target = normal[indices]
        seen = target
        if not clean.all():
            seen = normal.stack([(normal if kept else defect).one(index) for index, kept in rows])
        keep = torch.from_numpy(clean).to(self._device).view(-1, 1, 1, 1)
        mask = self._masks[role][torch.from_numpy(indices)] * ~keep
        remembered: Features = ()
        if self._distances:
            of_normal, of_defect = self._distances[role]
            remembered = (torch.cat([(of_normal if kept else of_defect).one(index) for index, kept in rows]),)
        return Batch(target, seen, remembered, mask)

    def shown_in(self, phase: str, role: str) -> NDArray[np.int64]:
        """Indices of the role's triplets that the phase learns from, or is validated on."""
        return self._sources[role].textured if phase == HEAD else np.arange(self._counts[role])

    def draw(self, phase: str, step: int) -> BatchIndices:
        """Draw what a training step sees."""
        generator, settings = numpy_generator(self._settings.seed, "distill", STREAMS[phase], step), self._settings
        shown = self.shown_in(phase, FIT)
        indices = shown[generator.integers(0, len(shown), settings.batch)]
        clean = np.arange(settings.batch) < round(settings.normal_share * settings.batch)
        return BatchIndices(indices, clean, generator)

    def in_order(self, role: str, clean: bool, indices: NDArray[np.int64] | None = None) -> Iterator[Batch]:
        """Yield all triplets of a role, or those at `indices`: the normal images if `clean`, else the defect images."""
        wanted = np.arange(self._counts[role]) if indices is None else indices
        for some in batched(wanted, self._settings.batch):
            yield self.of(role, np.array(some), np.full(len(some), clean))

    def some_normals(self) -> Iterator[Batch]:
        """Yield an even part of the normal images behind the training triplets."""
        return self.in_order(FIT, True, np.array(evenly(self._counts[FIT], SAMPLE)))
