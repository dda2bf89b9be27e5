"""Stage runs in MLflow, linked by content: the one module that meets MLflow's tracking.

A run is tagged with the digests of what it read and wrote, so a model leads back to its data without any run id inside
a file that DVC versions:

    with stage_run(layout, "distill", {"triplets": layout.stage("synthesize")}, params) as run:
        run.log_metrics({"loss": loss}, step)
        run.set_outputs({"detector": layout.stage("distill")})

Runs go to the experiment `<experiment_prefix>/<category>` of MLFLOW_TRACKING_URI, or of `mlflow.db` in the project's
root. `tracking.mode: off` makes everything here a no-op that does not import MLflow.
"""

import getpass
import json
import logging
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flawsmith import dvc
from flawsmith.errors import UserError
from flawsmith.files import digest_json, digest_path
from flawsmith.layout import Layout
from flawsmith.lineage import SHOWN, Artefact, Lineage, RunRecord, is_below, render_lineage, walk
from flawsmith.processes import is_main_process
from flawsmith.settings import Settings
from flawsmith.standing import Standing

__all__ = [
    "StageRun",
    "check_store",
    "connect",
    "current_actor",
    "current_flow_run",
    "git_state",
    "has_revision",
    "read_lineage",
    "render_lineage",
    "stage_run",
    "store_errors",
    "tracking_uri",
    "without_password",
]

logger = logging.getLogger(__name__)

STAGE, CATEGORY = "flawsmith.stage", "flawsmith.category"
INPUTS, OUTPUTS = "flawsmith.inputs", "flawsmith.outputs"
PARAMS_DIGEST, DIRTY, ERROR = "flawsmith.params_digest", "flawsmith.git_dirty", "flawsmith.error"
FLOW_RUN, ACTOR = "flawsmith.flow_run", "flawsmith.actor"
CHECKOUT, PID = "flawsmith.checkout", "flawsmith.pid"
# set by an orchestrator for the stages it starts: the id of its run, and in words who acts
FLOW_RUN_VARIABLE, ACTOR_VARIABLE = "FLAWSMITH_FLOW_RUN", "FLAWSMITH_ACTOR"
REVISION = "mlflow.source.git.commit"  # MLflow's own key: its UI shows it as the run's version

PROBE_SECONDS = 4.0
FLUSH_SECONDS = 10.0  # a long stage can be watched while it runs
FLUSH_METRICS = 500
MAX_TAG, MAX_PARAM, MAX_PARAMS_A_BATCH, MAX_METRICS_A_BATCH = 8000, 6000, 100, 1000  # MLflow's limits
MAX_PARTS = 24  # files and folders inside a stage's outputs that get a digest of their own
MIN_PREFIX = 6
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


