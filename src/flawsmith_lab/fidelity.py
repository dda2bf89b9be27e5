"""How much synthetic defects resemble real ones: distances of distributions of crops, in the frozen teacher's features.

    python -m flawsmith_lab.fidelity --category bottle

For reporting alone: nothing is trained, tuned, chosen or gated by it. A crop is a square window around a defect, by the
same law for real and synthetic ones. Features are the teacher's pooled ones, each channel in units of its standard
deviation over normal crops. The Frechet distance needs covariances, which few crops cannot give in hundreds of
dimensions, so it sees the leading principal components of normals alone. With few crops it is biased upwards (Chong &
Forsyth, CVPR 2020): compare it within one table, where every row has as many crops.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.distance import cdist

from flawsmith.config import load_settings
from flawsmith.data.dataset import load_prepared
from flawsmith.data.images import FloatImage, Mask, resize_image, resize_mask
from flawsmith.data.tiling import Tiling
from flawsmith.data.triplets import TripletFolder
from flawsmith.detector.teacher import build_teacher, pooled_features
from flawsmith.devices import Compute
from flawsmith.errors import UserError
from flawsmith.evaluation.intervals import Estimate, percentile_interval
from flawsmith.evaluation.metrics import EIGHT_NEIGHBOURS
from flawsmith.evaluation.samples import evaluation_set
from flawsmith.layout import Layout
from flawsmith.randomness import numpy_generator
from flawsmith_lab.bench.measure import guarded
from flawsmith_lab.markdown import markdown

Features = NDArray[np.floating]  # (n, D), a row a crop

WINDOW = 64  # pixels; at 256 px a sixteenth of the image, and four cells of the teacher's coarsest level
MAX_CROPS = 200  # of each kind: bounds the cost to that of 50 whole images
MIN_SAMPLES = 8  # in each half of the real crops: twice (k + 1), below which precision and recall are all but blind
DIMENSIONS = 64
SUBSETS = 100
NEIGHBOUR = 3  # k of Kynkaanniemi et al.
MEASURES = ("frechet", "kid", "precision", "recall")


@dataclass(frozen=True)
class Fidelity:
    """The comparison table.

    Attributes:
        rows: what is compared with real defects (`synthetic`, `real`: the other half, `before`, `normal`) → each of
            MEASURES: the mean over SUBSETS random subsets, and the central 95 % of them.
        crops: how many crops there were of each kind to draw subsets from.
        samples: crops in each subset, the same in every row.
        dimensions: principal components that the Frechet distance saw.
    """

    rows: Mapping[str, Mapping[str, Estimate]]
    crops: Mapping[str, int]
    samples: int
    dimensions: int

    def table(self) -> str:
        """Write the table as Markdown, each value with its 95 % interval."""
        lines = [
            (name, *(f"{one.value:.3g} ({one.low:.3g} to {one.high:.3g})" for one in values.values()))
            for name, values in self.rows.items()
        ]
        counts = ", ".join(f"{count} {name}" for name, count in self.crops.items())
        note = f"{self.samples} crops a subset of {counts}; the Frechet distance sees {self.dimensions} components."
        return f"{markdown(('compared with real defects', *MEASURES), lines)}\n\n{note}"


def compare(
    real: Features,
    others: Mapping[str, Features],
    basis: Features,
    generator: np.random.Generator,
    subsets: int = SUBSETS,
) -> Fidelity | None:
    """Compare each of `others` with the real crops, and the real ones with themselves; None where crops are too few.

    Every subset splits the real crops into random halves; one half is compared with the other half, and with as many
    random crops (without replacement) of each other kind. The spread of a mean over such halves equals its sampling
    error over all real crops (McCarthy 1969, balanced half-samples). By this construction the mean KID of the halves is
    0 up to the number of subsets: its interval is what chance alone gives.

    Args:
        real: features of real defects `(n, D)`.
        others: name → features `(m, D)` of what is compared with them.
        basis: features of normals that are in no other set; they set scale and principal components.
        generator: draws the subsets.
        subsets: how many.
    """
    samples = min(len(real) // 2, *(len(features) for features in others.values()))
    if samples < MIN_SAMPLES or len(basis) < 2:
        return None
    space = Space.of(basis, min(DIMENSIONS, samples // 2))
    known = {name: space.scaled(features) for name, features in {"real": real, **others}.items()}
    draws: dict[str, list[tuple[float, ...]]] = {name: [] for name in known}
    for _ in range(subsets):
        order = generator.permutation(len(real))
        half = known["real"][order[:samples]]
        for name, features in known.items():
            places = order[samples : 2 * samples] if name == "real" else generator.permutation(len(features))[:samples]
            other = features[places]
            gap = frechet(space.projected(half), space.projected(other))
            draws[name].append((gap, kid(half, other), *precision_recall(half, other)))
    rows = {}
    for name, values in draws.items():
        columns = zip(MEASURES, np.asarray(values).T, strict=True)
        rows[name] = {measure: percentile_interval(float(column.mean()), column) for measure, column in columns}
    counts = {name: len(features) for name, features in known.items()}
    return Fidelity(rows, counts, samples, space.components.shape[1])


@dataclass(frozen=True)
class Space:
    """Standardised features and their leading principal components, both from normal crops: `alive` `(D,)` marks the
    channels that vary at all, `components` is `(alive channels, dimensions)`."""

    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]
    alive: NDArray[np.bool_]
    components: NDArray[np.float64]

    @classmethod
    def of(cls, normals: Features, dimensions: int) -> "Space":
        """Find the space of normals `(n, D)`."""
        values = np.asarray(normals, np.float64)
        mean, deviation = values.mean(axis=0), values.std(axis=0)
        alive = deviation > 1e-6 * np.abs(values).max(axis=0)  # rounding noise must not be blown up to a channel
        scaled = (values[:, alive] - mean[alive]) / deviation[alive]
        _, _, directions = np.linalg.svd(scaled, full_matrices=False)
        return cls(mean[alive], deviation[alive], alive, directions[:dimensions].T)

    def scaled(self, features: Features) -> NDArray[np.float64]:
        """`(n, D)` to `(n, alive channels)` in units of the normals' standard deviation."""
        return (np.asarray(features, np.float64)[:, self.alive] - self.mean) / self.deviation

    def projected(self, scaled: NDArray[np.float64]) -> NDArray[np.float64]:
        """Scaled features onto the principal components `(n, dimensions)`."""
        return scaled @ self.components


