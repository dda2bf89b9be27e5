"""The memory bank: how far each patch of an image is from the nearest patch of a normal image.

A patch is one position of the teacher's coarsest feature level. The distance is a cosine distance. It differs from
PatchCore's (Roth et al., CVPR 2022): features are L2-normalised, so that the contrast of the whole image does not
count; distances are weighted by a power of the feature norm; they are compared along the few directions in which normal
patches differ; patches are subsampled evenly instead of by a coreset.

The segmentation head reads the distance and not the patch that was found: two normal patches may be equally near, and
the last bit of a sum would then decide between them, so that no two runtimes would agree.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flawsmith.detector.feature_norm import norm_power

CHUNK = 2048  # patches compared at once: (h * w, CHUNK) similarities of an image of 256 pixels, 2 MB, stay in a cache
POOLED = 3  # cells a side that are averaged into a patch, PatchCore's neighbourhood


class MemoryBank(nn.Module):
    """`patches` (M, D) float16, features of normal patches in the `basis` (C, D); M and D are fixed when it is built.

    The basis holds the D leading right singular vectors of the patches (Eckart & Young 1936: no D directions keep more
    of their inner products); without a basis, patches are the C features themselves. What lies outside these directions
    is ignored on both sides, since it follows the exposure.

    Distances are multiplied by the feature norm, in units of its image's mean, to the power of `norm_power` (see
    `feature_norm`). Half floats change a cosine similarity by less than 1e-3 and halve the file.
    """

    patches: Tensor
    basis: Tensor | None
    norm_power: Tensor

    def __init__(self, size: int, channels: int, dimensions: int = 0) -> None:
        """`dimensions` 0, or as many as there are channels, is no projection."""
        super().__init__()
        projects = 0 < dimensions < channels
        self.register_buffer("basis", torch.eye(channels, dimensions) if projects else None)
        width = dimensions if projects else channels
        self.register_buffer("patches", torch.zeros(size, width, dtype=torch.float16))
        self.register_buffer("norm_power", torch.zeros(()))

    def forward(self, patches: Tensor, excluded: Tensor | None = None) -> Tensor:
        """Cosine distance to the nearest patch, weighted by the feature norm: (B, 1, h, w), 0 or more.

        Args:
            patches: (B, C, h, w), `as_patches` of the coarsest level.
            excluded: (M,) bool, patches of the bank that do not count.
        """
        batch, channels, height, width = patches.shape
        norm = patches.norm(dim=1, keepdim=True).clamp_min(1e-6)
        rows = self._project((patches / norm).permute(0, 2, 3, 1).reshape(-1, channels))
        nearest = torch.full_like(rows[:, 0], -1.0)
        for first in range(0, len(self.patches), CHUNK):
            similarity = rows @ self.patches[first : first + CHUNK].to(rows.dtype).T
            if excluded is not None:
                similarity.masked_fill_(excluded[first : first + CHUNK], -1.0)
            nearest = torch.maximum(nearest, similarity.amax(dim=1))
        return (1 - nearest.view(batch, 1, height, width)) * norm.pow(self.norm_power)

    @torch.no_grad()
    def fill(self, batches: Iterable[Tensor], images: int) -> Tensor:
        """Subsample the patches of normals evenly, as many as the bank holds, and find the basis.

        Args:
            batches: `as_patches` (B, C, h, w) of the normals, in order.
            images: how many they are in all.

        Returns:
            source ids: the index of the image behind each patch, (M,).
        """
        found: list[Tensor] = []
        kept = torch.empty(0)
        seen = 0
        for patches in batches:
            if not seen:
                height, width = patches.shape[-2:]
                kept = subsample(images, height, width, len(self.patches))
            chosen = kept[seen : seen + len(patches)].to(patches.device)
            found.append(F.normalize(patches.permute(0, 2, 3, 1)[chosen].float(), dim=1).cpu())
            seen += len(patches)
        rows = torch.cat(found)
        if self.basis is not None:
            self.basis.copy_(_leading_directions(rows, self.basis.shape[1]))
        self.patches.copy_(self._project(rows.to(self.patches.device)))
        return torch.nonzero(kept)[:, 0]

    @torch.no_grad()
    def fit_norm_power(self, images: Iterable[tuple[Tensor, Tensor | None]]) -> float:
        """Set the norm power from normals (`norm_power`) and return it.

        Args:
            images: patches (B, C, h, w), each with the patches of the bank that are its own, (M,) bool.
        """
        self.norm_power.zero_()
        self.norm_power.fill_(norm_power((patches.norm(dim=1), self(patches, own)) for patches, own in images))
        return float(self.norm_power)

    def _project(self, rows: Tensor) -> Tensor:
        return rows if self.basis is None else F.normalize(rows @ self.basis.to(rows.dtype), dim=1)


def _leading_directions(rows: Tensor, count: int) -> Tensor:
    """The `count` leading right singular vectors of rows (M, C), as columns (C, count).

    The largest entry of each is made positive, since the sign is arbitrary.
    """
    squares = sum(part.double().T @ part.double() for part in rows.split(CHUNK))
    _, vectors = torch.linalg.eigh(torch.as_tensor(squares))  # in ascending order
    leading = vectors.flip(1)[:, :count]
    largest = leading.gather(0, leading.abs().argmax(dim=0, keepdim=True))
    return (leading * largest.sign()).float()


def as_patches(coarse: Tensor) -> Tensor:
    """Average a feature level (B, C, h, w) over POOLED x POOLED cells, fewer at the border, in units of the mean norm.

    The contrast of the whole image is gone; that of its patches among each other is left.
    """
    pooled = F.avg_pool2d(coarse, POOLED, 1, POOLED // 2, count_include_pad=False)
    return pooled / pooled.norm(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True).clamp_min(1e-6)


def memory_size(limit: int, images: int, height: int, width: int) -> int:
    """How many patches a memory bank keeps: all, or `limit` of them."""
    return min(limit, images * height * width)


def subsample(images: int, height: int, width: int, size: int) -> Tensor:
    """Which patches to keep, (images, height, width) bool with exactly `size` true.

    A low-discrepancy sequence over image, row and column (additive recurrence with the powers of the root of
    x^4 = x + 1; Roberts 2018). Every image and every part of the image, borders included, gives its share, and alike
    neighbours are not kept together. A stride would do so at a few densities only.
    """
    root = 1.2207440846057596
    i, r, c = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in (images, height, width)], indexing="ij")
    order = (i / root + r / root**2 + c / root**3) % 1.0
    kept = torch.zeros(order.numel(), dtype=torch.bool)
    kept[order.flatten().argsort(stable=True)[:size]] = True
    return kept.view(images, height, width)
