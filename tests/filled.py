"""Fill a detector's memories from a few images at hand."""

import torch
from torch import Tensor

from flawsmith.detector.config import DistillSettings, TeacherSettings
from flawsmith.detector.memory import MEMORIES, rows_of
from flawsmith.detector.model import Detector, DetectorConfig
from flawsmith.detector.normals import memory_sizes
from flawsmith.detector.teacher import Teacher


@torch.no_grad()
def detector_of(
    teacher: Teacher, named: TeacherSettings, settings: DistillSettings, normals: Tensor
) -> tuple[Detector, dict[str, Tensor]]:
    """An untrained detector with patches of normals (B, 3, H, W) in its memories, and the image behind each patch."""
    shape = (normals.shape[-2], normals.shape[-1])
    sizes = memory_sizes(settings, teacher, len(normals), shape)
    torch.manual_seed(0)
    detector = Detector(DetectorConfig.of(named, settings, shape, sizes), teacher).eval()
    features, source_ids = teacher(normals), {}
    for name, bank in detector.banks.items():
        patches = MEMORIES[name].patches(features)
        rows = rows_of(patches)
        kept = bank.fill(rows, torch.Generator().manual_seed(1))
        source_ids[name] = kept // (len(rows) // len(normals))
        bank.allow(bank.tally(patches, source_ids[name] == torch.arange(len(normals))[:, None]))
    return detector, source_ids


@torch.no_grad()
def calibrate(detector: Detector, normals: Tensor) -> None:
    """Set all units from normals (B, 3, H, W)."""
    raw = detector.raw_maps(normals)
    detector.fit_standard(raw)
    detector.calibrate(detector.standardise(raw))
