"""Stage runs in MLflow: recorded while a stage runs, and found again by what it left.

    with stage_run(layout, "distill", params) as run:
        run.log_metrics({"loss": loss}, step)
        run.set_output(layout.stage("distill") / "detector.safetensors")

A run bears the digest of one key output as DVC hashes it, so dvc.lock leads to the run without any run id inside a file
that DVC versions (`lineage`). Runs go to the experiment `<experiment_prefix>/<category>` of MLFLOW_TRACKING_URI, or of
`mlflow.db` in the project's root. `tracking.mode: off` makes everything here a no-op that does not import MLflow.
"""

import getpass
import json
import logging
import os
import re
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flawsmith import dvc
from flawsmith.config import Settings
from flawsmith.connection import (
    connect,
    local_uri,
    short_reason,
    sqlite_file,
    store_errors,
    tracking_uri,
    without_password,
)
from flawsmith.errors import UserError
from flawsmith.git import git_state
from flawsmith.layout import Layout
from flawsmith.processes import is_main_process
from flawsmith.sequences import batched
from flawsmith.stage_inputs import check_inputs, look_at_inputs

logger = logging.getLogger(__name__)

STAGE, CATEGORY, OUTPUT = "flawsmith.stage", "flawsmith.category", "flawsmith.output"
DIRTY, ERROR, FLOW_RUN, ACTOR = "flawsmith.git_dirty", "flawsmith.error", "flawsmith.flow_run", "flawsmith.actor"
CHECKOUT, PID = "flawsmith.checkout", "flawsmith.pid"
REVISION = "mlflow.source.git.commit"  # MLflow's own key: its UI shows it as the run's version
# set by an orchestrator for the stages it starts: the id of its run, and in words who acts
FLOW_RUN_VARIABLE, ACTOR_VARIABLE = "FLAWSMITH_FLOW_RUN", "FLAWSMITH_ACTOR"

FLUSH_SECONDS = 10.0  # a long stage can be watched while it runs
MAX_TAG, MAX_PARAM, MAX_PARAMS_A_BATCH, MAX_METRICS_A_BATCH = 8000, 6000, 100, 1000  # MLflow's limits


class StageRun:
    """What a stage says about itself while it runs; this class records nothing, as `tracking.mode: off` wants it."""

    run_id = ""  # in the store; "" where nothing is recorded

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record values, of a step where there is one. Cheap: values are sent every 10 seconds."""

    def set_tag(self, name: str, value: str) -> None:
        """Say in a word what is true of this run on this machine, and no part of what decides its result."""

    def log_artifact(self, path: Path) -> None:
        """Copy a figure, report or folder into the run."""

    def set_output(self, path: Path) -> None:
        """Name the file or folder by whose content this run is found again; it is hashed when the stage has ended."""


@contextmanager
def stage_run(layout: Layout, stage: str, params: Mapping[str, Any]) -> Iterator[StageRun]:
    """Record one run of `stage` on the layout's category.

    Args:
        layout: the category's paths and settings.
        stage: the stage's name, as in dvc.yaml.
        params: what decides the result besides the inputs; nested mappings become dotted names.

    Yields:
        The run to log to. If the block raises, the run is marked FAILED (KILLED on Ctrl-C) with the message. A store
        that goes away while the stage runs costs a warning and the missing records, never the stage's work.

    Raises:
        UserError: the store cannot be reached, or DVC cannot see all that the stage reads.
        FlawsmithError: when the block has ended: what the stage depends on was changed meanwhile.
    """
    if not is_main_process():
        yield StageRun()
        return
    before = look_at_inputs(layout, stage)
    if layout.settings.tracking.mode == "off":
        yield StageRun()
        check_inputs(layout, stage, before)
        return
    run = _MlflowRun(layout, stage, params)
    try:
        yield run
        check_inputs(layout, stage, before)
        tags = {OUTPUT: dvc.content_digest(run.output)} if run.output else {}
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        run.end(status, {ERROR: f"{type(error).__name__}: {error}"})
        raise
    run.end("FINISHED", tags)


class _MlflowRun(StageRun):
    """A run in the store. Only the constructor may fail for want of a store; later trouble is a warning."""

    def __init__(self, layout: Layout, stage: str, params: Mapping[str, Any]) -> None:
        self._stage, self._uri = stage, tracking_uri(layout.root)
        self._pending: list[Any] = []
        self._flushed = time.monotonic()
        self._client = connect(self._uri)
        self.output: Path | None = None
        revision, dirty = git_state(layout.root)
        checkout = f"{socket.gethostname()}:{layout.root.resolve()}"
        tags = {
            STAGE: stage,
            CATEGORY: layout.category,
            REVISION: revision,
            DIRTY: str(dirty).lower(),
            FLOW_RUN: current_flow_run(),
            ACTOR: current_actor(),
            CHECKOUT: checkout,
            PID: str(os.getpid()),
            "mlflow.source.name": f"flawsmith {stage}",
            "mlflow.source.type": "LOCAL",
        }
        from mlflow.entities import Param

        entries = [Param(_clean(key), value[:MAX_PARAM]) for key, value in _flatten(params).items()]
        with store_errors(self._uri):
            experiment = _experiment(self._client, self._uri, layout)
            _end_abandoned(self._client, experiment, stage, checkout)
            self.run_id = self._client.create_run(experiment, run_name=stage, tags=tags).info.run_id
            for group in batched(entries, MAX_PARAMS_A_BATCH):
                self._client.log_batch(self.run_id, params=group)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._pending += [Metric(_clean(name), float(value), now, step or 0) for name, value in metrics.items()]
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        """Send what is pending; what could not be sent stays pending and goes with the next batch."""
        self._flushed = time.monotonic()
        while self._pending:
            before = len(self._pending)
            with self._best_effort("metrics"):
                self._client.log_batch(self.run_id, metrics=self._pending[:MAX_METRICS_A_BATCH])
                del self._pending[:MAX_METRICS_A_BATCH]
            if len(self._pending) == before:
                return

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

    def set_output(self, path: Path) -> None:
        self.output = path

    def end(self, status: str, tags: Mapping[str, str]) -> None:
        """Send what is pending and close the run."""
        self._flush()
        if self._pending:
            logger.warning("%d metrics of stage %s could not be recorded.", len(self._pending), self._stage)
        with self._best_effort("the end of the run"):
            for key, value in tags.items():
                self._client.set_tag(self.run_id, key, value[:MAX_TAG])
            self._client.set_terminated(self.run_id, status)

    @contextmanager
    def _best_effort(self, what: str) -> Iterator[None]:
        """Warn instead of failing: hours of training must not be lost because a server went away."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, OSError) as error:
            logger.warning("%s of stage %s not recorded: %s", what, self._stage, short_reason(error, self._uri))


