"""Asymmetric distillation: first the student learns to answer clean features, then the heads to read the disagreement.

The teacher is frozen and images are not augmented here, so its features are computed once and kept in memory as half
floats where they fit: a step then costs the student alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from flawsmith.data.triplets import FIT, VALIDATION, TripletArrays
from flawsmith.detector.config import DistillSettings
from flawsmith.detector.losses import cosine_loss, segmentation_loss
from flawsmith.detector.memory import NormalMemory, as_places
from flawsmith.detector.model import Detector, feature_products
from flawsmith.detector.symmetry import evenly
from flawsmith.detector.teacher import Features, Teacher
from flawsmith.devices import Compute
from flawsmith.progress import bar
from flawsmith.randomness import numpy_generator
from flawsmith.training import ResumePoint, Rows, check_finite, learning_rate

BLOCK = 8  # images whose features are computed together
STUDENT, HEAD, LOCATOR = "student", "head", "locator"  # the phases in order
LOSS_COLUMNS = ("phase", "step", "loss", "validation")
OnStep = Callable[[int, Mapping[str, float]], None]


class FeatureBank:
    """Teacher features of images by index, computed on first use and kept while they fit into `limit_bytes`.

    Kernels round differently for other batches, so an image is always computed in the same company, whatever was asked
    for before: a resumed run then sees the very same features. That company is its block of BLOCK neighbours if all
    images fit, else itself alone, for a block whose members are not kept would be computed in vain.
    """

    def __init__(self, teacher: Teacher, images: NDArray[np.uint8], compute: Compute, limit_bytes: int) -> None:
        self.teacher, self.images, self.compute = teacher, images, compute
        self._kept: dict[int, Features] = {}
        size = sum(level.numel() * level.element_size() for level in self._compute(0, 1)[0])
        self._places = limit_bytes // size  # how many images fit
        self._block = BLOCK if self._places >= len(images) else 1

    def __getitem__(self, indices: NDArray[np.int64]) -> Features:
        """Features (B, C_k, h_k, w_k) float32 of the images at `indices`, on the device."""
        return self.together([self.one(int(index)) for index in indices])

    def together(self, chosen: Sequence[Features]) -> Features:
        """What `one` gave for several images, of this bank or another, as one batch of float32 on the device."""
        with self.compute.exactly():  # autocast knows no half floats
            return tuple(torch.stack(level).to(self.compute.device).float() for level in zip(*chosen, strict=True))

    def one(self, index: int) -> Features:
        """Features (C_k, h_k, w_k) float16 of one image, where they are kept."""
        if index in self._kept:
            return self._kept[index]
        first = index // self._block * self._block
        fresh = self._compute(first, first + self._block)
        for offset, features in enumerate(fresh[: max(0, self._places - len(self._kept))]):
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
    """Distances to the memory for the images of a `FeatureBank`, found on first use and kept.

    The normal image a triplet was made from is itself remembered: with it, every defect would stand out as it never
    does at inspection, where no part was seen before. Its keys therefore do not count here.

    Args:
        owners: (M,) whose each key is, as an index of the remembered normals.
        sources: (N,) the remembered normal behind each image of the bank, -1 if it is not remembered.
    """

    def __init__(self, memory: NormalMemory, bank: FeatureBank, owners: Tensor, sources: NDArray[np.int64]) -> None:
        self.memory, self.bank, self.owners, self.sources = memory, bank, owners.to(bank.compute.device), sources
        self._kept: dict[int, Tensor] = {}

    def one(self, index: int) -> Tensor:
        """Distances (1, 1, h, w) of one image, on the device."""
        if index not in self._kept:
            # what is kept must not depend on who asks first: a training step (under autocast) or a resumed run's lesson
            with torch.no_grad(), self.bank.compute.exactly():
                places = as_places(self.bank.together([self.bank.one(index)])[-1])
                self._kept[index] = self.memory(places, self.owners == int(self.sources[index]))
        return self._kept[index]


@dataclass(frozen=True)
class Origins:
    """What a role's triplets were made from, as far as training has to know.

    Attributes:
        sources: (N,) the remembered normal behind each triplet, -1 if it is not remembered: none may recognise itself.
        textured: places of the triplets whose defect has a texture of its own. The head learns from these alone: of
            shades, which change the light and not the texture, it learns to take any exposure for a defect
            (docs/experiments.md, rounds 4 and 12). Student and locator learn from all.
    """

    sources: NDArray[np.int64]
    textured: NDArray[np.int64]

    @classmethod
    def unknown(cls, count: int) -> "Origins":
        """Of triplets made from images that no memory holds, with a texture in each."""
        return cls(np.full(count, -1), np.arange(count))


@dataclass(frozen=True)
class Provenance:
    """Which normals stand behind what the memory holds and behind the triplets, so that none may recognise itself.

    Attributes:
        owners: (M,) the normal behind each key of the detector's memory, which is filled already; None without memory.
        origins: role → what is known of its triplets; `Origins.unknown` of a role that is not named.
    """

    owners: Tensor | None = None
    origins: Mapping[str, Origins] = field(default_factory=dict)


@dataclass(frozen=True)
class Draw:
    """Which triplets a training step sees: their `indices` (B,), of which the normal image (`clean`, B), and the step's
    generator for whatever else is drawn."""

    indices: NDArray[np.int64]
    clean: NDArray[np.bool_]
    generator: np.random.Generator


@dataclass(frozen=True)
class Batch:
    """One training batch.

    Attributes:
        target: teacher features of the clean images, (B, C_k, h_k, w_k) a level.
        seen: teacher features of the images seen: defect images, clean ones for a part of the rows.
        remembered: distance of `seen` to the memory, (B, 1, h, w); empty without memory.
        mask: (B, 1, h, w) in [0, 1], the defective share of each cell of the maps.
    """

    target: Features
    seen: Features
    remembered: Features
    mask: Tensor


def as_batch(images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(B, 3, H, W) uint8 → float32 in [0, 1], channels last."""
    batch = torch.from_numpy(images).to(device).float() / 255
    return batch.contiguous(memory_format=torch.channels_last)


