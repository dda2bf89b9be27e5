"""Synthetic images and toy scorers for tests of the evaluation; as a program it measures memory and time of one.

    python tests/evaluation/synthetic.py --images 1000 --size 256

prints the process's peak resident memory. It must not depend on `--images`.
"""

import argparse
import resource
import sys
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from flawsmith.data.dataset import GOOD
from flawsmith.data.images import FloatImage, Mask
from flawsmith.evaluation.assess import Assessment, assess
from flawsmith.evaluation.config import EvaluateSettings
from flawsmith.evaluation.samples import Sample
from flawsmith.randomness import numpy_generator


def synthetic_sample(index: int, size: int) -> Sample:
    """A grainy gray image; every other one carries one of two defects: a faint bright disc or a thin dark stroke."""

    def load() -> tuple[FloatImage, Mask]:
        generator = numpy_generator(0, "synthetic-item", index)
        gray = 0.5 + 0.05 * generator.standard_normal((size, size), np.float32)
        rows, columns = np.ogrid[:size, :size]
        row, column = generator.uniform(0.2 * size, 0.8 * size, 2)
        if defect == GOOD:
            mask = np.zeros((size, size), np.bool_)
        elif defect == "disc":
            mask = np.hypot(rows - row, columns - column) < size * generator.uniform(0.03, 0.1)
        else:
            mask = (np.abs(rows - row) < 1.5) & (np.abs(columns - column) < size / 8)
        gray[mask] += generator.uniform(0.02, 0.1) * (-1 if defect == "stroke" else 1)
        return np.repeat(np.clip(gray, 0, 1)[None], 3, axis=0), mask

    defect = (GOOD, "disc", GOOD, "stroke")[index % 4]
    return Sample(f"{defect}/{index:05d}.png", defect, load)


def contrast_scorer(images: NDArray[np.float32], sigma: float = 2.0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Distance of the blurred gray value from the image's mean; a toy that finds the toy defects."""
    gray = images.mean(axis=1)
    blurred = ndimage.gaussian_filter(gray, (0, sigma, sigma))
    maps = np.abs(blurred - gray.mean(axis=(1, 2), keepdims=True))
    return maps, maps.reshape(len(maps), -1).max(axis=1)


def assess_synthetic(images: int, size: int, bootstrap: int = 1000) -> Assessment:
    """A whole evaluation of `images` synthetic images, with a sharp and a blunt toy scorer."""
    return assess(
        contrast_scorer,
        lambda batch: contrast_scorer(batch, sigma=0.7),
        [synthetic_sample(index, size) for index in range(images)],
        [synthetic_sample(4 * index, size) for index in range(10_000, 10_040)],
        numpy_generator(0, "assess-synthetic"),
        EvaluateSettings(bootstrap=bootstrap, batch=8, gallery=32),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one measurement and print it."""
    parser = argparse.ArgumentParser(description="Peak memory of an evaluation over synthetic images.")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--bootstrap", type=int, default=1000)
    chosen = parser.parse_args(arguments)
    before, start = _peak(), time.perf_counter()
    result = assess_synthetic(chosen.images, chosen.size, chosen.bootstrap)
    print(
        f"{chosen.images} images of {chosen.size} px, {chosen.bootstrap} resamples: peak {_peak():.0f} MiB "
        f"({before:.0f} MiB after imports), {time.perf_counter() - start:.0f} s; "
        f"pixel AUROC {result.detector.values['pixel_auroc'].value:.4f}"
    )


def _peak() -> float:
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


if __name__ == "__main__":
    main()
