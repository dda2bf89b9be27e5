"""What a promotion rests on: the certificates inside a version, and its answers and speed beside the champion's.

Each `..._objections` says in words what speaks against a certificate as proof; an empty tuple means that it is one.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flawsmith.data.images import FloatImage, read_image, resize_image
from flawsmith.dvc import content_digest
from flawsmith.errors import FlawsmithError
from flawsmith.evaluation.compare import ModelComparison
from flawsmith.export.latency import measure_latency
from flawsmith.files import digest_file, read_json
from flawsmith.inference.predictor import Predictor
from flawsmith.registry.decision import Evidence, ModelFacts, estimates_json
from flawsmith.registry.package import HEALTH, LINEAGE, METRICS, MODEL, PARITY, VERDICT
from flawsmith.registry.store import Version

log = logging.getLogger(__name__)

AGAIN = "run `dvc repro` and register again"  # what helps where a proof is missing

Compare = Callable[[Predictor, Predictor | None], tuple[ModelComparison, bool]]
"""Challenger and champion (None: first model) to their comparison on today's images, and whether these are labelled."""


@dataclass(frozen=True)
class Downloaded:
    """A registered version, and the folder that holds its files now."""

    version: Version
    folder: Path

    @property
    def model(self) -> Path:
        """Its ONNX file."""
        return self.folder / MODEL


def gather(
    challenger: Downloaded, champion: Downloaded | None, compare: Compare, rolled_back: str, latency_runs: int
) -> Evidence:
    """Judge both models on today's images, time them, and read the challenger's certificates.

    Args:
        challenger: who wants to become champion.
        champion: None for the first model.
        compare: scores both.
        rolled_back: why this content was rolled back earlier, "" if it never was.
        latency_runs: timed runs a model.

    Raises:
        FlawsmithError: an ONNX file is not the one that was registered.
    """
    both = [challenger, champion] if champion else [challenger]
    for one in both:
        if digest_file(one.model) != one.version.digest:
            raise FlawsmithError(
                f"The model.onnx of version {one.version.number} is not the file that was registered (another "
                "SHA-256); somebody changed the artifact store: register the model again."
            )
    predictors = [Predictor(one.model) for one in both]
    log.info("Models are compared on %s.", predictors[0].provider)
    comparison, labelled = compare(predictors[0], predictors[1] if champion else None)
    image = _known_normal(challenger.folder, predictors[0].metadata.scale)
    times = measure_latency([partial(one.predict, [image]) for one in predictors], latency_runs)  # (models, runs)
    latencies = np.percentile(times, 95, axis=1).tolist()
    facts = [
        ModelFacts(one.version.number, one.version.digest, one.model.stat().st_size / 1e6, latency)
        for one, latency in zip(both, latencies, strict=True)
    ]
    chain, verdict = read_json(challenger.folder / LINEAGE), read_json(challenger.folder / VERDICT)
    return Evidence(
        challenger=facts[0],
        champion=facts[1] if champion else None,
        comparison=comparison,
        labelled=labelled,
        parity=parity_objections(read_json(challenger.folder / PARITY), challenger.version.digest),
        gate=gate_objections(verdict, is_known=_knows(chain, challenger.folder / VERDICT)),
        ddpm=ddpm_standing(verdict),
        missing_links=lineage_objections(chain),
        rolled_back=rolled_back,
        a90_95=_a90_95(challenger.folder, champion.folder) if champion else {},
    )


def evidence_json(evidence: Evidence) -> dict[str, Any]:
    """The figures of an evidence as plain JSON values."""
    comparison = evidence.comparison
    values = {}
    for name, scores in (("challenger", comparison.challenger), ("champion", comparison.champion)):
        if scores:
            estimates = {**scores.values, "false_alarm_rate": scores.false_alarms}
            if scores.flagged_shades:
                estimates["flagged_shades"] = scores.flagged_shades
            values[name] = estimates_json(estimates)
    return {
        "challenger": vars(evidence.challenger),
        "champion": vars(evidence.champion) if evidence.champion else None,
        "labelled": evidence.labelled,
        "images": dict(comparison.counts),
        "calibration_images": comparison.calibration_images,
        "values": values,
        "differences": estimates_json(comparison.differences),
        "differences_by_defect": estimates_json(comparison.defect_differences),
    }


