"""The evaluation itself: detector and baseline measured on the same images, and the examples that a report shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flawsmith.data.dataset import GOOD
from flawsmith.data.images import FloatImage, Mask
from flawsmith.evaluation.config import EvaluateSettings
from flawsmith.evaluation.detection import Findings
from flawsmith.evaluation.intervals import Estimate
from flawsmith.evaluation.measure import Performance, measure, paired_difference
from flawsmith.evaluation.metrics import KEYS
from flawsmith.evaluation.samples import Sample
from flawsmith.evaluation.scoring import Scorer, array_files, score_samples
from flawsmith.sequences import evenly

FAILURES = 8  # of each class, shown whatever the gallery's size
LIMITING = 6  # calibration normals shown


@dataclass(frozen=True, eq=False)  # arrays say neither yes nor no when asked whether they are equal
class Example:
    """A scored image with everything needed to show it; `error` > 0 (or a miss at 0) is a wrong verdict."""

    name: str
    defect: str
    score: float
    is_flagged: bool
    error: float
    image: FloatImage
    mask: Mask
    anomaly_map: NDArray[np.float32]
    has_pixel_labels: bool = True

    @property
    def is_wrong(self) -> bool:
        """Whether the verdict differs from the label."""
        return self.is_flagged != (self.defect != GOOD)

    @property
    def verdict(self) -> str:
        """What the detector decided, and whether that was right."""
        if self.is_flagged:
            return "found" if self.defect != GOOD else "false alarm"
        return "missed" if self.defect != GOOD else "passed"


@dataclass(frozen=True)
class Assessment:
    """Detector and baseline on the same images.

    Attributes:
        samples: the test set.
        calibration: the normal images that set the threshold.
        detector: how good the detector is.
        baseline: how good the baseline is.
        advantage: detector minus baseline for each of KEYS, with the paired bootstrap's interval.
        gallery: worst errors first.
        misses, alarms: the FAILURES worst defective and good images; where fewer verdicts are wrong, the closest calls
            follow.
        typical: the median-scored image of each defect type and of the good ones.
        limiting: the LIMITING calibration normals of the highest scores, highest first. The threshold lies among them
            or below, so one that is defective, or of a rare look, hides defects.
        findings: what the detector can find; empty until somebody tried.
    """

    samples: tuple[Sample, ...]
    calibration: tuple[Sample, ...]
    detector: Performance
    baseline: Performance
    advantage: Mapping[str, Estimate]
    gallery: tuple[Example, ...]
    misses: tuple[Example, ...]
    alarms: tuple[Example, ...]
    typical: tuple[Example, ...]
    limiting: tuple[Example, ...]
    findings: Findings = field(default_factory=Findings)

    @property
    def flagged(self) -> tuple[int, int]:
        """How many defective and how many good images the detector flags."""
        verdicts = [
            (sample.is_defective, self.detector.is_flagged(float(score)))
            for sample, score in zip(self.samples, self.detector.scores.scores, strict=True)
        ]
        return verdicts.count((True, True)), verdicts.count((False, True))


def assess(
    detector: Scorer,
    baseline: Scorer,
    samples: Sequence[Sample],
    calibration: Sequence[Sample],
    generator: np.random.Generator,
    options: EvaluateSettings,
) -> Assessment:
    """Score, measure and pick what to show.

    Raises:
        UserError: `samples` lack good or defective images, or there is no calibration image.
        FlawsmithError: a detector answered NaN or wrong shapes.
    """
    groups = [sample.defect for sample in samples]
    with array_files(2) as maps:
        ours, theirs = measure((detector, baseline), samples, calibration, generator, options, maps)
        ranked = rank_errors(ours.scores.scores, groups, ours.threshold.value)
        worst = ranked[: options.gallery]
        misses = [index for index in ranked if groups[index] != GOOD][:FAILURES]
        alarms = [index for index in ranked if groups[index] == GOOD][:FAILURES]
        typical = [_median_index(ours.scores.scores, groups, name) for name in (*ours.by_defect, GOOD)]
        shown = {
            index: _example(samples[index], ours.scores.scores[index], ours, maps[0].read(index))
            for index in {*worst, *misses, *alarms, *typical}
        }
    limiting = np.argsort(-ours.calibration.scores, kind="stable")[:LIMITING]
    with array_files(1) as (kept,):
        # of all calibration maps these few alone are ever shown: cheaper to make again than to keep
        score_samples([detector], [calibration[i] for i in limiting], options.batch, [kept], title="normals to show")
        limits = [
            _example(calibration[index], ours.calibration.scores[index], ours, kept.read(place))
            for place, index in enumerate(limiting)
        ]
    return Assessment(
        samples=tuple(samples),
        calibration=tuple(calibration),
        detector=ours,
        baseline=theirs,
        advantage={key: paired_difference(ours, theirs, key) for key in KEYS},
        gallery=tuple(shown[index] for index in worst),
        misses=tuple(shown[index] for index in misses),
        alarms=tuple(shown[index] for index in alarms),
        typical=tuple(shown[index] for index in typical),
        limiting=tuple(limits),
    )


def rank_errors(scores: NDArray[np.float32], groups: Sequence[str], threshold: float) -> list[int]:
    """Indices of images, worst first: wrong verdicts by how far off they are, then right ones by how close it was."""
    errors = _errors(scores, np.asarray([group != GOOD for group in groups]), threshold)
    return [int(index) for index in np.argsort(-errors, kind="stable")]


def spread(samples: Sequence[Sample], count: int) -> list[int]:
    """Indices of up to `count` images, half good and half defective, evenly spaced in listing order (so over types).

    Where one half has too few images the other fills up.
    """
    good = [index for index, sample in enumerate(samples) if not sample.is_defective]
    bad = [index for index, sample in enumerate(samples) if sample.is_defective]
    of_good = min(len(good), max(count // 2, count - len(bad)))
    return [
        part[place]
        for part, wanted in ((good, of_good), (bad, count - of_good))
        for place in evenly(len(part), wanted, 0.5)
    ]


def _errors(scores: NDArray[np.float32], defective: NDArray[np.bool_], threshold: float) -> NDArray[np.float64]:
    """Signed distance to the right side of the threshold, `(N,)`: positive where the verdict is wrong."""
    margins = scores.astype(np.float64) - threshold
    return np.where(defective, -margins, margins)


def _median_index(scores: NDArray[np.float32], groups: Sequence[str], name: str) -> int:
    members = [index for index, group in enumerate(groups) if group == name]
    return sorted(members, key=lambda index: (float(scores[index]), index))[len(members) // 2]


def _example(sample: Sample, score: np.float32, performance: Performance, anomaly_map: NDArray[np.float32]) -> Example:
    image, mask = sample.load()
    error = _errors(np.asarray([score]), np.asarray([sample.is_defective]), performance.threshold.value)[0]
    return Example(
        name=sample.name,
        defect=sample.defect,
        score=float(score),
        is_flagged=performance.is_flagged(float(score)),
        error=float(error),
        image=image,
        mask=mask,
        anomaly_map=anomaly_map,
        has_pixel_labels=sample.has_pixel_labels,
    )
