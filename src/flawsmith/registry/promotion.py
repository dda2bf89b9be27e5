"""Promoting and rolling back: thin shells around the pure `decision` and `ledger`.

A promotion goes: download both models from the registry → evidence → decision → health check → append to the trail
(the compare-and-set) → move the alias → see that it stands. Whatever dies on the way, the alias still points to a model
that was champion by the trail, and `history` says what was left unfinished.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from flawsmith.errors import FlawsmithError, UserError
from flawsmith.files import digest_path, write_json
from flawsmith.inference.predictor import Predictor
from flawsmith.layout import Layout
from flawsmith.registry import package
from flawsmith.registry.decision import Check, Decision, Evidence, decide
from flawsmith.registry.evidence import Compare, Downloaded, evidence_json, gather
from flawsmith.registry.history import odd_notes
from flawsmith.registry.ledger import Entry, Kind, Trail
from flawsmith.registry.registration import judging_params
from flawsmith.registry.store import PREFIX, Registry, Version, open_registry
from flawsmith.tracking import StageRun, current_actor, current_flow_run, stage_run

log = logging.getLogger(__name__)

IN_PROGRESS = timedelta(minutes=10)  # a change whose alias has not followed yet: younger is at work, older has died


@dataclass(frozen=True)
class PromotionOutcome:
    """What became of a promotion: `promoted`, `refused`, or `unchanged` (it is the champion already)."""

    outcome: str
    model: str
    version: str
    previous_champion: str
    reason: str
    labelled: bool | None = None
    checks: tuple[Check, ...] = ()
    entry: int | None = None
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**vars(self), "checks": [vars(check) for check in self.checks]}


@dataclass(frozen=True)
class Champion:
    """The model in use: `folder` holds model.onnx, reference.npz and the rest of its version."""

    model: str
    version: str
    folder: Path


def promote(
    layout: Layout,
    compare: Compare,
    *,
    version: str = "",
    reason: str = "",
    readmit: bool = False,
    dry_run: bool = False,
) -> PromotionOutcome:
    """Make a version (by default the newest) the champion if the evidence allows it.

    Args:
        layout: the category.
        compare: scores both models on today's images.
        version: number of the challenger.
        reason: a person's words for the trail; the decision's own are added.
        readmit: let a model that was rolled back stand again.
        dry_run: decide, and change nothing.

    Raises:
        UserError: there is no such version, or the store cannot be reached.
        FlawsmithError: the model fails its health check, or another change of champion came first.
    """
    registry, rules = open_registry(layout, "promote"), layout.settings.promote
    target = registry.version(version) if version else _newest(registry)
    trail = registry.trail()
    champion = _present_champion(registry, trail)
    known = registry.version(champion) if champion else None
    if known and known.digest == target.digest:
        same = "" if known.number == target.number else f" (version {target.number} is the same file)"
        return PromotionOutcome(
            "unchanged", registry.model, target.number, champion, f"Version {champion} is the champion already{same}.",
            dry_run=dry_run,
        )  # fmt: skip
    with ExitStack() as stack:
        new = Downloaded(target, stack.enter_context(registry.download(target.number)))
        old = Downloaded(known, stack.enter_context(registry.download(known.number))) if known else None
        barred = "" if readmit else trail.barred.get(target.digest, "")
        evidence = gather(new, old, compare, barred, rules.latency_runs)
        decision = decide(evidence, rules)
        words = " ".join(part for part in (reason, decision.reason) if part)
        outcome = PromotionOutcome(
            "promoted" if decision.promote else "refused", registry.model, target.number, champion, words,
            evidence.labelled, decision.checks, dry_run=dry_run,
        )  # fmt: skip
        if dry_run:
            return outcome
        with stage_run(layout, "promote", judging_params(layout) | {"images": _image_digests(layout)}) as run:
            _record(run, evidence, decision)
            entry = _entry(
                "promotion" if decision.promote else "refusal", target, trail, known, outcome.reason, run.run_id
            )
            if not decision.promote:
                number = registry.append(entry)
                registry.tag(target.number, {f"{PREFIX}.last_decision": f"refused: {words}"})
                return replace(outcome, entry=number)
            check_version(new.folder, rules.health_tolerance)
            number = _change_champion(registry, entry)
    registry.tag(
        target.number,
        {
            f"{PREFIX}.last_decision": f"promoted: {words}",
            f"{PREFIX}.promoted_at": entry.at,
            f"{PREFIX}.promoted_by": entry.actor,
            f"{PREFIX}.previous_champion": champion,
            f"{PREFIX}.reason": words,
        },
    )
    log.info("%s: version %s is champion now (before: %s).", registry.model, target.number, champion or "none")
    return replace(outcome, entry=number)


def rollback(layout: Layout, *, reason: str, to: str = "", dry_run: bool = False) -> PromotionOutcome:
    """Make the champion before the present one (or version `to`) the champion again, after its health check.

    The content that is rolled back is barred: no later `promote` takes it up again unless it is told to readmit it.

    Raises:
        UserError: there is no champion, none before it, or no version `to`.
        FlawsmithError: the model fails its health check, or another change of champion came first.
    """
    registry = open_registry(layout, "roll back")
    trail = registry.trail()
    champion = _present_champion(registry, trail)
    if not champion:
        raise UserError(f"{registry.model} has no champion, so there is nothing to roll back.")
    earlier = trail.champions[:-1] if trail.champion == champion else trail.champions
    number = to or (earlier[-1] if earlier else "")
    if not number:
        raise UserError(f"{registry.model} had no champion before version {champion}; name a version with --to.")
    target, known = registry.version(number), registry.version(champion)
    if target.number == champion:
        raise UserError(f"Version {champion} of {registry.model} is the champion; name another one with --to.")
    outcome = PromotionOutcome("rolled-back", registry.model, target.number, champion, reason, dry_run=dry_run)
    with registry.download(target.number) as folder:
        check_version(folder, layout.settings.promote.health_tolerance)
        if dry_run:
            return outcome
        with stage_run(layout, "rollback", {"reason": reason}) as run:
            entry = _entry("rollback", target, trail, known, reason, run.run_id)
            number_in_trail = _change_champion(registry, entry)
    registry.tag(known.number, {f"{PREFIX}.last_decision": f"rolled back: {reason}"})
    registry.tag(target.number, {f"{PREFIX}.last_decision": f"champion again: {reason}"})
    log.info("%s: version %s is champion again (before: %s).", registry.model, target.number, champion)
    return replace(outcome, entry=number_in_trail)


@contextmanager
def fetch_champion(layout: Layout) -> Iterator[Champion]:
    """The present champion's files in a temporary folder.

    Raises:
        UserError: there is none, or the store cannot be reached.
    """
    registry = Registry(layout.root, layout.category)
    champion = registry.champion()
    if not champion:
        raise UserError(
            f"{registry.model} has no champion; run `flawsmith register` and `flawsmith promote` for "
            f"'{layout.category}' first."
        )
    with registry.download(champion) as folder:
        yield Champion(registry.model, champion, folder)


def check_version(folder: Path, tolerance: float) -> None:
    """Whether a downloaded version is what was registered, and answers as it did then.

    Raises:
        FlawsmithError: it is not, or does not.
        UserError: a file of it is missing or damaged.
    """
    gap = package.check_health(folder / package.HEALTH, Predictor(folder / package.MODEL), tolerance)
    log.info("Health check passed: known images are scored as when registered (largest difference %.2g).", gap)


def _image_digests(layout: Layout) -> dict[str, str]:
    """On which images models are judged: the category's, and the triplets that stand in for a labelled test set."""
    folder = layout.surface().folder
    read = {name: folder / name for name in ("train", "test", "ground_truth")}
    read["synthesize"] = layout.stage("synthesize")
    return {name: digest_path(path) for name, path in read.items() if path.is_dir()}


