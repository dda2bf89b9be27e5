"""Walking back from an artefact to the data it came from, by content: who wrote these bytes, what did that run read?

Pure: the records come from dvc.lock (`repro`), which proves what was made of what, and from MLflow (`tracking`), which
adds when and by which run; here they are only joined and drawn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath

SHOWN = 12  # hex digits of a digest or run id that are drawn; enough to be found again


@dataclass(frozen=True)
class Artefact:
    """A file or folder by content; `path` is relative to the project's root.

    `digest` is DVC's MD5 where dvc.lock names the content, else `digest_path`'s SHA-256.
    """

    name: str
    path: str
    digest: str


@dataclass(frozen=True)
class RunRecord:
    """One finished stage run: what it read and wrote, when (UTC), and from which code and params.

    What only dvc.lock knows has no `run_id`, start and revision; `code` is then the digest of the code it ran.
    """

    run_id: str
    stage: str
    category: str
    started: datetime | None
    revision: str
    dirty: bool
    params_digest: str
    inputs: tuple[Artefact, ...]
    outputs: tuple[Artefact, ...]
    flow_run: str = ""  # the orchestrator's run that started it, if any
    code: str = ""
    store: str = ""  # where the run is recorded, if not in the store that is in use

    @property
    def key(self) -> str:
        """What tells it from other runs."""
        return self.run_id or f"{self.stage}@{self.category}"


@dataclass(frozen=True)
class Lineage:
    """An artefact, the newest run that wrote it, and the lineage of everything that run read.

    `writers` counts the runs that wrote this very content. Without a run, `is_source` tells the user's own data, where
    a chain rightly ends, from a missing link; `note` says in words what is missing. `changed`, of the outermost node
    alone, says of each file or folder behind it that is no longer what dvc.lock proves (path, sentence).
    """

    artefact: Artefact
    run: RunRecord | None
    writers: int
    parents: tuple["Lineage", ...] = ()
    is_source: bool = False
    note: str = ""
    changed: tuple[tuple[str, str], ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every path back ends at a source, and nothing on it was changed since."""
        if self.changed:
            return False
        if self.run is None:
            return self.is_source
        return all(parent.complete for parent in self.parents)

    def missing(self) -> tuple[Artefact, ...]:
        """The artefacts whose origin is unknown, outermost first."""
        if self.run is None:
            return () if self.is_source else (self.artefact,)
        return tuple(artefact for parent in self.parents for artefact in parent.missing())

    def nodes(self) -> tuple["Lineage", ...]:
        """This node and everything behind it, a content that several runs read only once.

        Where a run read what it wrote, that content is there twice: with its run, and as the link that is missing.
        """
        found: dict[tuple[str, bool], Lineage] = {(self.artefact.digest, self.run is None): self}
        for parent in self.parents:
            for node in parent.nodes():
                found.setdefault((node.artefact.digest, node.run is None), node)
        return tuple(found.values())


def is_below(path: str, folder: str, either: bool = False) -> bool:
    """Whether `path` is `folder` or lies inside it; with `either`, or the other way round."""
    one, other = PurePosixPath(path), PurePosixPath(folder)
    return one.is_relative_to(other) or (either and other.is_relative_to(one))


def walk(
    artefact: Artefact,
    writers_of: Callable[[Artefact], Sequence[RunRecord]],
    is_source: Callable[[Artefact], bool],
    explain: Callable[[Artefact], str],
) -> Lineage:
    """Follow `artefact` back through the runs that wrote it and the artefacts those runs read.

    Args:
        artefact: where to start.
        writers_of: the finished runs that wrote this content, newest first.
        is_source: whether a chain may end here (data that no stage makes).
        explain: why nothing is known of an artefact that is no source, in one sentence.
    """
    known: dict[Artefact, Sequence[RunRecord]] = {}

    def follow(current: Artefact, path: tuple[str, ...]) -> Lineage:
        if current not in known:
            known[current] = writers_of(current)
        # a stage that leaves its input as it was has read what it wrote: it must not become its own ancestor
        runs = [run for run in known[current] if run.key not in path]
        if not runs:
            source = is_source(current)
            return Lineage(current, None, 0, is_source=source, note="" if source else explain(current))
        newest = runs[0]
        parents = tuple(follow(item, (*path, newest.key)) for item in newest.inputs)
        return Lineage(current, newest, len(runs), parents)

    return follow(artefact, ())


def render_lineage(tree: Lineage) -> str:
    """The tree as text, model first; a run that several artefacts share is drawn in full once."""
    lines: list[str] = []
    drawn: set[str] = set()

    def draw(node: Lineage, first: str, rest: str) -> None:
        run = node.run
        label = f"{node.artefact.path or node.artefact.name}  [{node.artefact.digest[:SHOWN]}]"
        if run is None:
            lines.append(f"{first}{label}  {'source data' if node.is_source else 'MISSING LINK'}")
            if node.note:
                lines.append(f"{rest}  {node.note}")
            return
        again = run.key in drawn
        lines.append(f"{first}{label}  <- {run.stage} ({run.category}){'  (drawn above)' if again else ''}")
        if again:
            return
        drawn.add(run.key)
        stem = "│ " if node.parents else "  "
        lines.append(f"{rest}{stem}  {_how(run)}")
        if node.writers > 1:
            lines.append(f"{rest}{stem}  newest of {node.writers} runs that wrote this content")
        for index, parent in enumerate(node.parents):
            last = index == len(node.parents) - 1
            draw(parent, f"{rest}{'└─ ' if last else '├─ '}", f"{rest}{'   ' if last else '│  '}")

    draw(tree, "", "")
    missing = {artefact.path or artefact.name for artefact in tree.missing()}
    if missing:
        lines.append(f"Incomplete: the origin of {', '.join(sorted(missing))} is not recorded.")
    lines += [f"Changed since: {sentence}." for _, sentence in tree.changed]
    return "\n".join(lines)


def _how(run: RunRecord) -> str:
    """Which run it was and from what, in one line."""
    rest = f"params {run.params_digest[:SHOWN]}{f'  Prefect {run.flow_run[:SHOWN]}' if run.flow_run else ''}"
    if run.started is None:
        return f"proven by dvc.lock, no run recorded here  code {run.code[:SHOWN]}  {rest}"
    return (
        f"run {run.run_id[:SHOWN]}{f' in {run.store}' if run.store else ''}  {run.started:%Y-%m-%d %H:%M:%S} UTC  "
        f"git {run.revision[:SHOWN]}{' + changes' if run.dirty else ''}  {rest}"
    )
