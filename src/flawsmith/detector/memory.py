"""What the surface looks like, remembered: how far any place is from the nearest place of a normal part.

A student alone learns the surface's average; how the individual places of normal parts look it has to be told. The
memory is the detector's second answer to "is this normal": the cosine distance of each place of the coarsest scale to
the normal feature most like it.

It differs from PatchCore's memory (Roth et al., CVPR 2022) in three ways, each measured (docs/experiments.md): features
are L2-normalised, so that a change of contrast over the whole image is no distance; places are kept by an even lattice
instead of a coreset; and the segmentation head reads the distance, and learns from triplets what to make of it. It
reads the distance alone, not what was found: two normal places may be equally near, and which of them is the nearest
would then depend on the last bit of a sum, so that no two runtimes would agree.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 8192  # keys compared at once: bounds the similarity matrix at inference, (B * h * w, CHUNK) floats
POOLED = 3  # cells a side that are averaged before places are compared, PatchCore's neighbourhood


class NormalMemory(nn.Module):
    """`keys` (M, C) float16: L2-normalised features of normal places; M is fixed when the module is built.

    Half floats: a cosine similarity changes by less than 1e-3, the file is half as large.
    """

    keys: Tensor

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(size, channels, dtype=torch.float16))

    def forward(self, places: Tensor, forbidden: Tensor | None = None) -> Tensor:
        """Cosine distance to the nearest key, (B, 1, h, w) in [0, 2].

        Args:
            places: (B, C, h, w), `as_places` of the coarsest level.
            forbidden: (M,) bool, keys that do not count.
        """
        batch, channels, height, width = places.shape
        rows = places.permute(0, 2, 3, 1).reshape(-1, channels)
        nearest = torch.full_like(rows[:, 0], -1.0)
        for first in range(0, len(self.keys), CHUNK):
            similarity = rows @ self.keys[first : first + CHUNK].to(rows.dtype).T
            if forbidden is not None:
                similarity = similarity.masked_fill(forbidden[first : first + CHUNK], -1.0)
            nearest = torch.maximum(nearest, similarity.amax(dim=1))
        return 1 - nearest.view(batch, 1, height, width)

    @torch.no_grad()
    def fill(self, batches: Iterable[Tensor], kept: Tensor) -> Tensor:
        """Keep places of normals; return whose each key is, (M,) indices of images.

        Args:
            batches: `as_places` (B, C, h, w) of the normals, in order.
            kept: which places, (images, h, w) bool with M true: `lattice`.
        """
        keys: list[Tensor] = []
        seen = 0
        for places in batches:
            chosen = kept[seen : seen + len(places)].to(places.device)
            keys.append(places.permute(0, 2, 3, 1)[chosen].half().cpu())
            seen += len(places)
        self.keys.copy_(torch.cat(keys))
        return torch.nonzero(kept)[:, 0]


def as_places(coarse: Tensor) -> Tensor:
    """A feature level (B, C, h, w) averaged over POOLED x POOLED cells (fewer at the border), L2-normalised."""
    return F.normalize(F.avg_pool2d(coarse, POOLED, 1, POOLED // 2, count_include_pad=False), dim=1)


def memory_size(limit: int, images: int, height: int, width: int) -> int:
    """How many places a memory keeps: all, or `limit` of them."""
    return min(limit, images * height * width)


def lattice(images: int, height: int, width: int, size: int) -> Tensor:
    """Which places to keep, (images, height, width) bool with exactly `size` true.

    A low-discrepancy sequence over image, row and column (additive recurrence with the powers of the root of
    x^4 = x + 1; Roberts 2018): every image and every part of the image, borders included, gives its share, and
    neighbours, which are alike, are not kept together. A stride would do so at a few densities only, and one that skips
    the border makes borders look abnormal.
    """
    root = 1.2207440846057596
    i, r, c = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in (images, height, width)], indexing="ij")
    order = (i / root + r / root**2 + c / root**3) % 1.0
    kept = torch.zeros(order.numel(), dtype=torch.bool)
    kept[order.flatten().argsort(stable=True)[:size]] = True
    return kept.view(images, height, width)
