"""Asymmetric distillation: the student learns to answer normal features, then two heads learn to read where it fails.

Three phases, one after the other: student, segmentation head, localisation head.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flawsmith.data.triplets import FIT, VALIDATION
from flawsmith.detector.batches import BLOCK, HEAD, LOCALISATION, STUDENT, Batch, TrainingTriplets, TripletBatches
from flawsmith.detector.config import DistillSettings
from flawsmith.detector.losses import cosine_loss, segmentation_loss
from flawsmith.detector.model import Detector, feature_products
from flawsmith.detector.teacher import Features
from flawsmith.devices import Compute
from flawsmith.progress import bar
from flawsmith.training import ResumePoint, Rows, check_finite, learning_rate

LOSS_COLUMNS = ("phase", "step", "loss", "validation")
WARMUP = 20  # steps, or a tenth of all
OnStep = Callable[[int, Mapping[str, float]], None]
Loss = Callable[[Tensor, Tensor], Tensor]
"""Of logits and mask, both (B, 1, h, w)."""


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


class DistanceMaps:
    """The distance maps of every triplet, computed once: a step of the localisation head then costs next to nothing.

    Args:
        batches: of the triplets.
        distances: of a batch, (B, D, h, w), as `Detector.distances`.
        head: (B, D, h, w) → logits (B, 1, h, w).
        loss: of logits and mask.
    """

    def __init__(
        self, batches: TripletBatches, distances: Callable[[Batch], Tensor], head: nn.Module, loss: Loss
    ) -> None:
        self._batches, self._head, self._loss = batches, head, loss

        def cached(role: str, clean: bool) -> tuple[Tensor, Tensor]:
            """Distances (N, D, h, w) and masks (N, 1, h, w)."""
            # batch by batch: the features behind them are a hundred times as large
            parts = [(distances(data), data.mask) for data in batches.in_order(role, clean)]
            maps, masks = zip(*parts, strict=True)
            return torch.cat(maps), torch.cat(masks)

        self._fit = {clean: cached(FIT, clean) for clean in (False, True)}
        self._validation = cached(VALIDATION, False)

    @property
    def normal(self) -> Tensor:
        """Distances (N, D, h, w) of the normal images behind the training triplets."""
        return self._fit[True][0]

    def training_loss(self, step: int) -> Tensor:
        """The loss of a step's batch, mirrored at random.

        A mirrored map of distances is a possible one, whether or not the part may be mirrored.
        """
        drawn = self._batches.draw(LOCALISATION, step)
        axes = [axis for axis in (-2, -1) if drawn.generator.random() < 0.5]
        rows = [(self._fit[bool(clean)], int(index)) for clean, index in zip(drawn.clean, drawn.indices, strict=True)]
        seen, mask = (torch.stack([maps[which][index] for maps, index in rows]).flip(axes) for which in (0, 1))
        return self._loss(self._head(seen), mask)

    def validation_loss(self) -> float:
        """Mean loss over the validation triplets."""
        batches = zip(*(whole.split(BLOCK) for whole in self._validation), strict=True)
        return float(np.mean([float(self._loss(self._head(seen), mask)) for seen, mask in batches]))


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
    triplets: TrainingTriplets,
    settings: DistillSettings,
    resume: ResumePoint,
    compute: Compute,
    on_step: OnStep = lambda step, metrics: None,
) -> Rows:
    """Train student, segmentation head and localisation head in place; return one row of LOSS_COLUMNS a step.

    Each phase keeps the weights of the lowest loss on the validation triplets, whose source images no training triplet
    shares. It stops after `patience` validations without improvement.

    Raises:
        FlawsmithError: the loss became NaN.
    """
    detector.to(compute.device)
    batches = TripletBatches(detector, triplets, settings, compute)
    rows: list[list[Any]] = []
    for phase in _phases(detector, batches, settings):
        point, offset = ResumePoint(resume.folder / phase.name, resume.identity), len(rows)

        def report(step: int, metrics: Mapping[str, float], name: str = phase.name, offset: int = offset) -> None:
            on_step(offset + step, {f"{name}_{key}": value for key, value in metrics.items()})

        found = _fit(phase, settings, point, compute, report)
        rows += [[phase.name, offset + int(step), value, checked] for step, value, checked in found]
    return rows


def _phases(detector: Detector, batches: TripletBatches, settings: DistillSettings) -> Iterator[Phase]:
    """Yield the phases in order. What stands before a `yield` needs the phase before it trained."""

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

    detector.fit_norm_powers((products(data), data.seen) for data in batches.some_normals())
    yield on_batches(HEAD, detector.head, settings.head_steps, settings.head_learning_rate, head_loss)

    maps = DistanceMaps(batches, distances, detector.localisation, marking_loss)
    detector.localisation.normalise(maps.normal)
    steps, peak = settings.localisation_steps, settings.localisation_learning_rate
    yield Phase(LOCALISATION, detector.localisation, steps, peak, maps.training_loss, maps.validation_loss)


def _fit(phase: Phase, settings: DistillSettings, resume: ResumePoint, compute: Compute, on_step: OnStep) -> Rows:
    """Optimise the phase's module, validate it now and then, leave the best weights in it."""
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
            group["lr"] = learning_rate(step, steps, min(WARMUP, steps // 10), phase.peak)
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