def frechet(one: Features, other: Features) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two samples taken as Gaussians (Heusel et al., NeurIPS 2017).

    The trace of the root is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric.
    """
    first, second = (np.atleast_2d(np.cov(np.asarray(part, np.float64), rowvar=False)) for part in (one, other))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    shift = np.asarray(one, np.float64).mean(axis=0) - np.asarray(other, np.float64).mean(axis=0)
    return float(max(shift @ shift + np.trace(first) + np.trace(second) - 2 * overlap, 0.0))


def kid(one: Features, other: Features) -> float:
    """The kernel inception distance (Binkowski et al., ICLR 2018): MMD^2 with the kernel (x.y / D + 1)^3.

    The unbiased estimate (Gretton et al. 2012, lemma 6): its mean is 0 for equal distributions, so it may be negative.
    """
    x, y = np.asarray(one, np.float64), np.asarray(other, np.float64)
    n, m, width = len(x), len(y), x.shape[1]
    inside, outside, across = ((a @ b.T / width + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (inside.sum() - np.trace(inside)) / (n * (n - 1)) + (outside.sum() - np.trace(outside)) / (m * (m - 1))
    return float(within - 2 * across.mean())


def precision_recall(real: Features, other: Features, neighbour: int = NEIGHBOUR) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., NeurIPS 2019, eq. 1-3).

    A set's manifold is the union of balls around its members, each as wide as the distance to its k-th nearest
    neighbour in the set. Precision is the share of `other` inside the manifold of `real`, recall the converse.
    """
    distances = cdist(real, other)  # (n, m)
    # column 0 of the sorted distances is that to itself
    own, others = (np.sort(cdist(part, part), axis=1)[:, neighbour] for part in (real, other))
    return float((distances <= own[:, None]).any(axis=0).mean()), float((distances <= others).any(axis=1).mean())


