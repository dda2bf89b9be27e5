"""Whether a challenger becomes the champion: a pure function of the evidence that returns every check with its figure.

A challenger must not be worse than the champion by more than a margin, with 97.5 % confidence: the lower end of the
95 % interval of the paired difference lies above minus the margin (a non-inferiority test, as in clinical trials:
ICH E9, section 3.3.2). Every check must hold, so no correction for their number is due (Berger 1982, the
intersection-union test). Non-inferior step by non-inferior step a model could still slide downwards: the absolute
floors bind at every step.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flawsmith.evaluation.compare import ModelComparison
from flawsmith.evaluation.intervals import Estimate
from flawsmith.registry.config import PromoteSettings


@dataclass(frozen=True)
class ModelFacts:
    """What is known of one model beside its answers: version, content, size, and speed on the deciding machine."""

    version: str
    digest: str  # SHA-256 of model.onnx
    megabytes: float
    latency_ms: float  # p95 of one image


@dataclass(frozen=True)
class Evidence:
    """All that a decision rests on.

    Attributes:
        labelled: the images are a labelled test set; otherwise held-out synthetic triplets stand in for it.
        parity: objections against the parity certificate, in words; empty if it proves this very file.
        gate: objections against the quality gate's verdict on the triplets that trained it; empty if passed.
        ddpm: what the gate knew of the DDPM behind those triplets: in words, its samples' distance, the critical bound.
        missing_links: what of the challenger's lineage is not proven, in words; empty if all is.
        rolled_back: why this very content was rolled back earlier; empty if it never was.
        a90_95: of each source of defects that the champion has one of, challenger's and champion's; infinite where it
            cannot be told.
    """

    challenger: ModelFacts
    champion: ModelFacts | None
    comparison: ModelComparison
    labelled: bool
    parity: Sequence[str]
    gate: Sequence[str]
    ddpm: tuple[str, float | None, float | None]
    missing_links: Sequence[str]
    rolled_back: str
    a90_95: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One demand: the figure, the bound it is held against, and the sentence a plant manager reads.

    `proof`: it asks whether the evidence can be trusted at all, not how good the model is.
    """

    name: str
    passed: bool
    value: float | None
    bound: float | None
    detail: str
    proof: bool = False


@dataclass(frozen=True)
class Decision:
    """`promote` is true if every check passed."""

    promote: bool
    checks: tuple[Check, ...]
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {"promote": self.promote, "reason": self.reason, "checks": [vars(check) for check in self.checks]}


def decide(evidence: Evidence, rules: PromoteSettings) -> Decision:
    """Judge a challenger; without a champion only the absolute demands bind."""
    checks = (*_integrity(evidence), *_absolute(evidence, rules), *_relative(evidence, rules))
    failed = [check for check in checks if not check.passed]
    if failed:
        more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
        return Decision(False, checks, f"{'; '.join(check.detail for check in failed[:3])}{more}.")
    return Decision(True, checks, _praise(evidence))


def _integrity(evidence: Evidence) -> list[Check]:
    def words(name: str, objections: Sequence[str], good: str, proof: bool = True) -> Check:
        return Check(name, not objections, float(len(objections)), 0.0, "; ".join(objections) or good, proof)

    said, distance, bound = evidence.ddpm
    return [
        words("parity_certificate", evidence.parity, "the ONNX file is proven to answer as the trained model"),
        words("quality_gate", evidence.gate, "the triplets that trained it passed the quality gate"),
        Check("ddpm_ready", distance is None or bound is None or distance <= bound, distance, bound, said, proof=True),
        words("lineage", evidence.missing_links, "every link from the model back to the data is proven"),
        words(
            "not_rolled_back",
            [f"this very model was rolled back ({evidence.rolled_back})"] if evidence.rolled_back else [],
            "this model was never rolled back",
            proof=False,
        ),
    ]


