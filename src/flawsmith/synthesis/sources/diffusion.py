"""The method's own defects: outlines filled by the DDPM, whose reverse process is disturbed at every step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from diffusers import DDPMScheduler
from numpy.typing import NDArray

from flawsmith.devices import CPU, Compute
from flawsmith.diffusion.sampler import SamplingPlan, sample_disturbed
from flawsmith.diffusion.unet import Denoiser
from flawsmith.randomness import torch_generator
from flawsmith.synthesis.config import SynthesizeSettings
from flawsmith.synthesis.sources.base import Candidate, Defect, Made, Normals
from flawsmith.synthesis.sources.texture import blend, soft_defect


@dataclass(frozen=True)
class Diffusion:
    """A `DefectSource`; `compute` tells where the denoiser lies, and its precision."""

    settings: SynthesizeSettings
    normals: Normals
    denoiser: Denoiser | None
    scheduler: DDPMScheduler | None
    compute: Compute = CPU
    remedy: ClassVar[str] = "raise synthesize.strength, start or opacity, or "

    def draw(self, generator: np.random.Generator, index: int, _others: NDArray[np.int64]) -> Defect:
        """Draw strength and start of the reverse process, an opacity and an outline."""
        settings = self.settings
        values = {name: float(generator.uniform(*getattr(settings, name))) for name in ("strength", "start")}
        return soft_defect(generator, self.normals.shape, settings, self.normals.part(index), values)

    def make(self, batch: Sequence[Candidate]) -> list[Made]:
        """Sample the windows of a batch together, and blend them in.

        Raises:
            ValueError: there is no denoiser.
        """
        if self.denoiser is None or self.scheduler is None:
            raise ValueError("defects from diffusion need a denoiser and its scheduler")
        settings = self.settings
        plan = SamplingPlan(settings.steps, settings.rule, settings.disturb_until, settings.octaves, self.compute)
        windows = []
        for item in batch:
            top, left, side = item.defect.outline.window
            windows.append(self.normals.images[item.normal][:, top : top + side, left : left + side])
        sampled = sample_disturbed(
            self.denoiser,
            self.scheduler,
            torch.from_numpy(np.stack(windows).astype(np.float32) / np.float32(127.5) - np.float32(1)),
            [item.defect.values["start"] for item in batch],
            [item.defect.values["strength"] for item in batch],
            plan,
            [torch_generator(settings.seed, "texture", item.role, item.number) for item in batch],
        )
        textures = ((sampled.numpy() + np.float32(1)) * np.float32(127.5)).astype(np.float32)
        return [
            blend(self.normals.images[item.normal], texture, item.defect, settings)
            for item, texture in zip(batch, textures, strict=True)
        ]
