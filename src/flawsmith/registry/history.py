"""What the registry tells a person: every decision on a category's models, and where one of them came from."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flawsmith.errors import UserError
from flawsmith.files import read_json
from flawsmith.git import has_revision
from flawsmith.layout import Layout
from flawsmith.lineage import SHOWN
from flawsmith.registry.evidence import lineage_objections
from flawsmith.registry.ledger import Trail
from flawsmith.registry.package import DRAWN_LINEAGE, LINEAGE
from flawsmith.registry.store import ALIAS, PREFIX, Registry, Version


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
                **dict(sorted(version.facts.items())),
            }
            for version in registry.versions()
        ],
        "trail": [{**vars(entry), "lost": entry.number in trail.lost} for entry in trail.entries],
        "notes": odd_notes(trail, champion),
    }


def render_history(found: Mapping[str, Any]) -> str:
    """`history` as text for a person."""
    champion = f"version {found['champion']}" if found["champion"] else "not chosen"
    lines = [f"{found['model']}: champion is {champion}"]
    for entry in found["trail"]:
        lost = "  LOST THE RACE: nothing was changed" if entry["lost"] else ""
        before = f" (before: {entry['previous_champion']})" if entry["previous_champion"] else ""
        flow = f", Prefect run {entry['flow_run']}" if entry["flow_run"] else ""
        lines += [
            f"  {entry['number']:>3}  {entry['at']}  {entry['kind']:9}  version {entry['version']}{before}{lost}",
            f"       by {entry['actor']}{flow}, MLflow run {entry['run_id']}",
            f"       {entry['reason']}",
        ]
    lines += [f"  note: {note}" for note in found["notes"]]
    return "\n".join(lines if found["trail"] else [*lines, "  no decision yet"])


def odd_notes(trail: Trail, champion: str) -> list[str]:
    """Where the alias does not point to the champion of the trail: why, in words."""
    last = trail.last_change
    if last is None:
        by_hand = f"the alias points to version {champion} but the trail is empty: it was set by hand"
        return [by_hand] if champion else []
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


@dataclass(frozen=True)
class VersionName:
    """A version as a person names it; `category` "" means the only one of params.yaml."""

    category: str
    version: str  # a number, or the alias


@dataclass(frozen=True)
class Origin:
    """The chain of a version as text, and in words what is missing of it."""

    text: str
    missing: tuple[str, ...]


def parse_version(text: str) -> VersionName | None:
    """`C@champion`, `C/3`, `flawsmith-C/3`, `models:/flawsmith-C/3` or `3`; None if it is none of these.

    Six digits or more are taken for a digest's.
    """
    if re.fullmatch(r"\d{1,5}", text):
        return VersionName("", text)
    found = re.fullmatch(rf"(?:models:/)?(?:{PREFIX}-)?([^./@:][^/@:]*)(?:/(\d+)|@({ALIAS}))", text)
    return VersionName(found[1], found[2] or found[3]) if found else None


def describe_origin(layout: Layout, version: str) -> Origin:
    """The whole chain behind a version, as it was proven when the version was registered.

    Raises:
        UserError: there is no such version, or the store cannot be reached.
    """
    registry = Registry(layout.root, layout.category)
    number = registry.champion() if version == ALIAS else version
    if not number:
        raise UserError(f"{registry.model} has no champion; name a version, e.g. {layout.category}/1.")
    found = registry.version(number)
    with registry.download(number) as folder:
        chain, drawn = read_json(folder / LINEAGE), (folder / DRAWN_LINEAGE).read_text().rstrip()
    missing = (*lineage_objections(chain), *_unproven_code(layout, found, chain))
    lines = [*_head(registry, found), "", drawn, ""]
    lines += [f"MISSING: {item}" for item in missing] or ["Nothing is missing."]
    return Origin("\n".join(lines), missing)


def _head(registry: Registry, version: Version) -> list[str]:
    facts = version.facts
    champion = f" ({ALIAS})" if registry.champion() == version.number else ""
    flow = f"Prefect run {facts['flow_run']}" if facts.get("flow_run") else "by hand, no Prefect run"
    lines = [
        f"{version.model} version {version.number}{champion}",
        f"  registered  {version.created:%Y-%m-%d %H:%M:%S} UTC by {facts.get('registered_by', '?')}, {flow}",
        f"  model.onnx  sha256 {version.digest}",
        f"  git         {facts.get('git_revision', '?')}{' + changes' if facts.get('git_dirty') == 'true' else ''}",
        f"  dvc.lock    sha256 {facts.get('dvc_lock_digest') or '?'}",
        f"  gate        {facts.get('gate', '?')}",
        f"  parity      {facts.get('parity', '?')}",
        f"  MLflow run  {version.run_id[:SHOWN]}",
    ]
    decisions = [entry for entry in registry.trail().entries if entry.version == version.number]
    return lines + [f"  {entry.kind:11} {entry.at} by {entry.actor}: {entry.reason}" for entry in decisions]


def _unproven_code(layout: Layout, version: Version, chain: Mapping[str, Any]) -> list[str]:
    """What this repository cannot show of the code that made a version, in words."""
    found = []
    for name, meaning in (("dvc_lock_digest", "digest of dvc.lock"), ("git_revision", "git revision")):
        if version.facts.get(name, "") in ("", "unknown"):
            found.append(f"the {meaning} was not known when the version was registered")
    recorded = [item for item in chain.values() if item.get("run_id")]
    revisions = {item["revision"] for item in recorded}
    named = {*revisions, version.facts.get("git_revision", "unknown")} - {"unknown"}
    absent = [revision[:SHOWN] for revision in sorted(named) if not has_revision(layout.root, revision)]
    if absent:
        found.append(f"git revision {', '.join(absent)} is not in this repository (fetch it, or it was rebased away)")
    if "unknown" in revisions:
        found.append("a stage ran outside a git repository")
    dirty = sorted({item["stage"] for item in recorded if item["dirty"]})
    if dirty:
        found.append(f"{', '.join(dirty)} ran with uncommitted changes, which no revision holds")
    return found
