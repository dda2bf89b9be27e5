"""What is demanded of the triplets, and the verdict: pure, so that both can be read and tested without any tool.

Integrity (files, sizes, pixels) binds every triplet and is critical. Rules of appearance bind the share `mostly` of the
triplets, for a synthesis draws its defects at random and a few odd ones do no harm.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flawsmith.quality.config import ValidateSettings

Severity = Literal["critical", "warning"]
Kind = Literal["row count", "unique", "true", "not null", "range", "of all"]

IDS_SHOWN = 20  # ids of failing triplets a rule in the verdict; measures.parquet holds them all
NAMES_SHOWN = 4  # failed rules in the error's sentence

DISTANCE, NOVELTY = "relative_distance", "neighbour_ratio"  # of readiness.json
MEASURED = ("mask_area", "components", "change_inside", "change_outside", "visible_share", "ssim", "foreground_overlap")


@dataclass(frozen=True)
class Rule:
    """One demand on a column of the measures, on their number, or (kind `of all`) on one figure for the whole set."""

    name: str
    kind: Kind
    severity: Severity
    meaning: str
    column: str = ""
    low: float | None = None
    high: float | None = None
    mostly: float = 1.0  # share of the triplets that must satisfy it


def ddpm_rules(settings: ValidateSettings) -> tuple[Rule, ...]:
    """What is demanded of the DDPM behind diffused defects: its samples are surface, and no copies of it.

    The columns are the fields of readiness.json.
    """
    near, far = settings.max_sample_distance
    copied, close = settings.min_sample_novelty
    return (
        Rule("ddpm_not_noise", "of all", "critical", "the DDPM's samples are far from noise", DISTANCE, high=far),
        Rule("ddpm_no_copies", "of all", "critical", "the DDPM repeats no training image", NOVELTY, low=copied),
        Rule("ddpm_ready", "of all", "warning", "the DDPM's samples pass for real surface", DISTANCE, high=near),
        Rule("ddpm_novel", "of all", "warning", "the DDPM's samples are as new as unseen images", NOVELTY, low=close),
    )


def rules(settings: ValidateSettings) -> tuple[Rule, ...]:
    """The suite for every triplet, in order of what to look at first when several fail."""
    return (
        Rule("triplet_count", "row count", "critical", "there are enough triplets", low=settings.min_triplets),
        Rule("triplet_id_unique", "unique", "critical", "the manifest lists a triplet once", "triplet_id"),
        *(Rule(name, "true", "critical", meaning, name) for name, meaning in INTEGRITY.items()),
        *_ranges(settings, "critical"),
        # A range is silent about a missing value, so each measure must be there.
        *(
            Rule(f"{name}_measured", "not null", "critical", f"{name} could be measured", name)
            for name in (*MEASURED, "duplicates")
        ),
        *_ranges(settings, "warning"),
    )


INTEGRITY = {
    "in_manifest": "every triplet on disk is listed in the manifest",
    "on_disk": "every triplet of the manifest has its three files",
    "decodable": "all three files of a triplet are readable images",
    "size_agrees": "normal, defect and mask have one size, its shorter side data.image_size",
    "finite": "no pixel is NaN or infinite",
}


def _ranges(settings: ValidateSettings, wanted: Severity) -> Iterator[Rule]:
    """The rules of one severity that keep a measure within bounds."""
    usual, few = settings.mostly, 1 - settings.max_duplicate_share
    inside, seen, overlap = settings.min_change_inside, settings.min_visible_share, settings.min_foreground_overlap
    table: tuple[tuple[str, Severity, str, float | None, float | None, float], ...] = (
        ("mask_area", "critical", "the mask marks something, but no large part of the image", *settings.mask_area, 1.0),
        ("change_inside", "critical", "the defect changes the pixels of its mask", inside, None, 1.0),
        ("visible_share", "critical", "most of the mask has visibly changed", seen, None, usual),
        ("change_outside", "critical", "nothing changed away from the mask", None, settings.max_change_outside, 1.0),
        ("duplicates", "critical", "no defect image occurs twice", None, 0, few),
        ("foreground_overlap", "warning", "the defect lies on the part", overlap, None, usual),
        ("ssim", "warning", "the defect is neither invisible nor another image", *settings.ssim, usual),
        ("components", "warning", "the mask is no scatter of specks", None, settings.max_components, usual),
    )
    for name, severity, meaning, low, high, mostly in table:
        if severity == wanted:
            yield Rule(name, "range", severity, meaning, name, low, high, mostly)


@dataclass(frozen=True)
class Outcome:
    """How one rule fared.

    Attributes:
        passed: whether the demand is met, `mostly` taken into account.
        failing_ids: triplets that break it, in the order of the measures; they may be few enough to pass.
        observed: by the rule's kind the number of rows, the figure of the whole set, or the smallest and largest value
            of the column; None if there is none.
    """

    rule: Rule
    passed: bool
    failing_ids: tuple[str, ...]
    observed: float | tuple[float, float] | None


@dataclass(frozen=True)
class Verdict:
    """Whether the triplets may train anything, and why."""

    passed: bool
    severity: Severity | None  # of the worst failure
    triplets: int
    outcomes: tuple[Outcome, ...]
    ddpm: str | None = None  # whether the DDPM behind them was ready, in words; None if there is none

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, the same for the same triplets: no times, no run ids."""
        return {
            "passed": self.passed,
            "severity": self.severity,
            "triplets": self.triplets,
            "ddpm": self.ddpm,
            "expectations": [
                {
                    "name": outcome.rule.name,
                    "meaning": outcome.rule.meaning,
                    "severity": outcome.rule.severity,
                    "passed": outcome.passed,
                    "bounds": [outcome.rule.low, outcome.rule.high],
                    "mostly": outcome.rule.mostly,
                    "observed": list(outcome.observed) if isinstance(outcome.observed, tuple) else outcome.observed,
                    "failing": len(outcome.failing_ids),
                    "failing_ids": list(outcome.failing_ids[:IDS_SHOWN]),
                }
                for outcome in self.outcomes
            ],
        }

    def reason(self) -> str:
        """Name the failures of the worst severity in one clause; empty if there is none."""
        failed = [item for item in self.outcomes if not item.passed and item.rule.severity == self.severity]
        named = [self._named(outcome) for outcome in failed[:NAMES_SHOWN]]
        more = [f"{len(failed) - NAMES_SHOWN} more"] if len(failed) > NAMES_SHOWN else []
        return ", ".join(named + more)

    def _named(self, outcome: Outcome) -> str:
        if outcome.rule.kind == "row count":
            return f"{outcome.rule.name} ({self.triplets} triplets, at least {outcome.rule.low} are needed)"
        if outcome.rule.kind == "of all":
            bound = f"{outcome.rule.high:g} at most" if outcome.rule.low is None else f"{outcome.rule.low:g} at least"
            return f"{outcome.rule.name} ({outcome.rule.column} is {outcome.observed:.3g}, {bound} is allowed)"
        example = f", e.g. {outcome.failing_ids[0]}" if outcome.failing_ids else ""
        return f"{outcome.rule.name} ({len(outcome.failing_ids)} of {self.triplets} triplets{example})"


def decide(outcomes: Sequence[Outcome], triplets: int, reported: Severity | None = None) -> Verdict:
    """Judge outcomes: a critical failure stops the pipeline, a warning does not; no outcome at all stops it too.

    `reported` is the worst failure in the eyes of the tool that checked; the worse of the two views counts.
    """
    failed = {outcome.rule.severity for outcome in outcomes if not outcome.passed} | {reported}
    severity: Severity | None = None
    if "critical" in failed or not outcomes:
        severity = "critical"
    elif "warning" in failed:
        severity = "warning"
    return Verdict(severity != "critical", severity, triplets, tuple(outcomes))