def _a90_95(challenger: Path, champion: Path) -> dict[str, tuple[float, float]]:
    """For each source of defects that the champion has an a90/95 of: both versions' own, of one unit and contrast."""
    ours, theirs = (read_json(folder / METRICS).get("detection", {}) for folder in (challenger, champion))
    found = {}
    for name, one in theirs.items():
        other = ours.get(name, {**one, "a90_95": None})
        if one["a90_95"] is not None and (one["unit"], one["contrast"]) == (other["unit"], other["contrast"]):
            found[name] = (math.inf if other["a90_95"] is None else other["a90_95"], one["a90_95"])
    return found


def _known_normal(folder: Path, scale: float) -> FloatImage:
    """A known normal image, brought back from the working resolution of its model to about the size it had: what one
    part costs includes its resizing and all its tiles, at whatever scale a model sees it."""
    paths = sorted((folder / HEALTH).glob("*.png"))
    image = read_image(next((path for path in paths if path.name.startswith("normal-")), paths[0]))
    return resize_image(image, (round(image.shape[1] / scale), round(image.shape[2] / scale))) if scale else image


def parity_objections(certificate: Mapping[str, Any], model_digest: str) -> tuple[str, ...]:
    """Against a parity certificate as proof of the model with this SHA-256."""
    found = []
    if certificate.get("model_digest") != model_digest:
        found.append(f"the parity certificate ({PARITY}) is of another file: {AGAIN}")
    batches = certificate.get("batches") or {}
    if not batches:
        found.append(f"the parity certificate ({PARITY}) holds no comparison: {AGAIN}")
    try:
        for batch, figures in batches.items():
            gap = float(np.max([figures["map_difference"], figures["score_difference"]]))  # max would drop a NaN
            flips = figures["decision_flips"]
            if flips or not gap <= certificate["tolerance"]:
                found.append(f"torch and ONNX disagree at batch {batch} ({flips} flips, difference {gap:.3g})")
    except (KeyError, TypeError) as error:
        found.append(f"the parity certificate is damaged ({error} is missing)")
    return tuple(found)


def gate_objections(verdict: Mapping[str, Any], is_known: bool = True) -> tuple[str, ...]:
    """Against a verdict as proof of good triplets; `is_known`: the model was trained under this one."""
    if not is_known:
        return (f"the quality gate's verdict ({VERDICT}) is not the one that the model was trained under: {AGAIN}",)
    if verdict.get("passed") is True:
        return ()
    failed = [
        f"{item['name']} ({item['failing']} of {verdict.get('triplets')} triplets)"
        if item["failing"] or item["observed"] is None
        else f"{item['name']} ({item['meaning']}: {item['observed']})"
        for item in verdict.get("expectations", ())
        if not item["passed"] and item["severity"] == "critical"
    ]
    return (f"the quality gate failed: {', '.join(failed) or 'no expectation was checked'}",)


def lineage_objections(chain: Mapping[str, Any]) -> tuple[str, ...]:
    """Against a version's lineage.json as proof of where the model came from."""
    changed = [f"{item['changed']} and register again" for item in chain.values() if "changed" in item]
    missing = [
        f"the origin of {path} is not recorded: {AGAIN}"
        for path, item in chain.items()
        if not item["source"] and "stage" not in item and "changed" not in item
    ]
    return (*changed, *missing)


def _knows(chain: Mapping[str, Any], path: Path) -> bool:
    """Whether a file's content is among those behind a model; older versions have SHA-256 in their chain."""
    return not {item["digest"] for item in chain.values()}.isdisjoint({content_digest(path), digest_file(path)})


def ddpm_standing(verdict: Mapping[str, Any]) -> tuple[str, float | None, float | None]:
    """What the gate knew of the DDPM behind the triplets: in words, its samples' distance, and the critical bound."""
    found = next((item for item in verdict.get("expectations", ()) if item["name"] == "ddpm_not_noise"), None)
    if found is None:
        return "no DDPM made the triplets, or its readiness was not recorded", None, None
    return str(verdict.get("ddpm")), found["observed"], found["bounds"][1]
