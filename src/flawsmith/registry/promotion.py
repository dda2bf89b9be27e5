"""Registering, promoting and rolling back: thin shells around the pure `decision` and `ledger`.

A promotion goes: download both models from the registry → evidence → decision → health check → append to the trail
(the compare-and-set) → move the alias → see that it stands. Whatever dies on the way, the alias still points to a model
that was champion by the trail, and `history` says what was left unfinished.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from flawsmith import __version__
from flawsmith.data.images import FloatImage, read_image, resize_image
from flawsmith.dvc import lock_digest
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.evaluation.paired import Comparison
from flawsmith.files import digest_file, digest_path, read_json, write_json
from flawsmith.inference.predictor import Predictor
from flawsmith.layout import Layout
from flawsmith.lineage import read_lineage
from flawsmith.registry import package
from flawsmith.registry.decision import Check, Decision, Evidence, ModelFacts, decide, estimates_json
from flawsmith.registry.ledger import Entry, Trail
from flawsmith.registry.store import CONTENT, CONTENT_DIGEST, LINEAGE_TAG, MAX_TAG, PREFIX, Registry, Version
from flawsmith.settings import section_values
from flawsmith.tracking import StageRun, current_actor, current_flow_run, git_state, stage_run

log = logging.getLogger(__name__)

COMPLETE = "complete"  # the tag of a version whose lineage has no gap
NOT_MEASURED = "not measured: no defective image has a mask"
IN_PROGRESS = timedelta(minutes=10)  # a change whose alias has not followed yet: younger is at work, older has died

Compare = Callable[[Predictor, Predictor | None], tuple[Comparison, bool]]
"""Challenger and champion (None: first model) to their comparison on today's images, and whether these are labelled."""


@dataclass(frozen=True)
class Registered:
    """What `register` did: `created` is false if this very content was registered before."""

    model: str
    version: str
    created: bool
    model_digest: str
    tags: dict[str, str]
    dry_run: bool = False


@dataclass(frozen=True)
class Outcome:
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
        return {**vars(self), "checks": [vars(check) for check in self.checks]}


@dataclass(frozen=True)
class Champion:
    """The model in use: `folder` holds model.onnx, reference.npz and the rest of its version."""

    model: str
    version: str
    folder: Path


def register(layout: Layout, *, dry_run: bool = False) -> Registered:
    """Register the exported model of a category, with everything that `package` lists, unless it already is.

    A content whose origin was not proven is registered again when it is: else it could never become champion.

    Raises:
        UserError: a stage has not run, tracking is off, or the store cannot be reached.
    """
    _demand_tracking(layout, "register")
    sources = package.Sources.of(layout)
    registry = Registry(layout.root, layout.category)
    digest, content_digest, versions = digest_file(sources.model), sources.content_digest, registry.versions()
    lineage = read_lineage(layout.root, layout.settings, sources.model)
    tags = _version_tags(layout, sources, lineage, digest)
    proven = {COMPLETE, tags[LINEAGE_TAG][:MAX_TAG]}

    def is_this(version: Version) -> bool:
        return version.tags.get(CONTENT_DIGEST) == content_digest and version.tags.get(LINEAGE_TAG) in proven

    for version in reversed(versions):
        if is_this(version):
            log.info("%s: version %s holds this very content already.", registry.model, version.number)
            return Registered(registry.model, version.number, False, digest, dict(version.tags), dry_run)
    if dry_run:
        following = max((int(version.number) for version in versions), default=0) + 1
        return Registered(registry.model, str(following), True, digest, tags, dry_run)
    with (
        tempfile.TemporaryDirectory() as name,
        stage_run(layout, "register", _params(layout)) as run,
    ):
        content = Path(name) / CONTENT
        content.mkdir()
        package.build_content(layout, sources, lineage, content)
        from flawsmith.registry.serving import log_serving_model  # costs the seconds that MLflow's pyfunc takes

        with registry.fluent_run(run.run_id):
            info = log_serving_model(sources.model, {CONTENT: content}, layout.settings.data.reading.max_pixels)
        if (digest_file(sources.model), sources.content_digest) != (digest, content_digest):
            raise UserError(
                f"The stages' outputs of '{layout.category}' have changed while they were registered; run it again."
            )
        made = registry.add_version(
            info.model_uri, info.model_id, run.run_id, tags | {f"{PREFIX}.register_run": run.run_id}, _summary(tags)
        )
    # another process may have registered the same meanwhile: of equal versions the one of the lowest number stays, for
    # the store numbers them atomically and both processes see the lower one
    first = next(item for item in registry.versions() if item.number == made.number or is_this(item))
    if first.number != made.number:
        registry.delete_version(made.number)
        log.info("%s: version %s, just registered, holds this very content.", registry.model, first.number)
        return Registered(registry.model, first.number, False, digest, dict(first.tags))
    log.info("%s: registered version %s.", registry.model, made.number)
    return Registered(registry.model, made.number, True, digest, dict(made.tags))


