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
from flawsmith.detector.config import DistillSettings
from flawsmith.detector.model import Detector
from flawsmith.detector.teacher import Features, Teacher, as_batch
from flawsmith.devices import Compute
from flawsmith.progress import bar
from flawsmith.randomness import numpy_generator
from flawsmith.sequences import batched

BLOCK = 8  # images whose features are computed together
STUDENT, HEAD = "student", "head"  # the phases in order


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


@dataclass(frozen=True)
class TripletSources:
    """What the triplets of one role were made from.

    Attributes:
        sources: (N,) the normal image behind each triplet; -1 if no memory holds it.
        textured: indices of the triplets whose defect has a texture of its own. The memories are weighed by these alone
            and the head learns from them alone: illumination defects would teach it to take any exposure for a defect.
    """

    sources: NDArray[np.int64]
    textured: NDArray[np.int64]

    @classmethod
    def unknown(cls, count: int) -> "TripletSources":
        """The sources of `count` triplets, all textured, whose normal images no memory holds."""
        return cls(np.full(count, -1), np.arange(count))


@dataclass(frozen=True)
class TrainingTriplets:
    """The triplets of both roles, and what is known of their sources.

    Attributes:
        arrays: role → triplets.
        source_ids: memory → (M,) the normal image behind each of its patches; the memories are filled already.
        sources: role → sources of its triplets; `TripletSources.unknown` for a role that is missing.
    """

    arrays: Mapping[str, TripletArrays]
    source_ids: Mapping[str, Tensor] = field(default_factory=dict)
    sources: Mapping[str, TripletSources] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchIndices:
    """Which triplets a training step sees.

    Attributes:
        indices: (B,) of triplets (see `TripletBatches.draw`).
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
    """

    target: Features
    seen: Features


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
        self._detector, self._source_ids = detector, triplets.source_ids
        self._masks = {
            role: F.avg_pool2d(torch.from_numpy(part.mask).float().unsqueeze(1), detector.stride).to(compute.device)
            for role, part in arrays.items()
        }

    def of(self, role: str, indices: NDArray[np.int64], clean: NDArray[np.bool_]) -> Batch:
        """The triplets at `indices` (B,); rows that are `clean` (B,) see the normal image."""
        normal, defect = self._banks[role]
        target = normal[indices]
        if clean.all():
            return Batch(target, target)
        rows = zip(indices.tolist(), clean.tolist(), strict=True)
        return Batch(target, normal.stack([(normal if kept else defect).one(index) for index, kept in rows]))

    def textured(self, role: str) -> NDArray[np.int64]:
        """Indices of the role's triplets whose defect has a texture of its own."""
        return self._sources[role].textured

    @torch.no_grad()
    def maps(self, role: str, clean: bool) -> Tensor:
        """Standardised maps (N, K, h, w) of the role's textured triplets: of the normal images if `clean`.

        A triplet's own normal image lies in the memories. Its patches do not count here, for at inspection no part was
        seen before.
        """
        bank, indices, found = self._banks[role][0 if clean else 1], self.textured(role), []
        what = f"distill maps of {'normal' if clean else 'defect'} images, {role}"
        for some in bar(np.array_split(indices, range(BLOCK, len(indices), BLOCK)), what, unit="block"):
            own = torch.from_numpy(self._sources[role].sources[some]).to(self._device)
            excluded = {name: ids == own[:, None] for name, ids in self._source_ids.items()}
            # the same whether a training step (under autocast) or a resumed run asks first
            with bank.compute.exactly():
                found.append(self._detector.standardise(self._detector.maps_of(bank[some], excluded)))
        return torch.cat(found)

    def masks(self, role: str) -> Tensor:
        """The defective share of each cell of the maps, (N, 1, h, w), of the role's textured triplets."""
        return self._masks[role][torch.from_numpy(self.textured(role))]

    def draw(self, phase: str, step: int) -> BatchIndices:
        """Draw what a training step sees: places among all triplets for the student, among the textured ones for the
        head."""
        generator, settings = numpy_generator(self._settings.seed, "distill", phase, step), self._settings
        indices = generator.integers(
            0, self._counts[FIT] if phase == STUDENT else len(self.textured(FIT)), settings.batch
        )
        clean = np.arange(settings.batch) < round(settings.normal_share * settings.batch)
        return BatchIndices(indices, clean, generator)

    def in_order(self, role: str) -> Iterator[Batch]:
        """Yield all triplets of a role, with their defect images."""
        for some in batched(np.arange(self._counts[role]), self._settings.batch):
            yield self.of(role, np.array(some), np.zeros(len(some), np.bool_))
