"""How much a place's energy counts in its distance from normal, asked of the normals.

A cosine has no length, so that a place of little energy, whose feature is noise and points anywhere, would be as far
from normal as a defect. Distances are therefore multiplied by the place's energy to a power; what power, normal places
tell: where the largest of their distances fall as energy grows, the power undoes that; where they do not, it is 0 and
changes nothing (docs/experiments.md, rounds 9 and 10).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

STEEPEST = 2.0  # the largest exponent of a place's energy
BINS, FEWEST_IN_BIN = 16, 50  # of places by energy, where the exponent is looked for


def relative_energy(features: Tensor) -> Tensor:
    """Length of each place's feature in units of the image's mean length: (B, C, h, w) → (B, 1, h, w), above 0."""
    length = features.norm(dim=1, keepdim=True)
    return (length / length.mean(dim=(2, 3), keepdim=True).clamp_min(1e-6)).clamp_min(1e-6)


def energy_exponent(found: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The exponent, from energies and distances of normal places, batch by batch, any shape alike.

    Of places in bins of equal number by energy, the 99th percentiles of the distances against the mean energies: the
    slope of a straight line through the logarithms, its sign turned, within 0 and STEEPEST; 0 if the bins are too
    small.
    """
    places = [torch.stack([of.flatten().float().cpu() for of in pair]) for pair in found]
    if not places:
        return 0.0
    energy, distance = torch.cat(places, dim=1)
    if len(energy) < BINS * FEWEST_IN_BIN:
        return 0.0
    bins = energy.argsort(stable=True).tensor_split(BINS)
    x = torch.stack([energy[part].mean() for part in bins]).clamp_min(1e-6).log().double()
    y = torch.stack([distance[part].quantile(0.99) for part in bins]).clamp_min(1e-6).log().double()
    x, y = x - x.mean(), y - y.mean()
    slope = float((x * y).sum() / x.square().sum().clamp_min(1e-12))
    return min(max(-slope, 0.0), STEEPEST)