@dataclass
class _Best:
    """The best state so far by validation; a part of the checkpoint."""

    value: float = float("inf")
    step: int = -1
    stale: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)

    def look(self, value: float, step: int, module: nn.Module) -> None:
        if value < self.value:
            self.value, self.step, self.stale = value, step, 0
            self.state = {key: tensor.detach().cpu().clone() for key, tensor in module.state_dict().items()}
        else:
            self.stale += 1


class TripletBatches:
    """Batches of triplets by role, with all that is computed of their images but once.

    Args:
        parts: role → triplets.
        provenance: as of `distill`.
    """

    def __init__(
        self,
        detector: Detector,
        parts: Mapping[str, TripletArrays],
        settings: DistillSettings,
        compute: Compute,
        provenance: Provenance = Provenance(),
    ) -> None:
        owners, origins = provenance.owners, provenance.origins
        self._counts = {role: len(part.ids) for role, part in parts.items()}
        self._origins = {role: origins.get(role, Origins.unknown(count)) for role, count in self._counts.items()}
        self._settings, self._device = settings, compute.device
        room = int(settings.cache_gigabytes * 2**30) // (2 * len(parts))  # normal and defect images of each role
        self._banks = {
            role: tuple(FeatureBank(detector.teacher, images, compute, room) for images in (part.normal, part.defect))
            for role, part in parts.items()
        }
        self._distances: dict[str, tuple[DistanceBank, ...]] = {}
        if detector.memory is not None and owners is not None:
            for role, banks in self._banks.items():
                sources = self._origins[role].sources
                self._distances[role] = tuple(DistanceBank(detector.memory, bank, owners, sources) for bank in banks)
        self._masks = {
            role: F.avg_pool2d(torch.from_numpy(part.mask).float().unsqueeze(1), detector.stride).to(compute.device)
            for role, part in parts.items()
        }

    def of(self, role: str, indices: NDArray[np.int64], clean: NDArray[np.bool_]) -> Batch:
        """The triplets at `indices`; `clean` rows see the normal image."""
        normal, defect = self._banks[role]
        rows = [(int(index), bool(kept)) for index, kept in zip(indices, clean, strict=True)]
        target = normal[indices]
        seen = target
        if not clean.all():
            seen = normal.together([(normal if kept else defect).one(index) for index, kept in rows])
        keep = torch.from_numpy(clean).to(self._device).view(-1, 1, 1, 1)
        mask = self._masks[role][torch.from_numpy(indices)] * ~keep
        remembered: Features = ()
        if self._distances:
            of_normal, of_defect = self._distances[role]
            remembered = (torch.cat([(of_normal if kept else of_defect).one(index) for index, kept in rows]),)
        return Batch(target, seen, remembered, mask)

    def shown_in(self, phase: str, role: str) -> NDArray[np.int64]:
        """Indices of the role's triplets that the phase learns from, or is judged by."""
        return self._origins[role].textured if phase == HEAD else np.arange(self._counts[role])

    def draw(self, phase: str, step: int) -> Draw:
        """What a step of training sees."""
        generator, settings = numpy_generator(self._settings.seed, "distill", phase, step), self._settings
        shown = self.shown_in(phase, FIT)
        indices = shown[generator.integers(0, len(shown), settings.batch)]
        return Draw(indices, np.arange(settings.batch) < round(settings.normal_share * settings.batch), generator)

    def in_order(self, role: str, clean: bool, indices: NDArray[np.int64] | None = None) -> Iterator[Batch]:
        """All triplets of a role, or those at `indices`: their normal images if `clean`, else their defect images."""
        wanted, size = np.arange(self._counts[role]) if indices is None else indices, self._settings.batch
        for first in range(0, len(wanted), size):
            some = wanted[first : first + size]
            yield self.of(role, some, np.full(len(some), clean))

    def some_normals(self) -> Iterator[Batch]:
        """An even part of the normal images behind the training triplets."""
        return self.in_order(FIT, True, evenly(self._counts[FIT]))


