"""The memories: how far each patch of an image is from the nearest patch of a normal image.

As in PatchCore (Roth et al., CVPR 2022) with a coreset, with two differences. A feature is divided by its length plus
its image's mean length: what is weak counts little, and the contrast of what is strong does not count. And distances
are power distances (Aurenhammer 1987): |x - m|^2 less the squared distance that normal patches have where m is the
nearest. So a thread or an edge, where no two normal parts agree, is not far from normal, and a smooth shaft that is
somewhat off is.

Nothing reads which patch was found: two may be equally near, and the last bit of a sum would then decide between them.
The least power distance is continuous.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flawsmith.detector.coreset import k_center
from flawsmith.detector.student import enlarge
from flawsmith.detector.teacher import Features, Teacher

CHUNK = 512  # patches compared at once: (h * w, CHUNK) floats of an image of 256 pixels, 2 MB, stay in a cache
POOLED = 3  # cells a side that are averaged into a patch, PatchCore's neighbourhood
NEIGHBOURS = 8  # patches whose allowances are averaged
PRIOR = 5.0  # normal patches that an allowance is worth before any was seen
TINY = 1e-6  # a feature length that is none


class MemoryBank(nn.Module):
    """`patches` (M, C) float16 of normal parts, and the `allowance` (M,) of each: the squared distance that is normal
    there. Half floats change a squared distance by about 1e-3 of a feature's length and halve the file."""

    patches: Tensor
    allowance: Tensor

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("patches", torch.zeros(size, channels, dtype=torch.float16))
        self.register_buffer("allowance", torch.zeros(size))

    def forward(self, patches: Tensor, excluded: Tensor | None = None) -> Tensor:
        """Least power distance (B, 1, h, w) of patches (B, C, h, w); below 0 where normal parts differ more.

        Args:
            excluded: (B, M) bool, patches of the bank that do not count for an image.
        """
        batch, _, height, width = patches.shape
        rows = rows_of(patches)
        if excluded is None:
            least = nearest(rows, self.patches, self.allowance)
        else:
            images = zip(rows.chunk(batch), self.allowance.masked_fill(excluded, -torch.inf), strict=True)
            least = torch.cat([nearest(image, self.patches, allowance) for image, allowance in images])
        return least.view(batch, 1, height, width)

    @torch.no_grad()
    def fill(
        self, rows: Tensor, generator: torch.Generator, on_step: Callable[[int], object] = lambda chosen: None
    ) -> Tensor:
        """Keep M of rows (N, C), N >= M, by greedy k-center (`on_step` as there); return their indices (M,)."""
        kept = k_center(rows, len(self.patches), generator, on_step, candidates=len(rows))
        self.patches.copy_(rows[kept])
        self.allowance.zero_()
        return kept

    @torch.no_grad()
    def tally(self, patches: Tensor, own: Tensor) -> Tensor:
        """(2, M): how many of patches (B, C, h, w) are nearest to each of the bank, and the sum of their squared
        distances to it.

        Args:
            own: (B, M) bool, patches of the bank that come from the image itself and do not count.
        """
        found, kept = torch.zeros(2, len(self.patches), device=own.device), self.patches.float()
        for image, allowance in zip(patches, torch.where(own, -torch.inf, 0.0), strict=True):
            for rows in rows_of(image[None]).split(CHUNK):
                least, index = _compared(rows, kept, allowance).min(dim=1)
                squared = (least + rows.square().sum(dim=1)).clamp_min(0)
                found.index_add_(1, index, torch.stack([torch.ones_like(squared), squared]))
        return found

    @torch.no_grad()
    def allow(self, found: Tensor) -> None:
        """Set the allowances from the sum of `tally` (2, M) over normals.

        Each is the mean squared distance of the normal patches whose nearest patch of the bank is it or one of the
        NEIGHBOURS nearest to it. PRIOR patches of the mean over all are added, since some places saw none.
        """
        (seen, total), kept = found, self.patches.float()
        if not seen.any():
            return
        count, none = min(NEIGHBOURS, len(kept)), torch.zeros_like(seen)
        compared = (_compared(part, kept, none) for part in kept.split(CHUNK))
        neighbours = torch.cat([part.topk(count, largest=False).indices for part in compared])
        mean = total.sum() / seen.sum()
        self.allowance.copy_((total[neighbours].sum(1) + PRIOR * mean) / (seen[neighbours].sum(1) + PRIOR))


@dataclass(frozen=True)
class MemoryKind:
    """What a memory compares: some of the teacher's levels, joined on the grid of one of them.

    Attributes:
        levels: indices of the levels, finest first.
        grid: index of the level whose cells are the patches.
    """

    levels: tuple[int, ...]
    grid: int

    def patches(self, features: Features) -> Tensor:
        """The patches (B, C, h, w) of a teacher's features.

        A finer level is folded, so that nothing small is lost and no cell is added. A coarser one is enlarged.
        """
        size = features[self.grid].shape[-2:]
        on_grid = []
        for index in self.levels:
            # averaged with the zeros beyond the border, where features are noisy
            level = F.avg_pool2d(features[index], POOLED, 1, POOLED // 2)
            finer = level.shape[-1] // size[-1]
            on_grid.append(F.pixel_unshuffle(level, finer) if finer > 1 else enlarge(level, size))
        return torch.cat([softly_normalised(level) for level in on_grid], dim=1) / math.sqrt(len(on_grid))

    def channels(self, teacher: Teacher) -> int:
        """C of the patches."""
        stride = teacher.strides[self.grid]
        return sum(max(1, stride // teacher.strides[index]) ** 2 * teacher.channels[index] for index in self.levels)

    def count(self, teacher: Teacher, shape: tuple[int, int]) -> int:
        """How many patches an image of a shape has."""
        stride = teacher.strides[self.grid]
        return (shape[0] // stride) * (shape[1] // stride)


MEMORIES = {"memory_fine": MemoryKind((0, 1, 2), grid=1), "memory_coarse": MemoryKind((2,), grid=2)}
"""Name of a memory → its kind. What is large shows in the coarse one, what is small in the fine one alone."""


def rows_of(patches: Tensor) -> Tensor:
    """(B, C, h, w) → (B * h * w, C)."""
    return patches.permute(0, 2, 3, 1).flatten(0, 2)


def softly_normalised(level: Tensor) -> Tensor:
    """A level (B, C, h, w), each cell divided by its length plus the image's mean length: lengths lie in [0, 1)."""
    length = level.norm(dim=1, keepdim=True)
    return level / (length + length.mean(dim=(2, 3), keepdim=True)).clamp_min(TINY)


def nearest(rows: Tensor, kept: Tensor, allowance: Tensor) -> Tensor:
    """Least power distance |x - m|^2 - a of each row x of (N, C), over m of (M, C) and its a of (M,): (N,)."""
    chunks = zip(kept.split(CHUNK), allowance.split(CHUNK), strict=True)
    least = [_compared(rows, part.to(rows.dtype), allowed).amin(dim=1) for part, allowed in chunks]
    return torch.stack(least).amin(dim=0) + rows.square().sum(dim=1)


def _compared(rows: Tensor, kept: Tensor, allowance: Tensor) -> Tensor:
    """The power distances (N, M), but each less |x|^2 of its row x, which changes no order."""
    return torch.addmm(kept.square().sum(dim=1) - allowance, rows, kept.T, alpha=-2)
