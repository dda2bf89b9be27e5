"""Registering: the exported model of a category becomes a version, with everything that `package` lists."""

import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flawsmith import __version__
from flawsmith.dvc import lock_digest
from flawsmith.errors import UserError
from flawsmith.files import digest_file, read_json
from flawsmith.git import git_state
from flawsmith.inference.predictor import Predictor
from flawsmith.layout import Layout
from flawsmith.lineage import Lineage, read_lineage
from flawsmith.registry import package
from flawsmith.registry.evidence import ddpm_standing, parity_objections
from flawsmith.registry.store import CONTENT, CONTENT_DIGEST, LINEAGE_TAG, MAX_TAG, PREFIX, Version, open_registry
from flawsmith.sections import section_values
from flawsmith.tracking import current_actor, current_flow_run, stage_run

log = logging.getLogger(__name__)

COMPLETE = "complete"  # the tag of a version whose lineage has no gap
NOT_MEASURED = "not measured: no defective image has a mask"


@dataclass(frozen=True)
class Registered:
    """What `register` did: `created` is false if this very content was registered before."""

    model: str
    version: str
    created: bool
    model_digest: str
    tags: dict[str, str]
    dry_run: bool = False


def register(layout: Layout, *, dry_run: bool = False) -> Registered:
    """Register the exported model of a category, unless it already is.

    A content whose origin was not proven is registered again when it is: else it could never become champion.

    Raises:
        UserError: a stage has not run, its model is a quick look, tracking is off, or the store cannot be reached.
    """
    registry = open_registry(layout, "register")
    sources = package.Sources.of(layout)
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
    with tempfile.TemporaryDirectory() as name, stage_run(layout, "register", judging_params(layout)) as run:
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
        made = registry.add_version(info, run.run_id, tags | {f"{PREFIX}.register_run": run.run_id}, _summary(tags))
    # another process may have registered the same meanwhile: of equal versions the one of the lowest number stays, for
    # the store numbers them atomically and both processes see the lower one
    first = next(item for item in registry.versions() if item.number == made.number or is_this(item))
    if first.number != made.number:
        registry.delete_version(made.number)
        log.info("%s: version %s, just registered, holds this very content.", registry.model, first.number)
        return Registered(registry.model, first.number, False, digest, dict(first.tags))
    log.info("%s: registered version %s.", registry.model, made.number)
    return Registered(registry.model, made.number, True, digest, dict(made.tags))


def judging_params(layout: Layout) -> dict[str, Any]:
    """How images are read and compared, and by which rules."""
    settings = layout.settings
    sections = {"promote": settings.promote, "data": settings.data, "evaluate": settings.evaluate}
    return {name: section_values(section) for name, section in (sections | {"teacher": settings.teacher}).items()}


def _version_tags(layout: Layout, sources: package.Sources, lineage: Lineage, digest: str) -> dict[str, str]:
    """What the registry's page and `flawsmith history` tell of a version at a glance."""
    metrics, verdict = read_json(sources.metrics), read_json(sources.verdict)
    predictor = Predictor(sources.model)
    if predictor.metadata.quick_look:
        raise UserError(
            f"{sources.model} is a quick look: no triplets, no quality gate and no lineage stand behind it, so it "
            f"cannot be registered; run `flawsmith export --category {layout.category}` for the trained model."
        )
    metadata, (height, width) = predictor.metadata, predictor.input_shape
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
        "ddpm": ddpm_standing(verdict)[0],
        "parity": "; ".join(parity_objections(read_json(sources.parity), digest)) or "proven",
        "labelled": json.dumps(metrics["labelled"]),
        "image_auroc": f"{metrics['image_auroc']:.4f}",
        **{key: NOT_MEASURED if metrics[key] is None else f"{metrics[key]:.4f}" for key in ("pixel_auroc", "aupro")},
        **{
            f"a90_95.{name}": "not told" if one["a90_95"] is None else f"{one['a90_95']:.4g} {one['unit']}"
            for name, one in metrics.get("detection", {}).items()
        },
        "threshold": repr(metadata.threshold),
        "pixel_threshold": repr(metadata.pixel_threshold),
        "false_alarm_rate": f"{metadata.false_alarm_rate:g}",
        "input_size": f"{width} x {height}",
        "flawsmith_version": __version__,
        "registered_by": current_actor(),
        "flow_run": current_flow_run(),
    }
    return {f"{PREFIX}.{key}": value for key, value in tags.items()}


def _summary(tags: dict[str, str]) -> str:
    """A version's description."""
    kind = "labelled test set" if tags[f"{PREFIX}.labelled"] == "true" else "held-out synthetic defects"
    return (
        f"image AUROC {tags[f'{PREFIX}.image_auroc']}, AUPRO {tags[f'{PREFIX}.aupro']} ({kind}); quality gate "
        f"{tags[f'{PREFIX}.gate']}; lineage {tags[f'{PREFIX}.lineage']}."
    )
