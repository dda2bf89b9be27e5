"""The baseline: nearest neighbours of teacher features, as in PatchCore (Roth et al., CVPR 2022), without a coreset.

A method that trains a DDPM and a student must do better than a memory of the normals' features.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flawsmith.detector.memory import MemoryBank, as_patches, memory_size
from flawsmith.detector.model import gaussian_kernel, smooth
from flawsmith.detector.student import enlarge
from flawsmith.detector.teacher import Teacher

SMOOTHING = 4.0  # sigma in pixels, PatchCore's


class KnnBaseline(nn.Module):
    """Anomaly map = distance of each patch's feature to the nearest one of the memory; score = the map's maximum."""

    memory: Tensor
    kernel: Tensor

    def __init__(self, teacher: Teacher, memory: Tensor) -> None:
        super().__init__()
        self.teacher = teacher
        self.register_buffer("memory", memory)  # (M, C)
        self.register_buffer("kernel", gaussian_kernel(SMOOTHING / teacher.strides[1]))

    @classmethod
    @torch.inference_mode()
    def fit(
        cls, teacher: Teacher, batches: Iterable[Tensor], vectors: int, generator: torch.Generator
    ) -> "KnnBaseline":
        """Fill the memory with `vectors` patches drawn at random from batches (B, 3, S, S) of normal images."""
        kept = []
        for batch in batches:
            rows = _patches(teacher, batch).flatten(0, 2)
            # no batch can need more: bounds memory while the number of batches is unknown
            kept.append(rows[torch.randperm(len(rows), generator=generator)[:vectors]].cpu())
        memory = torch.cat(kept)
        memory = memory[torch.randperm(len(memory), generator=generator)[:vectors]]
        return cls(teacher, memory.to(teacher.mean.device)).eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) in [0, 1] → anomaly map (B, 1, S, S) and score (B,)."""
        patches = _patches(self.teacher, image)  # (B, h, w, C)
        distance = torch.stack([self._nearest(part.flatten(0, 1)).view(part.shape[:2]) for part in patches])
        distance = distance.unsqueeze(1)
        maps = F.interpolate(smooth(distance, self.kernel), size=image.shape[-2:], mode="bilinear", align_corners=False)
        return maps, distance.flatten(1).amax(dim=1)

    def _nearest(self, rows: Tensor) -> Tensor:
        """Distance of each of (n, C) rows to its nearest memory vector, by |a-b|^2 = |a|^2 - 2ab + |b|^2."""
        squared = torch.addmm(self.memory.square().sum(dim=1), rows, self.memory.T, alpha=-2).amin(dim=1)
        return (squared + rows.square().sum(dim=1)).clamp_min(0).sqrt()


class MemoryBaseline(nn.Module):
    """The detector's own memory bank and nothing else: no triplets, no student, no head.

    Beside `KnnBaseline` it tells what the better memory bank is worth, apart from training. Map and score as there,
    from the cosine distance of each patch (see `memory`).
    """

    kernel: Tensor

    def __init__(self, teacher: Teacher, memory: MemoryBank) -> None:
        super().__init__()
        self.teacher, self.memory = teacher, memory
        self.register_buffer("kernel", gaussian_kernel(SMOOTHING / teacher.strides[1]))

    @classmethod
    @torch.inference_mode()
    def fit(
        cls, teacher: Teacher, batches: Iterable[Tensor], vectors: int, images: int, image_size: int
    ) -> "MemoryBaseline":
        """Keep `vectors` patches, or all, of batches (B, 3, S, S) of normals, `images` in all."""
        cells = image_size // teacher.strides[-1]
        size = memory_size(vectors, images, cells, cells)
        memory = MemoryBank(size, teacher.channels[-1]).to(teacher.mean.device)
        memory.fill((as_patches(teacher(batch)[-1]) for batch in batches), images)
        return cls(teacher, memory).eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) in [0, 1] → anomaly map (B, 1, S, S) and score (B,)."""
        _, middle, coarse = self.teacher(image)
        distance = self.memory(as_patches(coarse))
        maps = smooth(enlarge(distance, middle.shape[-2:]), self.kernel)
        return enlarge(maps, image.shape[-2:]), distance.flatten(1).amax(dim=1)


def _patches(teacher: Teacher, image: Tensor) -> Tensor:
    """(B, 3, S, S) → (B, S/8, S/8, C): the two coarser levels, averaged over 3 x 3 neighbours and stacked."""
    _, middle, coarse = (F.avg_pool2d(level, 3, 1, 1) for level in teacher(image))
    coarse = F.interpolate(coarse, size=middle.shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat([middle, coarse], dim=1).permute(0, 2, 3, 1)