def promote(
    layout: Layout,
    compare: Compare,
    *,
    version: str = "",
    reason: str = "",
    readmit: bool = False,
    dry_run: bool = False,
) -> Outcome:
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
    _demand_tracking(layout, "promote")
    registry, rules = Registry(layout.root, layout.category), layout.settings.promote
    target = registry.version(version) if version else _newest(registry)
    trail = registry.trail()
    champion = _present_champion(registry, trail)
    known = registry.version(champion) if champion else None
    if known and known.digest == target.digest:
        same = "" if known.number == target.number else f" (version {target.number} is the same file)"
        return Outcome(
            "unchanged", registry.model, target.number, champion, f"Version {champion} is the champion already{same}.",
            dry_run=dry_run,
        )  # fmt: skip
    with ExitStack() as stack:
        new = stack.enter_context(registry.download(target.number))
        old = stack.enter_context(registry.download(champion)) if champion else None
        barred = "" if readmit else trail.barred.get(target.digest, "")
        evidence = _evidence(target, known, new, old, compare, barred, rules.latency_runs)
        decision = decide(evidence, rules)
        words = " ".join(part for part in (reason, decision.reason) if part)
        outcome = Outcome(
            "promoted" if decision.promote else "refused", registry.model, target.number, champion, words,
            evidence.labelled, decision.checks, dry_run=dry_run,
        )  # fmt: skip
        if dry_run:
            return outcome
        with stage_run(layout, "promote", _params(layout) | {"images": _image_digests(layout)}) as run:
            _record(run, evidence, decision)
            entry = _entry(
                "promotion" if decision.promote else "refusal", target, trail, known, outcome.reason, run.run_id
            )
            if not decision.promote:
                number = registry.append(entry)
                registry.tag(target.number, {f"{PREFIX}.last_decision": f"refused: {words}"})
                return replace(outcome, entry=number)
            check_version(new, rules.health_tolerance)
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


def rollback(layout: Layout, *, reason: str, to: str = "", dry_run: bool = False) -> Outcome:
    """Make the champion before the present one (or version `to`) the champion again, after its health check.

    The content that is rolled back is barred: no later `promote` takes it up again unless it is told to readmit it.

    Raises:
        UserError: there is no champion, none before it, or no version `to`.
        FlawsmithError: the model fails its health check, or another change of champion came first.
    """
    _demand_tracking(layout, "roll back")
    registry = Registry(layout.root, layout.category)
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
    outcome = Outcome("rolled-back", registry.model, target.number, champion, reason, dry_run=dry_run)
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


def history(layout: Layout) -> dict[str, Any]:
    """Versions, the trail of decisions and who is champion, as plain JSON values; `notes` says what is odd."""
    registry = Registry(layout.root, layout.category)
    trail, champion = registry.trail(), registry.champion()
    return {
        "model": registry.model,
        "champion": champion or None,
        "versions": [
            {
                "version": version.number,
                "registered_at": version.created.isoformat(timespec="seconds"),
                **{key.removeprefix(f"{PREFIX}."): value for key, value in sorted(version.tags.items())},
            }
            for version in registry.versions()
        ],
        "trail": [{**vars(entry), "lost": entry.number in trail.lost} for entry in trail.entries],
        "notes": _notes(trail, champion),
    }