class StageRun:
    """What a stage says about itself while it runs; this class records nothing, as `tracking.mode: off` wants it."""

    run_id = ""  # in the store; "" where nothing is recorded

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record values, of a step where there is one. Cheap: values are sent in batches."""

    def set_tag(self, name: str, value: str) -> None:
        """Say in a word what is true of this run on this machine, and no part of what decides its result."""

    def log_artifact(self, path: Path) -> None:
        """Copy a figure, report or folder into the run."""

    def set_outputs(self, outputs: Mapping[str, Path]) -> None:
        """Name what the stage writes; it is digested when the stage has succeeded."""


@contextmanager
def stage_run(layout: Layout, stage: str, inputs: Mapping[str, Path], params: Mapping[str, Any]) -> Iterator[StageRun]:
    """Record one run of `stage` on the layout's category.

    Args:
        layout: the category's paths and settings.
        stage: the stage's name, as in dvc.yaml.
        inputs: what the stage reads, by a short name; each is digested now. Give the same file or folder that the
            earlier stage named in `set_outputs`, or a file directly inside it.
        params: what decides the result besides the inputs; nested mappings become dotted names.

    Yields:
        The run to log to. If the block raises, the run is marked FAILED (KILLED on Ctrl-C) with the message. A store
        that goes away while the stage runs costs a warning and the missing records, never the stage's work.

    Raises:
        UserError: the store cannot be reached, an input does not exist, or DVC cannot see all that the stage reads.
        FlawsmithError: when the block has ended: what the stage depends on was changed meanwhile.
    """
    if not is_main_process():
        yield StageRun()
        return
    standing = Standing.of(layout, stage)
    if layout.settings.tracking.mode == "off":
        yield StageRun()
        standing.check()
        return
    read = [_artefact(layout.root, name, path) for name, path in inputs.items()]
    run = _MlflowRun(layout, stage, read, params)
    try:
        yield run
        standing.check()
        written = run.describe_outputs()
    except BaseException as error:
        run.end(
            "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", {ERROR: f"{type(error).__name__}: {error}"}
        )
        raise
    run.end("FINISHED", {OUTPUTS: written})


def read_lineage(root: Path, settings: Settings, target: str | Path) -> Lineage:
    """The lineage of a file, a folder, or a digest (or its first 6 digits or more).

    Where dvc.lock names the target it proves the chain, and the recorded runs add when and by which run; the files that
    are no longer what it says are named. Of all else the recorded runs alone know.

    Raises:
        UserError: the target is neither, the prefix fits several digests or none, or the store cannot be reached.
    """
    if not Path(target).exists() and not re.fullmatch(rf"[0-9a-fA-F]{{{MIN_PREFIX},64}}", str(target)):
        raise UserError(
            f"`{target}` is no existing file or folder and no digest; give an ONNX file, a stage's folder, or at "
            f"least {MIN_PREFIX} hex digits of a digest."
        )
    stages = dvc.locked_stages(root, settings.data.root)
    locked = _locked_artefact(root, stages, target)
    if locked is not None:
        return _proven_lineage(root, settings, stages, *locked)
    uri = tracking_uri(root)
    if not _has_store(uri):
        raise UserError(
            f"{_sqlite_file(uri)} does not exist, so no runs are recorded, and dvc.lock does not name `{target}`; run "
            "the pipeline first (`dvc repro`)."
        )
    store = _Store(uri, settings)
    path = Path(target)
    start = _artefact(root, path.name, path) if path.exists() else store.find_digest(str(target).lower())
    return walk(start, store.writers_of, lambda item: is_below(item.path, settings.data.root), store.explain)


def _locked_artefact(
    root: Path, stages: Sequence[RunRecord], target: str | Path
) -> tuple[Artefact, RunRecord | None] | None:
    """What dvc.lock calls the target, and the stage that made it (None: a source); None if it names no such content."""
    made = [(item, stage) for stage in stages for item in stage.outputs]
    path = Path(target)
    if not path.exists():
        read: list[tuple[Artefact, RunRecord | None]] = [(item, None) for stage in stages for item in stage.inputs]
        prefix = str(target).lower()
        found = {item.digest: (item, stage) for item, stage in [*read, *made] if item.digest.startswith(prefix)}
        return next(iter(found.values())) if len(found) == 1 else None
    shown = _shown(root, path)
    exact = next(((item, stage) for item, stage in made if item.path == shown), None)
    if exact is not None:
        return exact
    makers = {stage.key: stage for item, stage in made if shown and is_below(shown, item.path, either=True)}
    if len(makers) == 1:  # a stage's folder, or a file inside an output
        return Artefact(path.name, shown, digest_path(path)), next(iter(makers.values()))
    if path.is_file():
        digest = dvc.dvc_digest(path)
        return next(((item, stage) for item, stage in made if item.digest == digest), None)
    return None


def _proven_lineage(
    root: Path, settings: Settings, stages: Sequence[RunRecord], start: Artefact, maker: RunRecord | None
) -> Lineage:
    """The chain by dvc.lock, with what the stores know of its stages."""

    def makers_of(artefact: Artefact) -> list[RunRecord]:
        if artefact == start:
            return [maker] if maker else []
        whole = [stage for stage in stages if any(item.path == artefact.path for item in stage.outputs)]
        if whole:
            return [stage for stage in whole if artefact in stage.outputs]
        return [stage for stage in stages if any(is_below(artefact.path, item.path) for item in stage.outputs)]

    def explain(artefact: Artefact) -> str:
        owner = next((stage.key for stage in stages if any(item.path == artefact.path for item in stage.outputs)), "")
        return f"By dvc.lock `{owner}` has left another content since." if owner else "No stage of dvc.lock made it."

    def is_source(artefact: Artefact) -> bool:
        return is_below(artefact.path, settings.data.root)

    chain = {node.run.key: node.run for node in walk(start, makers_of, is_source, explain).nodes() if node.run}
    content = {item.path for stage in chain.values() for item in (*stage.inputs, *stage.outputs)}
    found = dvc.changed(root, list(chain)) if chain else {}
    changed = {path: stage for path, stage in found.items() if path in content}  # newer code makes no origin untrue
    known = _recorded(root, settings, list(chain.values()), changed)
    tree = walk(start, lambda item: [known[run.key] for run in makers_of(item)], is_source, explain)
    remedy = f"`dvc repro{f' {maker.key}' if maker else ''}`"
    return replace(
        tree,
        changed=tuple(
            (path, f"{path} is not what dvc.lock says of `{stage}`: run {remedy}") for path, stage in changed.items()
        ),
    )


def _recorded(
    root: Path, settings: Settings, stages: Sequence[RunRecord], changed: Mapping[str, str]
) -> dict[str, RunRecord]:
    """The stages by their keys, each with its newest recorded run: of the store in use, else of the project's own.

    A pipeline that ran before the servers were there is recorded in mlflow.db. No store is no obstacle: dvc.lock proves
    the chain without it.
    """
    found = {stage.key: stage for stage in stages}
    if settings.tracking.mode == "off":
        return found
    for uri in dict.fromkeys([tracking_uri(root), _local_uri(root)]):
        missing = [stage for stage in found.values() if not stage.run_id]
        if not missing or not _has_store(uri):
            continue
        try:
            store = _Store(uri, settings)
            for stage in missing:
                run = store.run_of(root, stage, changed)
                if run is not None:
                    elsewhere = "" if uri == tracking_uri(root) else without_password(uri)
                    found[stage.key] = replace(run, inputs=stage.inputs, outputs=stage.outputs, store=elsewhere)
        except UserError as error:
            logger.warning("When and by which runs is not told: %s", error)
    return found


def tracking_uri(root: Path) -> str:
    """Where runs are recorded: MLFLOW_TRACKING_URI if set, else `mlflow.db` in the project's root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _local_uri(root)


