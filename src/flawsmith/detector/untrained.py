"""A detector of memories alone: no triplets, no student, no segmentation head, so it is there in a minute."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from flawsmith.detector.config import DistillSettings, TeacherSettings
from flawsmith.detector.model import Detector, DetectorConfig
from flawsmith.detector.normals import Normals, fill_memories, memory_sizes
from flawsmith.detector.teacher import Teacher


@torch.no_grad()
def untrained_detector(
    frozen: Teacher,
    named: TeacherSettings,
    settings: DistillSettings,
    normals: Normals,
    calibration: Callable[[], Iterable[Tensor]],
) -> Detector:
    """Fill the memories with normals and calibrate; each memory counts the same, since no defect says which is better.

    Args:
        frozen: the teacher, on the device to compute on; `named` are its settings.
        calibration: yields batches (B, 3, H, W) in [0, 1] of the calibration normals.

    Returns:
        the detector, in eval mode on the teacher's device.

    Raises:
        UserError: the calibration normals do not differ.
    """
    sizes = memory_sizes(settings, frozen, len(normals.tiles), normals.data.shape)
    config = DetectorConfig.of(named, settings, normals.data.shape, sizes)
    detector = Detector(replace(config, decoder_channels=(), head_channels=0), frozen).eval()
    detector.to(frozen.mean.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    fill_memories(detector, normals, settings)
    raw = [detector.raw_maps(batch) for batch in calibration()]
    maps = {name: torch.cat([part[name] for part in raw]) for name in detector.names}
    detector.fit_standard(maps)
    detector.calibrate(detector.standardise(maps))
    return detector
