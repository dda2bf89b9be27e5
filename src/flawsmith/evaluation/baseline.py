"""The baseline that a detector must beat: PatchCore on the same frozen teacher's features."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from flawsmith.data.dataset import iter_tiles, plan_tiles
from flawsmith.detector.patchcore import PatchCore
from flawsmith.detector.teacher import build_teacher
from flawsmith.layout import Layout
from flawsmith.progress import bar
from flawsmith.randomness import torch_generator
from flawsmith.sequences import batched


def fit_baseline(layout: Layout, paths: Sequence[Path], device: torch.device) -> PatchCore:
    """Fit the baseline to normal images alone."""
    settings, data = layout.settings.evaluate, layout.data
    tiles = plan_tiles(paths, data)
    batches = (torch.from_numpy(np.stack(part)).to(device) for part in batched(iter_tiles(tiles, data), settings.batch))
    teacher = build_teacher(layout.settings.teacher, layout.root).to(device)
    candidates = math.ceil(settings.baseline_candidates / len(tiles))
    generator = torch_generator(settings.seed, "baseline")
    with bar(what="baseline", total=settings.baseline_vectors, unit="vector") as progress:
        return PatchCore.fit(teacher, batches, settings.baseline_vectors, candidates, generator, progress.update)
