"""What a detector can find: the probability of detection over a defect's size and contrast.

Hit/miss analysis as in MIL-HDBK-1823A (2009), appendix G.3: with d the diameter of a defect and c its contrast,

    logit p = b0 + b1 log d + b2 log c.

*a90* is the diameter from which p is 90 % or more at a given contrast, *a90/95* its upper confidence bound of 95 %. The
bounds come from the bootstrap over images, since the defects of one image share its surface. A weak penalty keeps the
coefficients finite where hits and misses do not overlap, and of few trials makes a90 larger rather than smaller.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from flawsmith.data.images import Shape
from flawsmith.evaluation.config import EvaluateSettings
from flawsmith.evaluation.intervals import LEVEL, Estimate, resample_counts, share_interval
from flawsmith.randomness import numpy_generator

WANTED, SURE = 0.9, 0.95  # the probability of detection behind a90, and the confidence behind a90/95
PENALTY = 3.0  # C of scikit-learn, for standardised logarithms: a prior deviation of 1.7 on their coefficients
MIN_TRIALS = 10  # defects as large and as strong as a90 says; of fewer nothing is said
STEPS = 200  # sizes of a curve

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Unit:
    """The unit of sizes: `pixels` of the image that the detector sees make one.

    It is a pixel (`px`) of the images as they are stored, or a millimetre (`mm`).
    """

    name: str = "px"
    pixels: float = 1.0

    @classmethod
    def of(cls, stored: Shape, seen: Shape, pixels_per_mm: float) -> "Unit":
        """The unit for images of height and width `stored` that come before the detector as `seen`.

        `pixels_per_mm` counts stored pixels; 0 asks for pixels.
        """
        factor = float(np.sqrt(seen[0] * seen[1] / (stored[0] * stored[1])))
        return cls("mm", factor * pixels_per_mm) if pixels_per_mm else cls("px", factor)

    def diameter(self, area: NDArray[Any]) -> Floats:
        """The diameter of the discs of these areas, in pixels of the image that the detector sees."""
        return np.asarray(2 * np.sqrt(np.asarray(area, np.float64) / np.pi) / self.pixels)

    def text(self, size: float) -> str:
        """A size for people, with its unit."""
        return f"{size:.{0 if size >= 10 else 1 if self.name == 'px' else 2}f} {self.name}"


@dataclass(frozen=True, eq=False)
class Trials:
    """N defects and what became of them.

    Attributes:
        sizes: their diameters, `(N,)`.
        contrasts: the mean change of their pixels in grey levels (of 255), `(N,)`; 1 where nobody knows it.
        hits: whether each was found, `(N,)`.
        images: what each lies on, `(N,)`.
    """

    sizes: Floats
    contrasts: Floats
    hits: NDArray[np.bool_]
    images: NDArray[np.int64]

    @property
    def found(self) -> Estimate:
        """The share that was found, with Wilson's interval."""
        return share_interval(int(self.hits.sum()), len(self.hits))


