"""How much the feature norm of a patch counts in its distance from normal; the normal images decide.

A cosine ignores norm. So a patch of small feature norm, whose feature is noise and points anywhere, seems as far from
normal as a defect. Distances are therefore multiplied by a power of the feature norm. If the largest distances of
normal patches fall as the norm grows, the power undoes that; if not, it is 0 and changes nothing.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

LARGEST_POWER = 2.0
BINS, FEWEST_IN_BIN = 16, 50  # of patches, by their norm


def relative_norm(features: Tensor) -> Tensor:
    """The feature norm of each patch over the image's mean norm: (B, C, h, w) → (B, 1, h, w), above 0."""
    norm = features.norm(dim=1, keepdim=True)
    return (norm / norm.mean(dim=(2, 3), keepdim=True).clamp_min(1e-6)).clamp_min(1e-6)


def norm_power(found: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Find the power from norms and distances of normal patches: pairs of tensors of equal shape.

    Patches are sorted into bins of equal number by their norm. A straight line is fitted to the logarithms of the bins'
    99th percentiles of distance against their mean norms. The power is the slope with its sign turned, within 0 and
    LARGEST_POWER; 0 if the bins are too small.
    """
    patches = [torch.stack([of.flatten().float().cpu() for of in pair]) for pair in found]
    if not patches:
        return 0.0
    norm, distance = torch.cat(patches, dim=1)
    if len(norm) < BINS * FEWEST_IN_BIN:
        return 0.0
    bins = norm.argsort(stable=True).tensor_split(BINS)
    x = torch.stack([norm[part].mean() for part in bins]).clamp_min(1e-6).log().double()
    y = torch.stack([distance[part].quantile(0.99) for part in bins]).clamp_min(1e-6).log().double()
    x, y = x - x.mean(), y - y.mean()
    slope = float((x * y).sum() / x.square().sum().clamp_min(1e-12))
    return min(max(-slope, 0.0), LARGEST_POWER)