def measure_fidelity(layout: Layout) -> Fidelity | None:
    """Compare the triplets' defects with the real ones that are judged; None where either are too few."""
    settings, judged, split, data = layout.settings, evaluation_set(layout), layout.split(), layout.data
    tiling, triplets = Tiling.of(data), TripletFolder(layout.stage("synthesize"))
    defective = [one for one in judged.samples if one.is_defective and one.has_pixel_labels and judged.labelled]
    ids = sorted(path.stem for path in (layout.stage("synthesize") / "mask").glob("*.png"))
    if not defective or not ids:
        return None
    generator = numpy_generator(settings.evaluate.seed, "fidelity")

    def normals(paths: Sequence[Path]) -> list[FloatImage]:
        found = []
        for number in range(MAX_CROPS):  # several places of an image where there are few images
            image = tiling.pad(load_prepared(paths[number % len(paths)], data))
            found.append(crop(image, random_place(image, generator)))
        return found

    crops: dict[str, list[FloatImage]] = {"real": [], "synthetic": [], "before": []}
    for index in pick(len(defective), generator):
        image, mask = defective[index].load()
        crops["real"].append(crop(tiling.pad(image), defect_place(mask)))
    for index in pick(len(ids), generator):
        normal, defect, mask = triplets.read(ids[index])
        place = defect_place(resize_mask(mask, data.shape))
        for name, image in (("synthetic", defect), ("before", normal)):
            crops[name].append(crop(resize_image(image, data.shape), place))
    crops |= {"normal": normals(split.calibration), "basis": normals(split.fit)}
    teacher = build_teacher(settings.teacher, layout.root).to(Compute.choose(settings.compute).device)
    features = {name: pooled_features(teacher, np.stack(part)) for name, part in crops.items()}
    return compare(features.pop("real"), features, basis=features.pop("basis"), generator=generator)


def defect_place(mask: Mask) -> tuple[int, int]:
    """Where to put a window: the pixel (row, column) of the largest region nearest to its centroid."""
    labels, _ = ndimage.label(mask, EIGHT_NEIGHBOURS)
    largest = 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    pixels = np.argwhere(labels == largest)
    row, column = pixels[np.argmin(((pixels - pixels.mean(axis=0)) ** 2).sum(axis=1))]
    return int(row), int(column)


def random_place(image: FloatImage, generator: np.random.Generator) -> tuple[int, int]:
    """Row and column of the centre of a window drawn evenly among those inside the image."""
    row, column = (WINDOW // 2 + int(generator.integers(0, side - WINDOW + 1)) for side in image.shape[1:])
    return row, column


def crop(image: FloatImage, place: tuple[int, int]) -> FloatImage:
    """The window `(3, WINDOW, WINDOW)` around a place, pushed inside the image `(3, H, W)` where it would stick out."""
    top, left = (
        min(max(centre - WINDOW // 2, 0), side - WINDOW) for centre, side in zip(place, image.shape[1:], strict=True)
    )
    return image[:, top : top + WINDOW, left : left + WINDOW].copy()  # a view would keep the whole image in memory


def pick(count: int, generator: np.random.Generator) -> Sequence[int]:
    """Sorted indices of up to MAX_CROPS of `count` things, drawn without replacement."""
    return [int(index) for index in np.sort(generator.permutation(count)[:MAX_CROPS])]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of a category whose stage synthesize has run.

    Raises:
        UserError: there are too few real or synthetic defects; as `measure_fidelity`.
    """
    parser = argparse.ArgumentParser(prog="flawsmith_lab.fidelity", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--category", required=True)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    given = parser.parse_args(arguments)
    found = measure_fidelity(Layout(load_settings(given.params), given.category, given.params.parent))
    if found is None:
        raise UserError(
            f"{given.category}: too few defects to compare; it takes {2 * MIN_SAMPLES} real ones with masks in the "
            f"labelled test set and {MIN_SAMPLES} triplets (`flawsmith synthesize`)."
        )
    print(found.table())


if __name__ == "__main__":
    guarded(main, "fidelity")