def render_history(found: dict[str, Any]) -> str:
    """`history` as text for a person."""
    champion = f"version {found['champion']}" if found["champion"] else "not chosen"
    lines = [f"{found['model']}: champion is {champion}"]
    for entry in found["trail"]:
        lost = "  LOST THE RACE: nothing was changed" if entry["lost"] else ""
        before = f" (before: {entry['previous_champion']})" if entry["previous_champion"] else ""
        lines.append(
            f"  {entry['number']:>3}  {entry['at']}  {entry['kind']:9}  version {entry['version']}{before}{lost}"
        )
        flow = f", Prefect run {entry['flow_run']}" if entry["flow_run"] else ""
        lines.append(f"       by {entry['actor']}{flow}, MLflow run {entry['run_id']}")
        lines.append(f"       {entry['reason']}")
    lines += [f"  note: {note}" for note in found["notes"]]
    if not found["trail"]:
        lines.append("  no decision yet")
    return "\n".join(lines)


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


def _evidence(
    target: Version,
    known: Version | None,
    new: Path,
    old: Path | None,
    compare: Compare,
    rolled_back: str,
    latency_runs: int,
) -> Evidence:
    paths = [folder / package.MODEL for folder in (new, old) if folder]
    for path, version in zip(paths, (target, known), strict=False):
        if version and digest_file(path) != version.digest:
            raise FlawsmithError(
                f"The model.onnx of version {version.number} is not the file that was registered (another SHA-256); "
                "somebody changed the artifact store: register the model again."
            )
    predictors = [Predictor(path) for path in paths]
    log.info("Models are compared on %s.", predictors[0].provider)
    comparison, labelled = compare(predictors[0], predictors[1] if len(predictors) > 1 else None)
    latencies = package.measure_latency(predictors, _an_image(new, predictors[0].metadata.scale), latency_runs)
    facts = [
        ModelFacts(version.number, version.digest, package.megabytes(path), latency)
        for version, path, latency in zip([item for item in (target, known) if item], paths, latencies, strict=True)
    ]
    chain = read_json(new / package.LINEAGE)
    path = new / package.VERDICT
    verdict = read_json(path)
    gate = package.gate_objections(verdict, is_known=package.knows(chain, path))
    return Evidence(
        challenger=facts[0],
        champion=facts[1] if len(facts) > 1 else None,
        comparison=comparison,
        labelled=labelled,
        parity=package.parity_objections(read_json(new / package.PARITY), target.digest),
        gate=gate,
        ddpm=package.ddpm_standing(verdict),
        missing_links=package.lineage_objections(chain),
        rolled_back=rolled_back,
    )


def _params(layout: Layout) -> dict[str, Any]:
    """What decides besides the inputs: how images are read and compared, and by which rules."""
    settings = layout.settings
    sections = {"promote": settings.promote, "data": settings.data, "evaluate": settings.evaluate}
    return {name: section_values(section) for name, section in (sections | {"teacher": settings.teacher}).items()}


def _image_digests(layout: Layout) -> dict[str, str]:
    """On which images models are judged: the category's, and the triplets that stand in for a labelled test set."""
    folder = layout.surface().folder
    read = {name: folder / name for name in ("train", "test", "ground_truth")}
    read["synthesize"] = layout.stage("synthesize")
    return {name: digest_path(path) for name, path in read.items() if path.is_dir()}


def _an_image(folder: Path, scale: float) -> FloatImage:
    """A known normal image, brought back from the working resolution of its model to about the size it had: what one
    part costs includes its resizing and all its tiles, at whatever scale a model sees it."""
    paths = sorted((folder / package.HEALTH).glob("*.png"))
    image = read_image(next((path for path in paths if path.name.startswith("normal-")), paths[0]))
    return resize_image(image, (round(image.shape[1] / scale), round(image.shape[2] / scale))) if scale else image


