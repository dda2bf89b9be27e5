"""Is the DDPM good enough to make defects from? Two measurements on plain (strength 0) samples, and a verdict in words.

Distance: the energy distance (Szekely & Rizzo 2013, unbiased form) between teacher features of samples and of held-out
normal crops, placed between a floor (training crops against held-out ones) and a ceiling (noise with the normals' mean
and covariance of colour). Memorisation: how much nearer samples lie to training crops than held-out
crops do.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

READY = 0.25  # relative distance up to which samples pass for normal surface
MEMORISED = 0.5  # nearest-neighbour ratio below which samples are copies of training crops

LEAST_SCALE = 0.1  # of the spread of real crops; where noise differs by less, it looks like the surface


@dataclass(frozen=True)
class Readiness:
    """`relative_distance` is 0 for samples as good as real crops and 1 for coloured noise."""

    relative_distance: float
    distance: float
    floor: float
    ceiling: float
    neighbour_ratio: float
    ready: bool
    verdict: str

    def as_json(self) -> dict[str, Any]:
        """Plain values of six significant digits: the last ones depend on how a machine's threads share the sums."""
        return {key: float(f"{value:.6g}") if type(value) is float else value for key, value in asdict(self).items()}


def judge_readiness(
    samples: NDArray[np.float64], heldout: NDArray[np.float64], fit: NDArray[np.float64], noise: NDArray[np.float64]
) -> Readiness:
    """Judge from pooled teacher features, each (n, d): plain samples, held-out and training crops, coloured noise."""
    scale = fit.std(axis=0) + 1e-8
    samples, heldout, fit, noise = ((part - fit.mean(axis=0)) / scale for part in (samples, heldout, fit, noise))
    floor, distance, ceiling = (energy_distance(part, heldout) for part in (fit, samples, noise))
    # a surface that looks like noise itself: there the spread of its crops is the measure, not what noise differs by
    scale_of_noise = max(ceiling - floor, LEAST_SCALE * _within(heldout))
    relative = float(np.clip((distance - floor) / scale_of_noise, 0, None)) if scale_of_noise else 0.0
    ratio = _nearest(samples, fit) / max(_nearest(heldout, fit), 1e-12)
    if ratio < MEMORISED:
        ready, verdict = (
            False,
            (
                f"Not ready: samples lie at {ratio:.2f} of the distance to the training crops at which unseen crops "
                "lie, so the model repeats its training images; add normal images or lower ddpm-train.steps."
            ),
        )
    elif relative > READY:
        ready, verdict = (
            False,
            (
                f"Not ready: plain samples are {relative:.0%} of the way from real surface to coloured noise "
                f"(at most {READY:.0%} is wanted); raise ddpm-train.steps."
            ),
        )
    else:
        ready, verdict = (
            True,
            (
                f"Ready: plain samples are {relative:.0%} of the way from real surface to coloured noise, and no "
                f"copies of training crops (nearest-neighbour ratio {ratio:.2f})."
            ),
        )
    return Readiness(relative, distance, floor, ceiling, ratio, ready, verdict)


def energy_distance(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of samples (n, d) and (m, d), unbiased, so it may be slightly negative."""
    return float(2 * cdist(x, y).mean() - _within(x) - _within(y))


def _within(x: NDArray[np.float64]) -> float:
    """Mean distance of two different rows."""
    return float(cdist(x, x).sum() / (len(x) * (len(x) - 1)))


def colour_noise(crops: NDArray[np.float32], generator: np.random.Generator) -> NDArray[np.float32]:
    """White noise with the colour mean and covariance of (N, 3, H, W) crops: a model that learnt no structure."""
    pixels = crops.transpose(0, 2, 3, 1).reshape(-1, 3).astype(np.float64)
    noise = generator.multivariate_normal(pixels.mean(axis=0), np.cov(pixels.T) + 1e-9 * np.eye(3), len(pixels))
    n, _, height, width = crops.shape
    return np.clip(noise.reshape(n, height, width, 3).transpose(0, 3, 1, 2), 0, 1).astype(np.float32)


def _nearest(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    return float(np.median(cdist(x, y).min(axis=1)))
