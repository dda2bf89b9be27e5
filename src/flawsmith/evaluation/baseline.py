"""The baseline that a detector must beat: nearest neighbours of the same frozen teacher's features."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from flawsmith.data.dataset import iter_tiles, plan_tiles
from flawsmith.detector.knn import KnnBaseline, MemoryBaseline
from flawsmith.detector.teacher import build_teacher
from flawsmith.layout import Layout
from flawsmith.randomness import torch_generator
from flawsmith.sequences import batched


def fit_baseline(layout: Layout, paths: Sequence[Path], device: torch.device) -> KnnBaseline | MemoryBaseline:
    """Fit the baseline that `evaluate.baseline` names to normal images alone."""
    settings, data = layout.settings.evaluate, layout.data
    tiles = plan_tiles(paths, data)
    batches = (torch.from_numpy(np.stack(part)).to(device) for part in batched(iter_tiles(tiles, data), settings.batch))
    teacher = build_teacher(layout.settings.teacher, layout.root).to(device)
    if settings.baseline == "cosine":
        return MemoryBaseline.fit(teacher, batches, settings.baseline_vectors, len(tiles), data.image_size)
    return KnnBaseline.fit(teacher, batches, settings.baseline_vectors, torch_generator(settings.seed, "baseline"))