def _absolute(evidence: Evidence, rules: PromoteSettings) -> list[Check]:
    model, standing = evidence.challenger, evidence.comparison.challenger
    kind = "labelled test" if evidence.labelled else "held-out synthetic"
    auroc, overlap = standing.values["image_auroc"], standing.values["aupro"]
    alarms = standing.false_alarms
    return [
        _at_least(
            "image_auroc_floor", auroc.value, rules.min_image_auroc, f"image AUROC {_interval(auroc)} on {kind} images"
        ),
        _at_least("aupro_floor", overlap.value, rules.min_aupro, f"AUPRO {_interval(overlap)} on {kind} images")
        if evidence.comparison.has_masks
        else _unchecked("aupro_floor", rules.min_aupro),
        _at_most(
            "false_alarm_rate",
            alarms.value,
            rules.max_false_alarm_rate,
            f"{alarms.value:.1%} of {evidence.comparison.calibration_images} calibration normals flagged",
        ),
        _at_most("latency_ms", model.latency_ms, rules.max_latency_ms, f"p95 of one image {model.latency_ms:.1f} ms"),
        _at_most("size_megabytes", model.megabytes, rules.max_megabytes, f"model file {model.megabytes:.1f} MB"),
    ]


def _relative(evidence: Evidence, rules: PromoteSettings) -> list[Check]:
    champion, comparison = evidence.champion, evidence.comparison
    if champion is None:
        return []
    if comparison.champion is None:
        return [
            Check("compared", False, None, None, f"it was not compared with the champion, version {champion.version}")
        ]
    checks = [
        _not_worse("image_auroc_difference", comparison.differences["image_auroc"], rules.margin, "image AUROC"),
        _not_worse("aupro_difference", comparison.differences["aupro"], rules.pixel_margin, "AUPRO")
        if comparison.has_masks
        else _unchecked("aupro_difference", -rules.pixel_margin),
    ]
    checks += [
        _not_worse(
            f"image_auroc_difference[{name}]",
            difference,
            rules.defect_margin,
            f"image AUROC on {name} ({comparison.counts[name]} images)",
        )
        for name, difference in comparison.defect_differences.items()
    ]
    ratio = evidence.challenger.latency_ms / champion.latency_ms
    checks.append(
        _at_most("latency_ratio", ratio, rules.max_latency_ratio, f"p95 is {ratio:.2f} times that of the champion")
    )
    if rules.max_a90_ratio:
        checks += [
            _at_most(
                f"a90_ratio[{name}]",
                ours / theirs,
                rules.max_a90_ratio,
                f"a90/95 of defects from {name} over the champion's is {ours / theirs:.2f}",
            )
            for name, (ours, theirs) in evidence.a90_95.items()
        ]
    return checks


def _not_worse(name: str, difference: Estimate, margin: float, what: str) -> Check:
    passed = difference.low > -margin or (margin == 0 and difference.low == 0)
    verdict = "not worse" if passed else "may be worse"
    detail = f"{what} {verdict} than the champion's by {margin:g}: difference {_interval(difference, sign=True)}"
    return Check(name, passed, _finite(difference.low), -margin, detail)


def _at_least(name: str, value: float, bound: float, what: str) -> Check:
    passed = value >= bound
    return Check(
        name, passed, _finite(value), bound, f"{what}{'' if passed else ', below the floor'} ({bound:g} or more)"
    )


def _at_most(name: str, value: float, bound: float, what: str) -> Check:
    passed = value <= bound
    return Check(
        name, passed, _finite(value), bound, f"{what}{'' if passed else ', over the limit'} ({bound:g} or less)"
    )


def _unchecked(name: str, bound: float) -> Check:
    return Check(name, True, None, bound, "AUPRO is not checked: no defective test image has a mask")


def _interval(estimate: Estimate, sign: bool = False) -> str:
    form = "+.3f" if sign else ".3f"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _praise(evidence: Evidence) -> str:
    kind = "labelled test images" if evidence.labelled else "held-out synthetic defects (no labelled test set)"
    auroc = evidence.comparison.challenger.values["image_auroc"]
    if evidence.champion is None:
        return f"First model: image AUROC {_interval(auroc)} on {kind} and every floor kept."
    difference = evidence.comparison.differences["image_auroc"]
    return (
        f"Not worse than version {evidence.champion.version} on {kind}: image AUROC {_interval(auroc)}, difference "
        f"{_interval(difference, sign=True)}, every check passed."
    )


def estimates_json(values: Mapping[str, Estimate]) -> dict[str, list[float | None]]:
    """Estimates as [value, low, high], six decimals."""
    return {name: [_finite(round(float(part), 6)) for part in estimate] for name, estimate in values.items()}


def _finite(value: float) -> float | None:
    """A figure as JSON can hold it: NaN, which no check passes, and infinity are none."""
    return float(value) if math.isfinite(value) else None