def _record(run: StageRun, evidence: Evidence, decision: Decision) -> None:
    """Keep what was decided, and on which figures, with the MLflow run."""
    comparison = evidence.comparison
    figures: dict[str, Any] = {
        "challenger": vars(evidence.challenger),
        "champion": vars(evidence.champion) if evidence.champion else None,
        "labelled": evidence.labelled,
        "images": dict(comparison.counts),
        "calibration_images": comparison.calibration_images,
        "values": {
            name: estimates_json(
                {
                    **standing.values,
                    "false_alarm_rate": standing.false_alarms,
                    **({"flagged_shades": standing.flagged_shades} if standing.flagged_shades else {}),
                }
            )
            for name, standing in (("challenger", comparison.challenger), ("champion", comparison.champion))
            if standing
        },
        "differences": estimates_json(comparison.differences),
        "differences_by_defect": estimates_json(comparison.defect_differences),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "decision.json"
        write_json(path, {**decision.to_json(), "evidence": figures})
        run.log_artifact(path)
    run.log_metrics({f"check_{item.name}": item.value for item in decision.checks if item.value is not None})
    run.log_metrics({"promoted": float(decision.promote)})


def _entry(kind: Any, target: Version, trail: Trail, known: Version | None, reason: str, run_id: str) -> Entry:
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
    for note in _notes(trail, champion):
        log.warning("%s: %s", registry.model, note)
    return champion


def _notes(trail: Trail, champion: str) -> list[str]:
    last = trail.last_change
    if last is None:
        return (
            [f"the alias points to version {champion} but the trail is empty: it was set by hand"] if champion else []
        )
    if champion == last.version:
        return []
    if not last.done:
        return [
            f"entry {last.number} ({last.kind} of version {last.version} by {last.actor}, {last.at}) was never "
            f"finished: version {champion or 'none'} is still the champion"
        ]
    return [
        f"the alias points to version {champion or 'none'} but by entry {last.number} of the trail version "
        f"{last.version} is the champion: it was moved by hand"
    ]


def _newest(registry: Registry) -> Version:
    versions = registry.versions()
    if not versions:
        raise UserError(f"{registry.model} has no version yet; run `flawsmith register` first.")
    return versions[-1]


def _version_tags(layout: Layout, sources: package.Sources, lineage: Any, digest: str) -> dict[str, str]:
    metrics, verdict = read_json(sources.metrics), read_json(sources.verdict)
    metadata = Predictor(sources.model).metadata
    revision, dirty = git_state(layout.root)
    missing = [*(path for path, _ in lineage.changed), *(item.path for item in lineage.missing())]
    tags = {
        "category": layout.category,
        "model_digest": digest,
        "content_digest": sources.content_digest,
        **{f"{name}_digest": value for name, value in package.digest_tags(lineage, layout.category).items()},
        "dvc_lock_digest": lock_digest(layout.root) or "",
        "git_revision": revision,
        "git_dirty": str(dirty).lower(),
        "lineage": COMPLETE if not missing else f"not proven: {', '.join(missing)}",
        "gate": f"{'passed' if verdict['passed'] else 'failed'}; {verdict['triplets']} triplets; worst failure: "
        f"{verdict['severity'] or 'none'}",
        "ddpm": package.ddpm_standing(verdict)[0],
        "parity": "; ".join(package.parity_objections(read_json(sources.parity), digest)) or "proven",
        "labelled": json.dumps(metrics["labelled"]),
        "image_auroc": f"{metrics['image_auroc']:.4f}",
        **{key: NOT_MEASURED if metrics[key] is None else f"{metrics[key]:.4f}" for key in ("pixel_auroc", "aupro")},
        "threshold": repr(metadata.threshold),
        "pixel_threshold": repr(metadata.pixel_threshold),
        "false_alarm_rate": f"{metadata.false_alarm_rate:g}",
        "input_size": str(metadata.input_size),
        "flawsmith_version": __version__,
        "registered_by": current_actor(),
        "flow_run": current_flow_run(),
    }
    return {f"{PREFIX}.{key}": value for key, value in tags.items()}


def _summary(tags: dict[str, str]) -> str:
    kind = "labelled test set" if tags[f"{PREFIX}.labelled"] == "true" else "held-out synthetic defects"
    return (
        f"image AUROC {tags[f'{PREFIX}.image_auroc']}, AUPRO {tags[f'{PREFIX}.aupro']} ({kind}); quality gate "
        f"{tags[f'{PREFIX}.gate']}; lineage {tags[f'{PREFIX}.lineage']}."
    )


def _demand_tracking(layout: Layout, what: str) -> None:
    if layout.settings.tracking.mode == "off":
        raise UserError(f"Nothing to {what} with `tracking.mode: off`: the registry lives in MLflow; set it to `on`.")
