"""Asymmetric distillation: the student learns to answer normal features, then a head learns to read where it fails.

Two phases, one after the other: student, segmentation head. Between them each map gets its units and its weight.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from flawsmith.data.triplets import FIT, VALIDATION
from flawsmith.detector.batches import BLOCK, HEAD, STUDENT, Batch, TrainingTriplets, TripletBatches
from flawsmith.detector.config import DistillSettings
from flawsmith.detector.losses import cosine_loss, segmentation_loss
from flawsmith.detector.model import Detector
from flawsmith.devices import Compute
from flawsmith.progress import bar
from flawsmith.training import ResumePoint, Rows, check_finite, learning_rate

LOSS_COLUMNS = ("phase", "step", "loss", "validation")
WARMUP = 20  # steps, or a tenth of all
GAIN_JITTER = 0.4  # deviation of the logarithm of a map's gain in the head's training
LEFT_OUT = 0.25  # chance that the head does not see a map
HEAD_MARGIN = 0.02  # average precision by which the head must mark better than the maps without it
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


class HeadTraining:
    """The standardised maps of every textured triplet, computed once: a step of the head then costs next to nothing.

    In training each map's gain is jittered and now and then a map is left out, so that the head cannot rely on the one
    map that synthetic defects happen to excite most.
    """

    def __init__(self, batches: TripletBatches, head: nn.Module, loss: Loss) -> None:
        self._batches, self._head, self._loss = batches, head, loss
        self.maps = {role: {clean: batches.maps(role, clean) for clean in (False, True)} for role in (FIT, VALIDATION)}
        self._masks = {role: batches.masks(role) for role in (FIT, VALIDATION)}

    def both_roles(self, clean: bool) -> Tensor:
        """Standardised maps (N, K, h, w) of all textured triplets."""
        return torch.cat([self.maps[role][clean] for role in (FIT, VALIDATION)])

    def training_loss(self, step: int) -> Tensor:
        """The loss of a step's batch, mirrored at random.

        A mirrored map of distances is a possible one, whether or not the part may be mirrored.
        """
        drawn, maps = self._batches.draw(HEAD, step), self.maps[FIT]
        chosen = zip(drawn.clean.tolist(), drawn.indices.tolist(), strict=True)
        seen = torch.stack([maps[clean][index] for clean, index in chosen])
        clean = torch.from_numpy(drawn.clean).to(seen.device).view(-1, 1, 1, 1)
        mask = self._masks[FIT][torch.from_numpy(drawn.indices)] * ~clean
        gain = np.exp(GAIN_JITTER * drawn.generator.normal(size=seen.shape[:2]))
        kept = drawn.generator.random(seen.shape[:2]) >= LEFT_OUT
        kept[~kept.any(axis=1)] = True
        factor = torch.from_numpy((gain * kept).astype(np.float32)).to(seen.device)
        axes = [axis for axis in (-2, -1) if drawn.generator.random() < 0.5]
        return self._loss(self._head((seen * factor[:, :, None, None]).flip(axes)), mask.flip(axes))

    def validation_loss(self) -> float:
        """Mean loss over the defect images of the validation triplets."""
        batches = zip(self.maps[VALIDATION][False].split(BLOCK), self._masks[VALIDATION].split(BLOCK), strict=True)
        return float(np.mean([float(self._loss(self._head(seen), mask)) for seen, mask in batches]))

    def marks(self, answer: Callable[[Tensor], Tensor]) -> float:
        """Average precision over the cells of the validation triplets, normal images included, of an answer to
        standardised maps; nan if no cell is defective by half."""
        maps = self.maps[VALIDATION]
        values = torch.cat([answer(part) for which in (False, True) for part in maps[which].split(BLOCK)])
        mask = torch.cat([self._masks[VALIDATION] >= 0.5, torch.zeros_like(self._masks[VALIDATION], dtype=torch.bool)])
        if not mask.any():
            return float("nan")
        return float(average_precision_score(mask.flatten().cpu().numpy(), values.flatten().float().cpu().numpy()))


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
    calibration: Callable[[], Iterable[Tensor]],
    settings: DistillSettings,
    resume: ResumePoint,
    compute: Compute,
    on_step: OnStep = lambda step, metrics: None,
) -> Rows:
    """Train student and segmentation head in place and set how their maps count; return one row of LOSS_COLUMNS a step.

    Each phase keeps the weights of the lowest loss on the validation triplets, whose source images no training triplet
    shares. It stops after `patience` validations without improvement.

    Args:
        calibration: yields batches (B, 3, H, W) in [0, 1] of the calibration normals.

    Raises:
        FlawsmithError: the loss became NaN.
        UserError: the calibration normals do not differ.
    """
    detector.to(compute.device)
    batches = TripletBatches(detector, triplets, settings, compute)
    rows: list[list[Any]] = []

    def train(phase: Phase) -> None:
        point, offset = ResumePoint(resume.folder / phase.name, resume.identity), len(rows)

        def report(step: int, metrics: Mapping[str, float]) -> None:
            on_step(offset + step, {f"{phase.name}_{key}": value for key, value in metrics.items()})

        found = _fit(phase, settings, point, compute, report)
        rows.extend([phase.name, offset + int(step), value, checked] for step, value, checked in found)

    train(_student_phase(detector, batches, settings))
    detector.eval()
    with torch.no_grad():  # in float32, as a model that is used sees them
        raw = [detector.raw_maps(batch) for batch in calibration()]
        normal = {name: torch.cat([maps[name] for maps in raw]) for name in detector.names}
        detector.fit_standard(normal)

    def marking_loss(logits: Tensor, mask: Tensor) -> Tensor:
        return segmentation_loss(logits, mask, settings.focal_gamma, settings.l1_weight)

    head = HeadTraining(batches, detector.head, marking_loss)
    detector.fit_weights(head.both_roles(True), head.both_roles(False))
    detector.fit_trust(normal, head.marks(detector.answered), head.marks(detector.remembered))
    steps, peak = settings.head_steps, settings.head_learning_rate
    train(Phase(HEAD, detector.head, steps, peak, head.training_loss, head.validation_loss))
    with torch.no_grad():
        # what training made must beat what needs none, or it is left out
        without = max(head.marks(answer) for answer in (detector.drawn, detector.remembered))
        better = head.marks(detector.head) > without + HEAD_MARGIN
        detector.head_share.fill_(0.5 if better else 0.0)
        detector.calibrate(detector.standardise(normal))
    return rows


def _student_phase(detector: Detector, batches: TripletBatches, settings: DistillSettings) -> Phase:
    def loss(data: Batch) -> Tensor:
        return cosine_loss(data.target, detector.student(data.seen), settings.cosine_weights)

    def training_loss(step: int) -> Tensor:
        drawn = batches.draw(STUDENT, step)
        return loss(batches.of(FIT, drawn.indices, drawn.clean))

    def validation_loss() -> float:
        return float(np.mean([float(loss(data)) for data in batches.in_order(VALIDATION)]))

    steps, peak = settings.student_steps, settings.learning_rate
    return Phase(STUDENT, detector.student, steps, peak, training_loss, validation_loss)


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
