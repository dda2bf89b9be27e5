"""Where a model came from: dvc.lock proves which stage left a content and what it read, back to the data.

The runs that MLflow recorded add when that was, from which git revision, and which flow started it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from flawsmith import dvc
from flawsmith.config import Settings
from flawsmith.dvc import Artefact, LockedStage, is_below
from flawsmith.errors import UserError
from flawsmith.tracking import Run, RunFinder

SHOWN = 12  # hex digits of a digest or run id that are drawn; enough to be found again
MIN_PREFIX = 6


@dataclass(frozen=True)
class Lineage:
    """An artefact, the stage that made it, and the lineage of everything that this stage read.

    Attributes:
        stage: None for source data, and where nothing is known.
        run: the newest recorded run that left the content, if any.
        is_source: the user's own data, where a chain rightly ends.
        note: what is missing, in words.
        changed: of the outermost node alone: (path, sentence) of all behind it that is no longer what dvc.lock says.
    """

    artefact: Artefact
    stage: LockedStage | None = None
    run: Run | None = None
    parents: tuple["Lineage", ...] = ()
    is_source: bool = False
    note: str = ""
    changed: tuple[tuple[str, str], ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every path back ends at a source, and nothing on it was changed since."""
        return not self.changed and not self.missing()

    def missing(self) -> tuple[Artefact, ...]:
        """The artefacts of unknown origin, outermost first."""
        if self.stage is None:
            return () if self.is_source else (self.artefact,)
        return tuple(artefact for parent in self.parents for artefact in parent.missing())

    def nodes(self) -> tuple["Lineage", ...]:
        """This node and everything behind it; content that several stages read comes once."""
        found = {self.artefact: self}
        for parent in self.parents:
            for node in parent.nodes():
                found.setdefault(node.artefact, node)
        return tuple(found.values())


def read_lineage(root: Path, settings: Settings, target: str | Path) -> Lineage:
    """The lineage of a file, a folder, or a digest of dvc.lock (or its first 6 digits or more).

    A file may lie anywhere: its content counts. Without a store of runs the chain is as complete.

    Raises:
        UserError: the target is neither, or no or several digests of dvc.lock begin with it; dvc.lock cannot be read.
    """
    stages = dvc.locked_stages(root, settings.data.root)
    start = _find(root, stages, target)
    runs = RunFinder(root, settings)

    @cache
    def run_of(stage: LockedStage) -> Run | None:
        return runs.newest(stage.category, stage.name, [item.digest for item in stage.outputs])

    tree = walk(start, stages, lambda item: is_below(item.path, settings.data.root), run_of)
    if tree.stage is None and not tree.is_source and (run := runs.newest_of_any(start.digest)):
        return replace(
            tree,
            note=f"Run {run.run_id[:SHOWN]} at git {run.revision[:SHOWN]} made it, but dvc.lock is of later results; "
            "name its registered version (CATEGORY/NUMBER), or check out the dvc.lock that names it.",
        )
    chain = [node.stage for node in tree.nodes() if node.stage]
    content = {item.path for stage in chain for item in (*stage.inputs, *stage.outputs)}
    found = dvc.changed(root, [stage.target for stage in chain]) if chain else {}
    remedy = f"`dvc repro {tree.stage.target}`" if tree.stage else ""
    changed = (
        (path, f"{path} is not what dvc.lock says of `{target}`: run {remedy}")
        for path, target in found.items()
        if path in content  # newer code makes no origin untrue
    )
    return replace(tree, changed=tuple(changed))


def _find(root: Path, stages: Sequence[LockedStage], target: str | Path) -> Artefact:
    """The target as dvc.lock names it; where that knows nothing of it, by its own path and digest."""
    path = Path(target)
    made = [item for stage in stages for item in stage.outputs]
    if path.exists():
        whole, top = path.resolve(), root.resolve()
        shown = whole.relative_to(top).as_posix() if whole.is_relative_to(top) else ""
        if named := next((item for item in made if item.path == shown), None):
            return named
        digest = dvc.content_digest(path)
        if shown and any(_overlap(shown, item.path) for item in made):
            return Artefact(shown, digest)
        return next((item for item in made if item.digest == digest), Artefact(shown or path.name, digest))
    prefix = str(target).lower()
    if not re.fullmatch(rf"[0-9a-f]{{{MIN_PREFIX},64}}", prefix):
        raise UserError(
            f"`{target}` is no existing file or folder and no digest; give an ONNX file, a stage's folder, or at "
            f"least {MIN_PREFIX} hex digits of a digest."
        )
    read = [item for stage in stages for item in stage.inputs]
    found = {item.digest: item for item in [*read, *made] if item.digest.startswith(prefix)}
    if not found:
        raise UserError(
            f"dvc.lock names no content with digest {prefix}; give the file or folder itself, or run the pipeline "
            "first (`dvc repro`)."
        )
    if len(found) > 1:
        raise UserError(f"Digest {prefix} is ambiguous; give more digits of one of {', '.join(sorted(found))}.")
    return next(iter(found.values()))