@dataclass(frozen=True, eq=False)
class Detection:
    """The probability of detection as the trials tell it.

    Attributes:
        trials: what it is told from, one at least.
        contrast: the contrast in grey levels that `curve` and a90 hold for; 1 where nobody knows it.
        coefficients: b0, b1, b2 of the module's equation, `(1 + B, 3)`: of all trials, then of each resample.
        a90: in the trials' unit; None if it cannot be told.
        a90_95: the same.
        large: how many trials are of a90 and `contrast` or more, and how many of these were found; without an a90, of
            the contrast alone.
    """

    trials: Trials
    contrast: float
    coefficients: Floats
    a90: float | None
    a90_95: float | None
    large: tuple[int, int]

    @property
    def sizes(self) -> Floats:
        """The sizes of `curve`, from the smallest to the largest tried, `(STEPS,)`."""
        return _grid(self.trials)

    @property
    def curve(self) -> tuple[Floats, Floats, Floats]:
        """The probability at each of `sizes`, and its 95 % interval: value, low, high."""
        found = probability(self.coefficients, self.sizes, self.contrast)
        low, high = np.quantile(found[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        return found[0], low, high

    def expected(self, sizes: Floats, contrast: float | None = None) -> float:
        """The share of defects of these sizes, and of `contrast` or this one, that is expected to be found."""
        tried = np.clip(sizes, self.sizes[0], self.sizes[-1])
        return float(probability(self.coefficients[:1], tried, contrast or self.contrast).mean())

    def alike(self, real: Trials) -> float:
        """The contrast, of those tried, at which spots of the sizes of `real` are found about as often."""
        contrasts = np.geomspace(self.trials.contrasts.min(), self.trials.contrasts.max(), STEPS).tolist()
        return min(contrasts, key=lambda contrast: abs(self.expected(real.sizes, contrast) - real.found.value))

    def sentence(self, unit: Unit, false_alarm_rate: float) -> str:
        """What it means, for a person who sets or reads a requirement."""
        start, (tried, found) = f"At {100 * false_alarm_rate:g} % false alarms it", self.large
        strong = f"spots with a contrast of {self.contrast:g} grey levels or more"
        if self.a90 is None:
            reach = f"at any size tried (up to {unit.text(float(self.sizes[-1]))}; {found} of {tried} were found)"
            return f"{start} cannot be said to find 90 % of {strong} {reach}."
        best = unit.text(self.a90)
        if self.a90_95 is None:
            return f"{start} may find 90 % of {strong} from {best} on, but too few were tried to be sure."
        sure = f"{unit.text(self.a90_95)} and more (95 % sure; best estimate {best})"
        return f"{start} finds 90 % of {strong} that measure {sure}."


@dataclass(frozen=True, eq=False)
class Findings:
    """All that was tried of one detector: synthetic defects by their source, and the labelled ones if there are any."""

    by_source: Mapping[str, Detection] = field(default_factory=dict)
    real: Detection | None = None
    unit: Unit = Unit()

    def trust(self, source: str) -> str:
        """How far the curve of a source stands for real defects, in a sentence; "" without any of known size."""
        if self.real is None:
            return ""
        one, found = self.by_source[source], self.real.trials.found
        expected = one.expected(self.real.trials.sizes)
        said = f"Of {len(self.real.trials.hits)} real defects the curve expects {expected:.0%} to be found"
        interval = f"{found.value:.0%} were (interval {found.low:.0%} to {found.high:.0%})"
        verdict = "they agree"
        if not found.low <= expected <= found.high:
            side = "easier" if expected < found.low else "harder"
            verdict = f"real defects are {side} to find than such spots of their size"
        contrast = one.alike(self.real.trials)
        reached = one.expected(self.real.trials.sizes, contrast)
        often = f"as often as spots of their sizes with a contrast of {contrast:.0f} grey levels"
        if not found.low <= reached <= found.high:
            often = f"{'more' if reached < found.low else 'less'} often than spots of their sizes of any contrast tried"
        return f"{said}, {interval}: {verdict}. They are found {often}."

    def content(self) -> dict[str, Any]:
        """The part `detection` of metrics.json."""
        return {name: self._figures(one) for name, one in self.by_source.items()}

    def _figures(self, one: Detection) -> dict[str, Any]:
        trials, sizes = one.trials, {"a90": one.a90, "a90_95": one.a90_95}
        figures: dict[str, Any] = {key: None if size is None else round(size, 4) for key, size in sizes.items()}
        figures |= {"unit": self.unit.name, "contrast": one.contrast, "images": len(np.unique(trials.images))}
        figures |= {"defects": len(trials.hits), "found": int(trials.hits.sum())}
        if self.real is not None:
            real = self.real.trials
            figures["real"] = {"defects": len(real.hits), "found": int(real.hits.sum())}
            figures["real"]["expected"] = round(one.expected(real.sizes), 6)
        return figures


def findings(trials: Mapping[str, Trials], real: Trials, unit: Unit, options: EvaluateSettings) -> Findings:
    """Fit a curve to the trials of each source, and one to real defects; where nothing was tried there is none."""
    found = {
        name: detection(
            one,
            1.0 if one is real else options.detection_contrast,
            options.bootstrap,
            numpy_generator(options.seed, "detection", name),
        )
        for name, one in (*trials.items(), ("real", real))
        if one.hits.size
    }
    return Findings({name: found[name] for name in trials if name in found}, found.get("real"), unit)


def detection(trials: Trials, contrast: float, resamples: int, generator: np.random.Generator) -> Detection:
    """Fit the curve to one trial or more, with `resamples` of their images, and read a90 and a90/95 off it.

    No a90 is told that the trials do not bear out: fewer than MIN_TRIALS are so large and strong, or fewer than 90 % of
    these were found.
    """
    owners, members = np.unique(trials.images, return_inverse=True)
    drawn = resample_counts([""] * len(owners), resamples, generator)[:, members]
    coefficients = fit(trials, np.vstack([np.ones(len(members)), drawn]))
    grid = _grid(trials)
    kept = probability(coefficients, grid, contrast) >= WANTED
    kept = np.logical_and.accumulate(kept[:, ::-1], axis=1)[:, ::-1]  # there and at all larger sizes
    first, *others = np.where(kept.any(axis=1), grid[kept.argmax(axis=1)], np.inf).tolist()
    strong = trials.contrasts >= contrast
    large = strong & (trials.sizes >= first)
    a90, a90_95 = None, None
    if large.sum() >= MIN_TRIALS and trials.hits[large].mean() >= WANTED:
        bound = max(first, float(np.quantile(others, SURE, method="higher")))
        a90, a90_95 = first, bound if np.isfinite(bound) else None
    shown = strong if a90 is None else large
    counts = (int(shown.sum()), int(trials.hits[shown].sum()))
    return Detection(trials, contrast, coefficients, a90, a90_95, counts)


def fit(trials: Trials, weights: NDArray[Any]) -> Floats:
    """b0, b1, b2 of the module's equation under each row of weights `(B, N)`: `(B, 3)`.

    Where all is found or all is missed under a row, b0 is infinite and the others are 0.
    """
    raw = np.log(np.stack([trials.sizes, trials.contrasts], axis=1))
    mean, scale = raw.mean(axis=0), raw.std(axis=0)
    scale[scale == 0] = 1.0
    features = (raw - mean) / scale
    found = np.zeros((len(weights), 3))
    for row, weight in zip(found, np.asarray(weights, np.float64), strict=True):
        used = weight > 0
        hits = trials.hits[used]
        if hits.all() or not hits.any():
            row[0] = np.inf if hits.any() else -np.inf
            continue
        model = LogisticRegression(C=PENALTY, solver="newton-cholesky")
        model.fit(features[used], hits, sample_weight=weight[used])
        row[1:] = model.coef_[0] / scale
        row[0] = model.intercept_[0] - row[1:] @ mean
    return found


def probability(coefficients: Floats, sizes: Floats, contrast: float) -> Floats:
    """The probability of detection `(B, S)` under coefficients `(B, 3)` at sizes `(S,)` of one contrast."""
    b0, b1, b2 = coefficients.T[..., None]
    return np.asarray(expit(b0 + b1 * np.log(sizes) + b2 * np.log(contrast)))


def real_defects(areas: NDArray[np.int64], hits: NDArray[np.bool_], unit: Unit) -> Trials:
    """Labelled defective images as trials: the area of each one's mask in pixels, and whether it is flagged.

    Images without a mask (area 0) are left out. How much a real defect changed its pixels is not known.
    """
    known = np.flatnonzero(areas > 0)
    return Trials(unit.diameter(areas[known]), np.ones(len(known)), hits[known], known)


def _grid(trials: Trials) -> Floats:
    return np.asarray(np.geomspace(trials.sizes.min(), trials.sizes.max(), STEPS))