def _local_uri(root: Path) -> str:
    return f"sqlite:///{(root / 'mlflow.db').resolve().as_posix()}"


def current_flow_run() -> str:
    """The id of the orchestrator's run that this process belongs to, "" if none."""
    return os.environ.get(FLOW_RUN_VARIABLE, "")


def current_actor() -> str:
    """Who acts: what the orchestrator says, else the user on this machine."""
    named = os.environ.get(ACTOR_VARIABLE)
    if named:
        return named
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):  # a container's user without a name
        return f"uid {os.getuid()}@{socket.gethostname()}"


def check_store(root: Path) -> str:
    """The tracking URI (without its password), if the store answers within seconds; a SQLite file is not created.

    Raises:
        UserError: it does not answer.
    """
    uri = tracking_uri(root)
    database = _sqlite_file(uri)
    if database is None or database.is_file():
        connect(uri)
    elif not os.access(database.parent, os.W_OK):
        raise UserError(f"{database} cannot be created; make its folder writable or set MLFLOW_TRACKING_URI.")
    return without_password(uri)


class _MlflowRun(StageRun):
    """A run in the store. Only the constructor may fail for want of a store; later trouble is a warning."""

    def __init__(self, layout: Layout, stage: str, inputs: Sequence[Artefact], params: Mapping[str, Any]) -> None:
        self._root, self._stage = layout.root, stage
        self._outputs: dict[str, Path] = {}
        self._pending: list[tuple[str, float, int, int]] = []  # name, value, milliseconds, step
        self._flushed = time.monotonic()
        self._uri = tracking_uri(layout.root)
        self._client = connect(self._uri)
        plain = json.loads(json.dumps(dict(params), default=str))
        revision, dirty = git_state(layout.root)
        with store_errors(self._uri):
            experiment = _experiment(self._client, self._uri, layout)
            checkout = f"{socket.gethostname()}:{layout.root.resolve()}"
            if Path("/proc/self").is_dir():  # elsewhere nothing cheap tells whether a process lives
                _end_abandoned(self._client, experiment, stage, checkout)
            run = self._client.create_run(
                experiment,
                run_name=stage,
                tags={
                    STAGE: stage,
                    CATEGORY: layout.category,
                    INPUTS: _fit(inputs),
                    PARAMS_DIGEST: digest_json({"params": json.dumps(plain, sort_keys=True)}),
                    REVISION: revision,
                    DIRTY: str(dirty).lower(),
                    FLOW_RUN: current_flow_run(),
                    ACTOR: current_actor(),
                    CHECKOUT: checkout,
                    PID: str(os.getpid()),
                    "mlflow.source.name": f"flawsmith {stage}",
                    "mlflow.source.type": "LOCAL",
                },
            )
            self.run_id = run.info.run_id
            self._log_params(_flatten(plain))

    def _log_params(self, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        entries = [Param(_clean(key), value[:MAX_PARAM]) for key, value in params.items()]
        for start in range(0, len(entries), MAX_PARAMS_A_BATCH):
            self._client.log_batch(self.run_id, params=entries[start : start + MAX_PARAMS_A_BATCH])

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        now = int(time.time() * 1000)
        self._pending += [(_clean(name), float(value), now, step or 0) for name, value in metrics.items()]
        if len(self._pending) >= FLUSH_METRICS or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        """Send what is pending; what could not be sent stays pending and goes with the next batch."""
        from mlflow.entities import Metric

        self._flushed = time.monotonic()
        while self._pending:
            batch = self._pending[:MAX_METRICS_A_BATCH]
            with self._best_effort("metrics") as sent:
                self._client.log_batch(self.run_id, metrics=[Metric(*entry) for entry in batch])
                sent.append(True)
            if not sent:
                return
            del self._pending[: len(batch)]

    def set_tag(self, name: str, value: str) -> None:
        with self._best_effort(name):
            self._client.set_tag(self.run_id, f"flawsmith.{name}", value[:MAX_TAG])

    def log_artifact(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist, so it cannot be logged as an artifact.")
        with self._best_effort(path.name):
            if path.is_dir():
                self._client.log_artifacts(self.run_id, str(path), artifact_path=path.name)
            else:
                self._client.log_artifact(self.run_id, str(path))

    def set_outputs(self, outputs: Mapping[str, Path]) -> None:
        self._outputs.update(outputs)

    def describe_outputs(self) -> str:
        """The outputs as a tag. What lies directly inside an output folder counts too: a stage may read only that."""
        written = [_artefact(self._root, name, path) for name, path in self._outputs.items()]
        inside = (
            (f"{name}/{part.name}", part)
            for name, path in self._outputs.items()
            if path.is_dir()
            for part in sorted(path.iterdir())
            if not part.name.startswith(".")
        )
        return _fit([*written, *(_artefact(self._root, name, part) for name, part in islice(inside, MAX_PARTS))])

    def end(self, status: str, tags: Mapping[str, str]) -> None:
        self._flush()
        if self._pending:
            logger.warning("%d metrics of stage %s could not be recorded.", len(self._pending), self._stage)
        with self._best_effort("the end of the run"):
            for key, value in tags.items():
                self._client.set_tag(self.run_id, key, value[:MAX_TAG])
            self._client.set_terminated(self.run_id, status)

    @contextmanager
    def _best_effort(self, what: str) -> Iterator[list[bool]]:
        """Warn instead of failing: hours of training must not be lost because a server went away."""
        from mlflow.exceptions import MlflowException

        try:
            yield []
        except (MlflowException, OSError) as error:
            logger.warning("%s of stage %s not recorded: %s", what, self._stage, _reason(error, self._uri))


class _Store:
    """The finished stage runs of one project, asked for by content."""

    def __init__(self, uri: str, settings: Settings) -> None:
        self._uri = uri
        self._client = connect(self._uri)
        prefix = settings.tracking.experiment_prefix
        with store_errors(self._uri):
            experiments = self._client.search_experiments(filter_string=f"name LIKE '{_pattern(prefix)}/%'")
        self._experiments = [item.experiment_id for item in experiments if item.name.startswith(f"{prefix}/")]

    def find_digest(self, prefix: str) -> Artefact:
        """The one recorded artefact whose digest begins with `prefix`."""
        found: dict[str, Artefact] = {}
        for tag in (INPUTS, OUTPUTS):  # an output's own name and path win over those of whoever read it
            for run in self._search(tag, f'"digest": "{prefix}'):
                for artefact in run.inputs if tag == INPUTS else run.outputs:
                    if artefact.digest.startswith(prefix):
                        found[artefact.digest] = artefact
        if not found:
            raise UserError(
                f"No recorded run read or wrote content with digest {prefix}; give the file or folder itself, or check "
                "MLFLOW_TRACKING_URI."
            )
        if len(found) > 1:
            raise UserError(f"Digest {prefix} is ambiguous; give more digits of one of {', '.join(sorted(found))}.")
        return next(iter(found.values()))

    def writers_of(self, artefact: Artefact) -> list[RunRecord]:
        """The runs that wrote this content, newest first."""
        return self._search(OUTPUTS, f'"digest": "{artefact.digest}"')

    def run_of(self, root: Path, stage: RunRecord, changed: Mapping[str, str]) -> RunRecord | None:
        """The newest run of this stage that wrote one of its outputs, as they lie in the project."""
        paths = [root / item.path for item in stage.outputs if item.path not in changed]
        for path in sorted(
            (path for path in paths if path.exists()), key=lambda path: (path.is_dir(), -path.stat().st_size)
        ):
            for run in self.writers_of(_artefact(root, path.name, path)):
                if (run.stage, run.category) == (stage.stage, stage.category):
                    return run
        return None

    def explain(self, artefact: Artefact) -> str:
        """Why nobody is known to have written this content."""
        earlier = (
            self._search(OUTPUTS, f'"path": {json.dumps(artefact.path, ensure_ascii=False)}') if artefact.path else []
        )
        if not earlier:
            return "Neither dvc.lock names it nor a recorded run wrote it: it was made by hand, or recorded elsewhere."
        newest = earlier[0]
        digest = next((item.digest for item in newest.outputs if item.path == artefact.path), "")
        return (
            f"No recorded run wrote this content; run {newest.run_id[:SHOWN]} wrote this path with digest "
            f"{digest[:SHOWN]}, so it was changed or made again since."
        )

    def _search(self, tag: str, text: str) -> list[RunRecord]:
        if not self._experiments:
            return []
        runs: list[RunRecord] = []
        token: str | None = None
        with store_errors(self._uri):
            while True:
                page = self._client.search_runs(
                    self._experiments,
                    filter_string=f"tags.`{tag}` LIKE '%{_pattern(text)}%' AND attributes.status = 'FINISHED'",
                    order_by=["attributes.start_time DESC"],
                    page_token=token,
                )
                runs += [_record(run) for run in page]
                token = page.token
                if not token:
                    # LIKE treats `_` and, on SQLite, case loosely; the caller's exact text decides
                    return [run for run in runs if text in _encode(run.inputs if tag == INPUTS else run.outputs)]


def _record(run: Any) -> RunRecord:
    tags = run.data.tags
    return RunRecord(
        run_id=run.info.run_id,
        stage=tags.get(STAGE, "?"),
        category=tags.get(CATEGORY, "?"),
        started=datetime.fromtimestamp(run.info.start_time / 1000, UTC),
        revision=tags.get(REVISION, "unknown"),
        dirty=tags.get(DIRTY) == "true",
        params_digest=tags.get(PARAMS_DIGEST, "unknown"),
        inputs=_decode(tags.get(INPUTS, "[]")),
        outputs=_decode(tags.get(OUTPUTS, "[]")),
        flow_run=tags.get(FLOW_RUN, ""),
    )


def _artefact(root: Path, name: str, path: Path) -> Artefact:
    """Digest a path; outside the project's root its name stands for it, since absolute paths mean nothing elsewhere."""
    return Artefact(name, _shown(root, path) or path.name, digest_path(path))


def _shown(root: Path, path: Path) -> str:
    """The path relative to the project's root, "" if it lies outside."""
    absolute, base = path.resolve(), root.resolve()
    return absolute.relative_to(base).as_posix() if absolute.is_relative_to(base) else ""


def _encode(artefacts: Sequence[Artefact]) -> str:
    # no \\u escapes: a backslash in a LIKE pattern means something else on every database
    return json.dumps([asdict(artefact) for artefact in artefacts], ensure_ascii=False)


def _fit(artefacts: Sequence[Artefact]) -> str:
    """`_encode` of as many as a tag can hold, the first ones: one that is cut could not be read again."""
    kept = list(artefacts)
    while len(text := _encode(kept)) > MAX_TAG:
        kept.pop()
    if len(kept) < len(artefacts):
        logger.warning("%d of %d artefacts of a run are too many for its record; lineage does not know them.",
                       len(artefacts) - len(kept), len(artefacts))  # fmt: skip
    return text


def _decode(text: str) -> tuple[Artefact, ...]:
    try:
        found = json.loads(text)
    except ValueError:  # cut by an earlier version of this module, or damaged: what is whole of it still counts
        whole = text[: text.rfind("}") + 1]
        try:
            found = json.loads(f"{whole}]")
        except ValueError:
            found = []
    return tuple(Artefact(**item) for item in found)


def _flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _clean(name: str) -> str:
    """A name MLflow accepts: letters, digits and `_ - . : /` and spaces."""
    return re.sub(r"[^\w.\- :/]", "_", name)[:250]


def _pattern(text: str) -> str:
    """Text for a LIKE pattern: MLflow's filters cannot quote a quote, so `_` (any character) stands in for it."""
    return text.replace("'", "_")


def git_state(root: Path) -> tuple[str, bool]:
    """The checked-out revision, and whether tracked files differ from it.

    dvc.lock and artifacts/ are left out: `dvc repro` itself rewrites them between stages.
    """
    status = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)dvc.lock", ":(exclude)artifacts")
    try:
        revision, changes = (
            subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=20, check=True).stdout
            for arguments in (("rev-parse", "HEAD"), status)
        )
    except (OSError, subprocess.SubprocessError):  # no git, no repository, or no commit yet
        return "unknown", False
    return revision.strip(), bool(changes.strip())


