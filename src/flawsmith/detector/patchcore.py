"""The baseline: PatchCore (Roth et al., CVPR 2022), distances to the nearest of a coreset of the normals' features.

A method that trains a DDPM and a student must do better than this memory, which trains nothing. As published: the two
coarser levels, 3 x 3 neighbours averaged with the zeros beyond the border, joined on the finer one's grid; a greedy
k-center coreset; the score is the map's maximum before the map is enlarged and blurred. The published re-weighting of
the score (eq. 7) is left out, as in the authors' own code.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flawsmith.detector.coreset import k_center
from flawsmith.detector.memory import nearest, rows_of
from flawsmith.detector.model import gaussian_kernel, smooth
from flawsmith.detector.student import enlarge
from flawsmith.detector.teacher import Teacher

SMOOTHING = 4.0  # sigma in pixels


class PatchCore(nn.Module):
    """Anomaly map = distance of each patch's feature to the nearest one of the memory; score = the map's maximum."""

    memory: Tensor
    kernel: Tensor

    def __init__(self, teacher: Teacher, memory: Tensor) -> None:
        super().__init__()
        self.teacher = teacher
        self.register_buffer("memory", memory)  # (M, C)
        self.register_buffer("kernel", gaussian_kernel(SMOOTHING))

    @classmethod
    @torch.inference_mode()
    def fit(
        cls,
        teacher: Teacher,
        batches: Iterable[Tensor],
        vectors: int,
        candidates: int,
        generator: torch.Generator,
        on_step: Callable[[int], object] = lambda chosen: None,
    ) -> "PatchCore":
        """Fill the memory from batches (B, 3, H, W) of normal images in [0, 1].

        Args:
            vectors: how many patches the memory keeps at most.
            candidates: how many patches of each image they are chosen from, drawn at random.
            on_step: gets the number of patches chosen since the last call.
        """
        found = []
        for batch in batches:
            for rows in _patches(teacher, batch).flatten(2).mT:  # (h * w, C)
                drawn = torch.randperm(len(rows), generator=generator)[:candidates]
                found.append(rows[drawn].half())  # halves the memory and hardly changes a distance
        rows = torch.cat(found)
        memory = rows[k_center(rows, vectors, generator, on_step, candidates=len(rows))].float()
        return cls(teacher, memory).eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [0, 1] → anomaly map (B, 1, H, W) and score (B,)."""
        patches = _patches(self.teacher, image)
        squared = nearest(rows_of(patches), self.memory, self.memory.new_zeros(len(self.memory)))
        distance = squared.clamp_min(0).sqrt().view(len(image), 1, *patches.shape[-2:])
        return smooth(enlarge(distance, image.shape[-2:]), self.kernel), distance.flatten(1).amax(dim=1)


def _patches(teacher: Teacher, image: Tensor) -> Tensor:
    """(B, 3, H, W) → (B, C, H/8, W/8): the two coarser levels, averaged over 3 x 3 neighbours and stacked."""
    middle, coarse = (F.avg_pool2d(level, 3, 1, 1) for level in teacher(image)[-2:])
    return torch.cat([middle, enlarge(coarse, middle.shape[-2:])], dim=1)
