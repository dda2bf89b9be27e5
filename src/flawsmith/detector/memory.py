"""What the surface looks like, remembered: how far any place is from the nearest place of a normal part.

A student alone learns the surface's average; how the individual places of normal parts look it has to be told. The
memory is the detector's second answer to "is this normal": the cosine distance of each place of the coarsest scale to
the normal feature most like it.

It differs from PatchCore's memory (Roth et al., CVPR 2022) in four ways, each measured (docs/experiments.md): features
are L2-normalised, so that a change of contrast over the whole image is no distance, and distances are weighted by
energy as far as the normals ask for it; they are compared along the few directions in which normal places differ;
places are kept by an even lattice instead of a coreset; and the segmentation head reads the distance, and learns from
triplets what to make of it. It reads the distance alone, not what was found: two normal places may be equally near, and
which of them is the nearest would then depend on the last bit of a sum, so that no two runtimes would agree.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flawsmith.detector.energy import energy_exponent

CHUNK = 2048  # keys compared at once: (h * w, CHUNK) similarities of an image of 256 pixels, 2 MB, stay in a cache
POOLED = 3  # cells a side that are averaged before places are compared, PatchCore's neighbourhood


class NormalMemory(nn.Module):
    """`keys` (M, D) float16: features of normal places in the `basis` (C, D); M and D are fixed when it is built.

    The basis holds the D leading right singular vectors of the kept places (Eckart & Young 1936: no D directions keep
    more of their inner products); without one, keys are the C features themselves. What a place has outside these
    directions is left out of the comparison, on both sides: counted as distance it was worth less than nothing, for how
    much of it there is follows the exposure (docs/experiments.md, round 8).

    A cosine has no length, so that a place of little energy, whose feature is noise and points anywhere, would be as
    far from normal as a defect. Distances are therefore multiplied by the place's energy, in units of its image's mean,
    to the power of `exponent`, which `fit_exponent` asks of the normals; 0, where they show no such thing, changes
    nothing.

    Half floats: a cosine similarity changes by less than 1e-3, the file is half as large.
    """

    keys: Tensor
    basis: Tensor | None
    exponent: Tensor

    def __init__(self, size: int, channels: int, dimensions: int = 0) -> None:
        """`dimensions` 0, or as many as there are channels, is no projection."""
        super().__init__()
        projects = 0 < dimensions < channels
        self.register_buffer("basis", torch.eye(channels, dimensions) if projects else None)
        width = dimensions if projects else channels
        self.register_buffer("keys", torch.zeros(size, width, dtype=torch.float16))
        self.register_buffer("exponent", torch.zeros(()))

    def forward(self, places: Tensor, forbidden: Tensor | None = None) -> Tensor:
        """Cosine distance to the nearest key, times energy to the power of `exponent`: (B, 1, h, w), 0 or more.

        Args:
            places: (B, C, h, w), `as_places` of the coarsest level.
            forbidden: (M,) bool, keys that do not count.
        """
        batch, channels, height, width = places.shape
        energy = places.norm(dim=1, keepdim=True).clamp_min(1e-6)
        rows = self._project((places / energy).permute(0, 2, 3, 1).reshape(-1, channels))
        nearest = torch.full_like(rows[:, 0], -1.0)
        for first in range(0, len(self.keys), CHUNK):
            similarity = rows @ self.keys[first : first + CHUNK].to(rows.dtype).T
            if forbidden is not None:
                similarity[:, forbidden[first : first + CHUNK]] = -1.0
            nearest = torch.maximum(nearest, similarity.amax(dim=1))
        return (1 - nearest.view(batch, 1, height, width)) * energy.pow(self.exponent)

    @torch.no_grad()
    def fill(self, batches: Iterable[Tensor], images: int) -> Tensor:
        """Keep as many places of normals as there are keys, evenly (`lattice`); find the basis.

        Args:
            batches: `as_places` (B, C, h, w) of the normals, in order.
            images: how many they are in all.

        Returns:
            whose each key is, (M,) indices of images.
        """
        found: list[Tensor] = []
        kept = torch.empty(0)
        seen = 0
        for places in batches:
            if not seen:
                height, width = places.shape[-2:]
                kept = lattice(images, height, width, len(self.keys))
            chosen = kept[seen : seen + len(places)].to(places.device)
            found.append(F.normalize(places.permute(0, 2, 3, 1)[chosen].float(), dim=1).cpu())
            seen += len(places)
        rows = torch.cat(found)
        if self.basis is not None:
            self.basis.copy_(_leading_directions(rows, self.basis.shape[1]))
        self.keys.copy_(self._project(rows.to(self.keys.device)))
        return torch.nonzero(kept)[:, 0]

    @torch.no_grad()
    def fit_exponent(self, images: Iterable[tuple[Tensor, Tensor | None]]) -> float:
        """Set the exponent from normals (`energy_exponent`) and return it.

        Args:
            images: places (B, C, h, w) with the keys that are their own (M,) bool and do not count.
        """
        self.exponent.zero_()
        self.exponent.fill_(energy_exponent((places.norm(dim=1), self(places, own)) for places, own in images))
        return float(self.exponent)

    def _project(self, rows: Tensor) -> Tensor:
        return rows if self.basis is None else F.normalize(rows @ self.basis.to(rows.dtype), dim=1)


def _leading_directions(rows: Tensor, count: int) -> Tensor:
    """The `count` leading right singular vectors of rows (M, C), as columns (C, count); the largest entry of each is
    positive, since the sign is nobody's choice."""
    squares = sum(part.double().T @ part.double() for part in rows.split(CHUNK))
    _, vectors = torch.linalg.eigh(torch.as_tensor(squares))  # in ascending order
    leading = vectors.flip(1)[:, :count]
    largest = leading.gather(0, leading.abs().argmax(dim=0, keepdim=True))
    return (leading * largest.sign()).float()


def as_places(coarse: Tensor) -> Tensor:
    """A feature level (B, C, h, w) averaged over POOLED x POOLED cells (fewer at the border), in units of the image's
    mean length: the contrast of the whole image is gone, that of its places among each other is left."""
    pooled = F.avg_pool2d(coarse, POOLED, 1, POOLED // 2, count_include_pad=False)
    return pooled / pooled.norm(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True).clamp_min(1e-6)


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