def has_revision(root: Path, revision: str) -> bool:
    """Whether the repository at `root` holds this commit."""
    try:
        subprocess.run(
            ["git", "cat-file", "-e", f"{revision}^{{commit}}"], cwd=root, capture_output=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def connect(uri: str) -> Any:
    """An MLflow client whose store has answered once, within seconds.

    MLflow itself would retry for minutes, so the first request goes without retries, and a database server's port is
    tried before SQLAlchemy is.
    """
    for key, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # what is lost to a short outage is sent again with the next batch
    }.items():
        os.environ.setdefault(key, value)
    _check_database_port(uri)
    try:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
    except ImportError as error:
        raise UserError(
            f"MLflow cannot be imported ({error}); `pip install 'flawsmith[pipeline]'`, or set `tracking.mode: off`."
        ) from error

    database = _sqlite_file(uri)
    try:
        if database is not None:
            database.parent.mkdir(parents=True, exist_ok=True)
        with _environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT=str(int(PROBE_SECONDS))):
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_experiments(max_results=1)
    except (MlflowException, OSError, ImportError) as error:
        raise _unreachable(uri, _reason(error, uri)) from error
    return client


def _check_database_port(uri: str) -> None:
    parts = urlsplit(uri)
    port = DATABASE_PORTS.get(parts.scheme.partition("+")[0])
    if port is None or not parts.hostname:
        return
    try:
        socket.create_connection((parts.hostname, parts.port or port), timeout=PROBE_SECONDS).close()
    except OSError as error:
        raise _unreachable(uri, str(error)) from error