def walk(
    artefact: Artefact,
    stages: Sequence[LockedStage],
    is_source: Callable[[Artefact], bool],
    run_of: Callable[[LockedStage], Run | None] = lambda stage: None,
) -> Lineage:
    """Follow `artefact` back through the stages that made it and what those read.

    Args:
        artefact: where to start: an output of a stage, a file inside one, or a folder of several.
        stages: what dvc.lock holds. No stage reads what comes after it: DVC refuses circles.
        is_source: whether a chain may end at something that no stage makes.
        run_of: the recorded run of a stage.
    """
    owner = next((stage for stage in stages if any(item.path == artefact.path for item in stage.outputs)), None)
    if owner is not None:
        makers = {owner} if artefact in owner.outputs else set()
    else:
        makers = {stage for stage in stages for item in stage.outputs if _overlap(artefact.path, item.path)}
    if len(makers) != 1:
        if is_source(artefact):
            return Lineage(artefact, is_source=True)
        left = f"By dvc.lock `{owner.target}` has left another content since." if owner else ""
        return Lineage(artefact, note=left or "dvc.lock names no stage that made it: run `dvc repro`.")
    (maker,) = makers
    parents = tuple(walk(item, stages, is_source, run_of) for item in maker.inputs)
    return Lineage(artefact, maker, run_of(maker), parents)


def _overlap(one: str, other: str) -> bool:
    """Whether one of two paths is the other or lies inside it."""
    return is_below(one, other) or is_below(other, one)


def render_lineage(tree: Lineage) -> str:
    """The tree as text, model first; a stage that left several artefacts is drawn in full once."""
    lines: list[str] = []
    drawn: set[str] = set()

    def draw(node: Lineage, first: str, rest: str) -> None:
        stage = node.stage
        label = f"{node.artefact.path}  [{node.artefact.digest[:SHOWN]}]"
        if stage is None:
            lines.append(f"{first}{label}  {'source data' if node.is_source else 'MISSING LINK'}")
            if node.note:
                lines.append(f"{rest}  {node.note}")
            return
        again = stage.target in drawn
        lines.append(f"{first}{label}  <- {stage.name} ({stage.category}){'  (drawn above)' if again else ''}")
        if again:
            return
        drawn.add(stage.target)
        lines.append(f"{rest}{'│ ' if node.parents else '  '}  {_how(stage, node.run)}")
        for index, parent in enumerate(node.parents):
            last = index == len(node.parents) - 1
            draw(parent, f"{rest}{'└─ ' if last else '├─ '}", f"{rest}{'   ' if last else '│  '}")

    draw(tree, "", "")
    if missing := sorted({artefact.path for artefact in tree.missing()}):
        lines.append(f"Incomplete: the origin of {', '.join(missing)} is not recorded.")
    lines += [f"Changed since: {sentence}." for _, sentence in tree.changed]
    return "\n".join(lines)


def _how(stage: LockedStage, run: Run | None) -> str:
    """Which run it was and from what, in one line."""
    if run is None:
        return f"proven by dvc.lock, no run recorded here  code {stage.code[:SHOWN]}  params {stage.params[:SHOWN]}"
    store = f" in {run.store}" if run.store else ""
    return (
        f"run {run.run_id[:SHOWN]}{store}  {run.started:%Y-%m-%d %H:%M:%S} UTC  git {run.revision[:SHOWN]}"
        f"{' + changes' if run.dirty else ''}  params {stage.params[:SHOWN]}"
        f"{f'  Prefect {run.flow_run[:SHOWN]}' if run.flow_run else ''}"
    )
