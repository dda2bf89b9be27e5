"""Where a registered version came from, model → stage runs → triplets → DDPM → data → git, and what is missing."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flawsmith.errors import UserError
from flawsmith.files import read_json
from flawsmith.layout import Layout
from flawsmith.lineage import SHOWN
from flawsmith.registry import package
from flawsmith.registry.store import ALIAS, PREFIX, Registry, Version
from flawsmith.tracking import has_revision


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
        chain, text = read_json(folder / package.LINEAGE), (folder / package.DRAWN_LINEAGE).read_text().rstrip()
    missing = _missing(layout, found, chain)
    lines = [*_head(registry, found), "", text, ""]
    lines += [f"MISSING: {item}" for item in missing] or ["Nothing is missing."]
    return Origin("\n".join(lines), missing)


def _head(registry: Registry, version: Version) -> list[str]:
    tags = {key.removeprefix(f"{PREFIX}."): value for key, value in version.tags.items()}
    champion = f" ({ALIAS})" if registry.champion() == version.number else ""
    flow = f"Prefect run {tags['flow_run']}" if tags.get("flow_run") else "by hand, no Prefect run"
    lines = [
        f"{version.model} version {version.number}{champion}",
        f"  registered  {version.created:%Y-%m-%d %H:%M:%S} UTC by {tags.get('registered_by', '?')}, {flow}",
        f"  model.onnx  sha256 {version.digest}",
        f"  git         {tags.get('git_revision', '?')}{' + changes' if tags.get('git_dirty') == 'true' else ''}",
        f"  dvc.lock    sha256 {tags.get('dvc_lock_digest') or '?'}",
        f"  gate        {tags.get('gate', '?')}",
        f"  parity      {tags.get('parity', '?')}",
        f"  MLflow run  {version.run_id[:SHOWN]}",
    ]
    decisions = [entry for entry in registry.trail().entries if entry.version == version.number]
    return lines + [f"  {entry.kind:11} {entry.at} by {entry.actor}: {entry.reason}" for entry in decisions]


def _missing(layout: Layout, version: Version, chain: Mapping[str, Any]) -> tuple[str, ...]:
    found = list(package.lineage_objections(chain))
    for name, meaning in (("dvc_lock_digest", "digest of dvc.lock"), ("git_revision", "git revision")):
        if version.tags.get(f"{PREFIX}.{name}", "") in ("", "unknown"):
            found.append(f"the {meaning} was not known when the version was registered")
    recorded = [item for item in chain.values() if item.get("run_id")]
    revisions = {item["revision"] for item in recorded}
    named = {*revisions, version.tags.get(f"{PREFIX}.git_revision", "unknown")} - {"unknown"}
    absent = [revision[:SHOWN] for revision in sorted(named) if not has_revision(layout.root, revision)]
    if absent:
        found.append(f"git revision {', '.join(absent)} is not in this repository (fetch it, or it was rebased away)")
    if "unknown" in revisions:
        found.append("a stage ran outside a git repository")
    dirty = sorted({item["stage"] for item in recorded if item["dirty"]})
    if dirty:
        found.append(f"{', '.join(dirty)} ran with uncommitted changes, which no revision holds")
    return tuple(found)