@dataclass(frozen=True)
class Lesson:
    """What the locator reads of some images, and what it should answer.

    Attributes:
        distances: (N, D, h, w), as `Detector.distances`.
        mask: (N, 1, h, w), as of `Batch`.
    """

    distances: Tensor
    mask: Tensor


class LocatorLessons:
    """What the locator reads of each triplet, found once: a few numbers a place, so a step costs next to nothing.

    Args:
        batches: of the triplets.
        distances: of a batch, (B, D, h, w), as `Detector.distances`.
        locator: (B, D, h, w) → logits (B, 1, h, w).
        loss: of logits and mask.
    """

    def __init__(
        self,
        batches: TripletBatches,
        distances: Callable[[Batch], Tensor],
        locator: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self._batches, self._locator, self._loss = batches, locator, loss

        def found(role: str, clean: bool) -> Lesson:
            # batch by batch: the features behind it take a hundred times the room
            parts = [(distances(data), data.mask) for data in batches.in_order(role, clean)]
            return Lesson(*map(torch.cat, zip(*parts, strict=True)))

        self._fit = {clean: found(FIT, clean) for clean in (False, True)}
        self._validation = found(VALIDATION, False)

    @property
    def normal(self) -> Tensor:
        """Distances (N, D, h, w) of the normal images behind the training triplets."""
        return self._fit[True].distances

    def training_loss(self, step: int) -> Tensor:
        """The loss on what the step draws."""
        drawn = self._batches.draw(LOCATOR, step)
        # a mirrored map of distances is one that might have been, whether or not the part may be mirrored
        sides = [side for side in (-2, -1) if drawn.generator.random() < 0.5]
        rows = [(self._fit[bool(clean)], int(index)) for clean, index in zip(drawn.clean, drawn.indices, strict=True)]
        seen = torch.stack([lesson.distances[index] for lesson, index in rows])
        mask = torch.stack([lesson.mask[index] for lesson, index in rows])
        return self._loss(self._locator(seen.flip(sides)), mask.flip(sides))

    def validation_loss(self) -> float:
        """Mean loss over the validation triplets."""
        whole = self._validation
        batches = zip(whole.distances.split(BLOCK), whole.mask.split(BLOCK), strict=True)
        return float(np.mean([float(self._loss(self._locator(seen), mask)) for seen, mask in batches]))


@dataclass(frozen=True)
class Phase:
    """One part of the detector to train, while the others stay as they are."""

    name: str
    module: nn.Module
    steps: int
    peak: float  # learning rate
    training_loss: Callable[[int], Tensor]  # of a step
    validation_loss: Callable[[], float]


def distill(
    detector: Detector,
    fit: TripletArrays,
    validation: TripletArrays,
    settings: DistillSettings,
    resume: ResumePoint,
    compute: Compute,
    on_step: OnStep = lambda step, metrics: None,
    provenance: Provenance = Provenance(),
) -> Rows:
    """Train student, head and locator of the detector, one after the other and in place; return one row of LOSS_COLUMNS
    a step.

    Each phase keeps the weights that did best on the synthetic validation triplets, whose source images no training
    triplet shares, and stops early after `patience` looks without improvement.

    Args:
        provenance: whose the memory's keys are and what the triplets were made from; without it no key is left out.

    Raises:
        FlawsmithError: the loss became NaN.
    """
    detector.to(compute.device)
    batches = TripletBatches(detector, {FIT: fit, VALIDATION: validation}, settings, compute, provenance)
    rows: list[list[Any]] = []
    for phase in _phases(detector, batches, settings):
        point, offset = ResumePoint(resume.folder / phase.name, resume.identity), len(rows)

        def report(step: int, metrics: Mapping[str, float], name: str = phase.name, offset: int = offset) -> None:
            on_step(offset + step, {f"{name}_{key}": value for key, value in metrics.items()})

        found = _fit(phase, settings, point, compute, report)
        rows += [[phase.name, offset + int(step), value, checked] for step, value, checked in found]
    return rows


def _phases(detector: Detector, batches: TripletBatches, settings: DistillSettings) -> Iterator[Phase]:
    """The phases in order; what stands between two of them is done when the one before has been trained."""

    def student_loss(data: Batch) -> Tensor:
        return cosine_loss(data.target, detector.student(data.seen), settings.cosine_weights)

    def marking_loss(logits: Tensor, mask: Tensor) -> Tensor:
        return segmentation_loss(logits, mask, settings.focal_gamma, settings.l1_weight)

    def products(data: Batch) -> Features:
        with torch.no_grad():
            return feature_products(data.seen, detector.student(data.seen))

    def head_loss(data: Batch) -> Tensor:
        return marking_loss(detector.head((*products(data), *data.remembered), data.mask.shape[-2:]), data.mask)

    def on_batches(name: str, module: nn.Module, steps: int, peak: float, loss: Callable[[Batch], Tensor]) -> Phase:
        shown = batches.shown_in(name, VALIDATION)

        def training_loss(step: int) -> Tensor:
            drawn = batches.draw(name, step)
            return loss(batches.of(FIT, drawn.indices, drawn.clean))

        def validation_loss() -> float:
            return float(np.mean([float(loss(data)) for data in batches.in_order(VALIDATION, False, shown)]))

        return Phase(name, module, steps, peak, training_loss, validation_loss)

    def distances(data: Batch) -> Tensor:
        with torch.no_grad():
            return detector.distances(data.seen, products(data), data.remembered)

    yield on_batches(STUDENT, detector.student, settings.student_steps, settings.learning_rate, student_loss)

    detector.fit_exponents((products(data), data.seen) for data in batches.some_normals())
    yield on_batches(HEAD, detector.head, settings.head_steps, settings.head_learning_rate, head_loss)

    lessons = LocatorLessons(batches, distances, detector.locator, marking_loss)
    detector.locator.normalise(lessons.normal)
    yield Phase(
        LOCATOR,
        detector.locator,
        settings.locator_steps,
        settings.locator_learning_rate,
        lessons.training_loss,
        lessons.validation_loss,
    )


def _fit(phase: Phase, settings: DistillSettings, resume: ResumePoint, compute: Compute, on_step: OnStep) -> Rows:
    """Optimise the phase's module, look at validation now and then, leave the best weights in it."""
    module, steps = phase.module, phase.steps
    optimizer = torch.optim.AdamW(module.parameters(), lr=phase.peak, weight_decay=1e-4)
    best = _Best()
    parts = {"module": module, "optimizer": optimizer, "best": best}
    first, rows = resume.load(parts)
    progress = bar(range(first, steps), f"distill {phase.name}", steps, "step", done=first)
    for step in progress:
        if best.stale >= settings.patience:
            break
        module.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, min(20, steps // 10), phase.peak)
        with compute.autocast():
            loss = phase.training_loss(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = float(loss.detach())
        check_finite(value, step, "distill")
        metrics, checked = {"loss": value}, float("nan")
        if (step + 1) % settings.validate_every == 0 or step + 1 == steps:
            module.eval()
            with torch.inference_mode(), compute.autocast():
                checked = phase.validation_loss()
            check_finite(checked, step, "distill")
            metrics["validation"] = checked
            best.look(checked, step, module)
        rows.append([step, value, checked])
        on_step(step, metrics)
        progress.set_postfix(loss=f"{value:.4f}", best=f"{best.value:.4f}", refresh=False)
        if (step + 1) % settings.checkpoint_every == 0 or step + 1 == steps:
            resume.save(parts, step + 1, rows)
    module.load_state_dict(best.state)
    module.eval()
    return rows