def _end_abandoned(client: Any, experiment: str, stage: str, checkout: str) -> None:
    """Mark as killed the runs of `stage` in this checkout whose process has died without saying so."""
    mine = f"tags.`{STAGE}` = '{stage}' AND tags.`{CHECKOUT}` = '{_pattern(checkout)}'"
    for run in client.search_runs([experiment], filter_string=f"{mine} AND attributes.status = 'RUNNING'"):
        if not Path(f"/proc/{run.data.tags.get(PID, '')}").is_dir():
            client.set_tag(run.info.run_id, ERROR, "the process died without saying why")
            client.set_terminated(run.info.run_id, "KILLED")


def _experiment(client: Any, uri: str, layout: Layout) -> str:
    from mlflow.exceptions import MlflowException

    name = f"{layout.settings.tracking.experiment_prefix}/{layout.category}"
    # a server chooses its own artifact store; the default database keeps them beside itself
    local = not os.environ.get("MLFLOW_TRACKING_URI") and _sqlite_file(uri) is not None
    place = (layout.root / "mlruns" / layout.category).resolve().as_uri() if local else None
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another stage was quicker
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise UserError(
            f"Experiment `{name}` was deleted in {without_password(uri)}; "
            f"`mlflow experiments restore -x {found.experiment_id}`, or change `tracking.experiment_prefix`."
        )
    return str(found.experiment_id)


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise _unreachable(uri, _reason(error, uri)) from error


def _unreachable(uri: str, reason: str) -> UserError:
    return UserError(
        f"The MLflow tracking store {without_password(uri)} cannot be used ({reason}); start the server, correct "
        "MLFLOW_TRACKING_URI, or set `tracking.mode: off` in params.yaml."
    )


def _reason(error: BaseException, uri: str) -> str:
    """The innermost cause in one line; MLflow wraps it in several, some of which repeat the URI with its password."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text.replace(uri, without_password(uri))[:300]


def without_password(uri: str) -> str:
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", uri)


def _has_store(uri: str) -> bool:
    """Whether there can be records: a SQLite file that was never made holds none."""
    database = _sqlite_file(uri)
    return database is None or database.is_file()


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