def _record(run: StageRun, evidence: Evidence, decision: Decision) -> None:
    """Keep what was decided, and on which figures, with the MLflow run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "decision.json"
        write_json(path, {**decision.to_json(), "evidence": evidence_json(evidence)})
        run.log_artifact(path)
    run.log_metrics({f"check_{item.name}": item.value for item in decision.checks if item.value is not None})
    run.log_metrics({"promoted": float(decision.promote)})


def _entry(kind: Kind, target: Version, trail: Trail, known: Version | None, reason: str, run_id: str) -> Entry:
    last = trail.last_change
    return Entry(
        number=0,
        kind=kind,
        version=target.number,
        digest=target.digest,
        previous=last.number if last else 0,
        previous_champion=known.number if known else "",
        previous_digest=known.digest if known else "",
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        actor=current_actor(),
        reason=reason,
        run_id=run_id,
        flow_run=current_flow_run(),
    )


def _change_champion(registry: Registry, entry: Entry) -> int:
    """Append a change to the trail, and if it won, move the alias and see that it stands.

    Raises:
        FlawsmithError: another change came first (nothing was changed), or one came after and holds the alias.
    """
    number = registry.append(entry)
    trail = registry.trail()
    if number in trail.lost:
        raise FlawsmithError(
            f"The champion of {registry.model} was changed by somebody else while version {entry.version} was judged "
            f"(entry {trail.last_change.number if trail.last_change else '?'} of the trail); nothing was changed: run "
            "the command again."
        )
    registry.move_alias(entry.version)
    registry.mark_done(number)
    newest = registry.trail().last_change
    if newest and newest.number != number:
        registry.move_alias(newest.version)  # the later one knew of this one: it must have the last word
        raise FlawsmithError(
            f"Version {entry.version} of {registry.model} was overtaken by entry {newest.number} of the trail, by "
            f"{newest.actor}: version {newest.version} is the champion."
        )
    if registry.champion() != entry.version:
        raise FlawsmithError(
            f"The alias of {registry.model} was moved by hand while it was being set; see `flawsmith history`."
        )
    return number


def _present_champion(registry: Registry, trail: Trail) -> str:
    """The version behind the alias, "" if there is none.

    Raises:
        FlawsmithError: a change of champion is just under way.
    """
    champion, last = registry.champion(), trail.last_change
    unfinished = last is not None and not last.done and champion != last.version
    if last and unfinished and datetime.now(UTC) - datetime.fromisoformat(last.at) < IN_PROGRESS:
        raise FlawsmithError(
            f"Entry {last.number} of the trail of {registry.model}, by {last.actor}, is being carried out; run the "
            "command again in a few minutes."
        )
    for note in odd_notes(trail, champion):
        log.warning("%s: %s", registry.model, note)
    return champion


def _newest(registry: Registry) -> Version:
    versions = registry.versions()
    if not versions:
        raise UserError(f"{registry.model} has no version yet; run `flawsmith register` first.")
    return versions[-1]
