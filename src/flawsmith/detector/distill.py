"""Asymmetric distillation: first the student learns to answer clean features, then the head to read the disagreement.

The teacher is frozen and images are not augmented here, so its features are computed once and kept in memory as half
floats where they fit: a step then costs the student alone.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from flawsmith.detector.losses import cosine_loss, segmentation_loss
from flawsmith.detector.memory import NormalMemory, as_places
from flawsmith.detector.model import Detector, feature_products
from flawsmith.detector.teacher import Features, Teacher
from flawsmith.devices import autocast
from flawsmith.randomness import numpy_generator
from flawsmith.resume import ResumePoint, Rows, check_finite
from flawsmith.schedule import learning_rate
from flawsmith.settings import DistillSettings
from flawsmith.triplets import FIT, VALIDATION, TripletArrays

BLOCK = 8  # images whose features are computed together
LOSS_COLUMNS = ("phase", "step", "loss", "validation")
OnStep = Callable[[int, Mapping[str, float]], None]


class FeatureBank:
    """Teacher features of images by index, computed on first use and kept while they fit into `limit_bytes`.

    Kernels round differently for other batches, so an image is always computed in the same company, whatever was asked
    for before: a resumed run then sees the very same features. That company is its block of BLOCK neighbours if all
    images fit, else itself alone, for a block whose members are not kept would be computed in vain.
    """

    def __init__(self, teacher: Teacher, images: NDArray[np.uint8], device: torch.device, limit_bytes: int) -> None:
        self.teacher, self.images, self.device = teacher, images, device
        self._kept: dict[int, Features] = {}
        size = sum(level.numel() * level.element_size() for level in self._compute(0, 1)[0])
        self._places = limit_bytes // size  # how many images fit
        self._block = BLOCK if self._places >= len(images) else 1

    def __getitem__(self, indices: NDArray[np.int64]) -> Features:
        """Features (B, C_k, h_k, w_k) float32 of the images at `indices`, on the device."""
        chosen = [self._one(int(index)) for index in indices]
        return tuple(torch.stack(level).to(self.device).float() for level in zip(*chosen, strict=True))

    def _one(self, index: int) -> Features:
        if index in self._kept:
            return self._kept[index]
        first = index // self._block * self._block
        fresh = self._compute(first, first + self._block)
        for offset, features in enumerate(fresh[: max(0, self._places - len(self._kept))]):
            self._kept[first + offset] = features
        return fresh[index - first]

    def _compute(self, first: int, end: int) -> list[Features]:
        with torch.inference_mode():
            batch = as_batch(self.images[first:end], self.device)
            with autocast(self.device):
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
        self.memory, self.bank, self.owners, self.sources = memory, bank, owners.to(bank.device), sources
        self._kept: dict[int, Tensor] = {}

    def __getitem__(self, indices: NDArray[np.int64]) -> Tensor:
        """Distances (B, 1, h, w) of the images at `indices`, on the device."""
        return torch.cat([self._one(int(index)) for index in indices])

    def _one(self, index: int) -> Tensor:
        if index not in self._kept:
            with torch.no_grad():
                places = as_places(self.bank[np.array([index])][-1])
                self._kept[index] = self.memory(places, self.owners == int(self.sources[index]))
        return self._kept[index]


@dataclass(frozen=True)
class Origins:
    """Which remembered normal is behind what, so that in training none recognises itself.

    Attributes:
        owners: (M,) the normal behind each key of the memory.
        sources: role → (N,) the normal behind each of that role's triplets, -1 if it is not remembered.
    """

    owners: Tensor
    sources: Mapping[str, NDArray[np.int64]]


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


Loss = Callable[[Batch], Tensor]


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


def distill(
    detector: Detector,
    fit: TripletArrays,
    validation: TripletArrays,
    settings: DistillSettings,
    resume: ResumePoint,
    device: torch.device,
    on_step: OnStep = lambda step, metrics: None,
    origins: Origins | None = None,
) -> list[list[Any]]:
    """Train `detector.student`, then `detector.head`, in place; return one row of LOSS_COLUMNS a step.

    Both phases keep the weights that did best on the synthetic validation triplets, whose source images no training
    triplet shares, and stop early after `patience` looks without improvement.

    Args:
        origins: of the detector's memory, which is filled already; None without memory.

    Raises:
        FlawsmithError: the loss became NaN.
    """
    detector.to(device)
    room = int(settings.cache_gigabytes * 2**30) // 2
    parts = {FIT: fit, VALIDATION: validation}
    banks = {
        role: tuple(FeatureBank(detector.teacher, images, device, room) for images in (part.normal, part.defect))
        for role, part in parts.items()
    }
    distances: dict[str, tuple[DistanceBank, ...]] = {}
    if detector.memory is not None and origins is not None:
        distances = {
            role: tuple(
                DistanceBank(detector.memory, bank, origins.owners, origins.sources[role]) for bank in banks[role]
            )
            for role in parts
        }
    masks = {
        role: F.avg_pool2d(torch.from_numpy(part.mask).float().unsqueeze(1), detector.stride).to(device)
        for role, part in parts.items()
    }

    def batch(role: str, indices: NDArray[np.int64], clean: NDArray[np.bool_]) -> Batch:
        """The triplets at `indices`; `clean` rows see the normal image."""
        normal, defect = banks[role]
        target = normal[indices]
        keep = torch.from_numpy(clean).to(device).view(-1, 1, 1, 1)
        seen = tuple(torch.where(keep, n, d) for n, d in zip(target, defect[indices], strict=True))
        mask = masks[role][torch.from_numpy(indices)] * ~keep
        remembered: Features = ()
        if distances:
            of_normal, of_defect = distances[role]
            remembered = (torch.where(keep, of_normal[indices], of_defect[indices]),)
        return Batch(target, seen, remembered, mask)

    def training_batch(phase: str, step: int) -> Batch:
        generator = numpy_generator(settings.seed, "distill", phase, step)
        indices = generator.integers(0, len(fit.ids), settings.batch)
        return batch(FIT, indices, np.arange(settings.batch) < round(settings.normal_share * settings.batch))

    def validation_batches() -> Iterator[Batch]:
        for first in range(0, len(validation.ids), settings.batch):
            indices = np.arange(first, min(first + settings.batch, len(validation.ids)))
            yield batch(VALIDATION, indices, np.zeros(len(indices), np.bool_))

    def student_loss(data: Batch) -> Tensor:
        return cosine_loss(data.target, detector.student(data.seen), settings.cosine_weights)

    def head_loss(data: Batch) -> Tensor:
        with torch.no_grad():
            read = (*feature_products(data.seen, detector.student(data.seen)), *data.remembered)
        logits = detector.head(read, data.mask.shape[-2:])
        return segmentation_loss(logits, data.mask, settings.focal_gamma, settings.l1_weight)

    def training_loss(phase: str, loss: Loss, step: int) -> Tensor:
        return loss(training_batch(phase, step))

    def validation_loss(loss: Loss) -> float:
        return float(np.mean([float(loss(data)) for data in validation_batches()]))

    def report(phase: str, offset: int, step: int, metrics: Mapping[str, float]) -> None:
        on_step(offset + step, {f"{phase}_{name}": value for name, value in metrics.items()})

    rows: list[list[Any]] = []
    for phase, module, loss, steps, peak in (
        ("student", detector.student, student_loss, settings.student_steps, settings.learning_rate),
        ("head", detector.head, head_loss, settings.head_steps, settings.head_learning_rate),
    ):
        point = ResumePoint(resume.folder / phase, resume.identity)
        offset = len(rows)

        phase_rows = _fit(
            phase,
            module,
            partial(training_loss, phase, loss),
            partial(validation_loss, loss),
            steps,
            peak,
            settings,
            point,
            device,
            partial(report, phase, offset),
        )
        rows += [[phase, offset + int(step), value, checked] for step, value, checked in phase_rows]
    return rows


def _fit(
    name: str,
    module: nn.Module,
    training_loss: Callable[[int], Tensor],
    validation_loss: Callable[[], float],
    steps: int,
    peak: float,
    settings: DistillSettings,
    resume: ResumePoint,
    device: torch.device,
    on_step: OnStep,
) -> Rows:
    """One phase: optimise `module`, look at validation now and then, leave the best weights in it."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=peak, weight_decay=1e-4)
    best = _Best()
    parts = {"module": module, "optimizer": optimizer, "best": best}
    first, rows = resume.load(parts)
    progress = tqdm(range(first, steps), f"distill {name}", initial=first, total=steps, disable=None)
    for step in progress:
        if best.stale >= settings.patience:
            break
        module.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, min(20, steps // 10), peak)
        with autocast(device):
            loss = training_loss(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = float(loss.detach())
        check_finite(value, step, "distill")
        metrics, checked = {"loss": value}, float("nan")
        if (step + 1) % settings.validate_every == 0 or step + 1 == steps:
            module.eval()
            with torch.inference_mode(), autocast(device):
                checked = validation_loss()
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