@dataclass(frozen=True)
class Run:
    """A finished run: when it started (UTC), at which git revision, and which flow run started it ("" if none)."""

    run_id: str
    started: datetime
    revision: str
    dirty: bool
    flow_run: str = ""
    store: str = ""  # where it is recorded, if not in the store that is in use


class RunFinder:
    """The finished runs of a project, found by the content that they left.

    It looks into the store in use and then into the project's own: a pipeline that ran before there was a server is
    recorded in mlflow.db. A store out of reach costs a warning.
    """

    def __init__(self, root: Path, settings: Settings) -> None:
        self._prefix = settings.tracking.experiment_prefix
        self._clients: dict[str, Any] = {}  # by what is told of the store
        for uri in dict.fromkeys((tracking_uri(root), local_uri(root))):
            database = sqlite_file(uri)
            if settings.tracking.mode == "off" or (database and not database.is_file()):
                continue
            try:
                self._clients["" if uri == tracking_uri(root) else without_password(uri)] = connect(uri)
            except UserError as error:
                logger.warning("When and by which runs is not told: %s", error)

    def newest(self, category: str, stage: str, digests: Collection[str]) -> Run | None:
        """The newest run of a category's stage whose output has one of these digests."""
        return self._search(category, f"tags.`{STAGE}` = '{stage}'", digests)

    def newest_of_any(self, digest: str) -> Run | None:
        """The newest run of any category and stage whose output has this digest."""
        return self._search("", f"tags.`{OUTPUT}` = '{digest}'", [digest])

    def _search(self, category: str, condition: str, digests: Collection[str]) -> Run | None:
        from mlflow.exceptions import MlflowException

        for store, client in self._clients.items():
            try:
                if category:
                    experiments = [client.get_experiment_by_name(f"{self._prefix}/{category}")]
                else:
                    experiments = client.search_experiments(filter_string=f"name LIKE '{self._prefix}/%'")
                places = [item.experiment_id for item in experiments if item]
                token: str | None = ""
                while places and token is not None:
                    page = client.search_runs(
                        places,
                        f"{condition} AND attributes.status = 'FINISHED'",
                        order_by=["start_time DESC"],
                        page_token=token or None,
                    )
                    for run in page:
                        if run.data.tags.get(OUTPUT) in digests:
                            return _record(run, store)
                    token = page.token or None
            except (MlflowException, OSError) as error:
                logger.warning("When and by which runs is not told: %s", error)
        return None


def _record(run: Any, store: str) -> Run:
    tags = run.data.tags
    return Run(
        run.info.run_id,
        datetime.fromtimestamp(run.info.start_time / 1000, UTC),
        tags.get(REVISION, "unknown"),
        tags.get(DIRTY) == "true",
        tags.get(FLOW_RUN, ""),
        store,
    )


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


def _experiment(client: Any, uri: str, layout: Layout) -> str:
    """The id of the category's experiment, made if there is none."""
    from mlflow.exceptions import MlflowException

    name = f"{layout.settings.tracking.experiment_prefix}/{layout.category}"
    # a server chooses its own artifact store; the default database keeps them beside itself
    local = not os.environ.get("MLFLOW_TRACKING_URI")
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


def _end_abandoned(client: Any, experiment: str, stage: str, checkout: str) -> None:
    """Mark as killed the runs of `stage` in this checkout whose process has died without saying so."""
    if not Path("/proc/self").is_dir():  # elsewhere nothing cheap tells whether a process lives
        return
    running = f"tags.`{STAGE}` = '{stage}' AND attributes.status = 'RUNNING'"
    for run in client.search_runs([experiment], filter_string=running):
        tags = run.data.tags
        if tags.get(CHECKOUT) == checkout and not Path(f"/proc/{tags.get(PID, '')}").is_dir():
            client.set_tag(run.info.run_id, ERROR, "the process died without saying why")
            client.set_terminated(run.info.run_id, "KILLED")


def _flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _clean(name: str) -> str:
    """A name MLflow accepts: letters, digits and `_ - . : /` and spaces."""
    return re.sub(r"[^\w.\- :/]", "_", name)[:250]
