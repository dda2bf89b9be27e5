"""Retrain one category: data in and checked, every DVC stage in order, register, compare, promote or keep, results out.

    prefect deployment run retrain/retrain -p category=brushed_metal

DVC decides what runs again and Prefect where and when, so Prefect's caching is off. The flow works in the current
folder, which is the worker's checkout (prefect.yaml).

How a run ends: `Completed` (promoted), `Kept` (the champion stays; a normal end), `Unchanged` (the model is the
champion already), `Refused` (no champion, or a proof is missing), `QualityGateFailed` (the triplets are unfit to train
on), `BadInput`, `InfrastructureFailed`, `CategoryBusy`, `NotSetUp`, `GaveUp` (crashed too often), or `Failed`.
"""

import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import Task, flow
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.concurrency.asyncio import AcquireConcurrencySlotTimeoutError, ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from prefect.tasks import exponential_backoff

from flawsmith import dvc
from flawsmith.check import refuse
from flawsmith.dvc import GateFailed, InfrastructureError, StageOutcome
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.processes import stream
from flawsmith.settings import Settings, load_settings
from flows.artifacts import (
    ENDINGS,
    check_rows,
    data_uri,
    ending,
    gate_report,
    metric_rows,
    mlflow_run,
    slug,
    stage_rows,
)

COMPUTING = frozenset({"ddpm-train", "synthesize", "distill", "evaluate", "export"})
LEASE_SECONDS = 120  # how long a slot stays taken after its holder has died without a word
BUSY_SECONDS = 10.0  # a first run does not queue behind one that is at work on its category
OUTCOME = "outcome"  # key of the artifact that `nightly` reads


@dataclass
class Trail:
    """What has happened so far in a run, for its page."""

    category: str
    root: Path
    settings: Settings
    remote: bool = False
    stages: list[StageOutcome] = field(default_factory=list)
    registered: dict[str, Any] = field(default_factory=dict)
    promotion: dict[str, Any] = field(default_factory=dict)

    def artifacts(self, stage: str) -> Path:
        return self.root / "artifacts" / self.category / stage

    def key(self, name: str) -> str:
        return f"{slug(self.category)}-{name}"


@flow(name="retrain", persist_result=False)
def retrain(
    category: str,
    attempt: int = 1,
    max_attempts: int = 3,
    retries: int = 2,
    retry_seconds: float = 30.0,
    publish_branch: str | None = None,
) -> State[Any]:
    """Retrain one category and promote its model if that is the better one.

    Args:
        category: one of `categories` in params.yaml.
        attempt: which start this is; the automation that starts a crashed run again counts it up.
        max_attempts: a run started again more often than this gives up.
        retries: how often a step is repeated after trouble with the machine, the network or a server.
        retry_seconds: pause before the first repetition; each later one doubles it.
        publish_branch: git branch that gets dvc.lock and the metrics, e.g. `flawsmith/{category}`; none if null.
    """
    log = get_run_logger()
    if attempt > max_attempts:
        return Failed(
            name="GaveUp",
            message=f"`{category}` crashed {max_attempts} times in a row and is not started again; look at those "
            "runs, then start it by hand.",
        )
    try:
        root = Path.cwd()
        trail = Trail(category, root, load_settings(root / "params.yaml"))
        # first: a category that does not exist has no limit either, and that would be the wrong complaint
        targets = dvc.stages_of(root, trail.settings, category)
        with _category(category, attempt):
            log.info("%s: attempt %d in %s on %s", category, attempt, root, socket.gethostname())
            try:
                _run(trail, targets, Steps(retries, retry_seconds), publish_branch)
            finally:
                _try_to_show(_show, trail)
    except GateFailed as error:
        _try_to_show(_show_gate, trail, error.verdict)
        return Failed(name="QualityGateFailed", message=str(error))
    except UnavailableError as error:
        return Failed(name=error.name, message=str(error))
    except FlawsmithError as error:
        name = {UserError: "BadInput", InfrastructureError: "InfrastructureFailed"}.get(type(error), "Failed")
        return Failed(name=name, message=str(error))
    name, message = ending(trail.promotion)
    return (Failed if name == "Refused" else Completed)(name=name, message=message)


class UnavailableError(FlawsmithError):
    """The category's slot cannot be had; `name` is the state's name."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


@contextmanager
def _category(category: str, attempt: int) -> Iterator[None]:
    """Hold the category's one slot; a run that replaces a crashed one waits until the dead one's lease is over."""
    limit = f"category-{category}"
    seconds = BUSY_SECONDS if attempt == 1 else LEASE_SECONDS + 60.0
    with _slot(limit, seconds, f"`{category}` is being retrained by another run; this one is not needed."):
        yield


@contextmanager
def _slot(limit: str, seconds: float | None, busy: str = "") -> Iterator[None]:
    """Hold one slot of a global concurrency limit.

    Raises:
        UnavailableError: there is no such limit, or no slot came free in time.
    """
    holding = concurrency(
        limit,
        timeout_seconds=seconds,
        strict=True,
        lease_duration=LEASE_SECONDS,
        # A server that restarts must not cost hours of training. What a second holder could do is harmless: DVC locks
        # a checkout, and two stages on one GPU are slow, not wrong.
        raise_on_lease_renewal_failure=False,
    )
    with ExitStack() as held:
        try:
            held.enter_context(holding)
        except AcquireConcurrencySlotTimeoutError as error:
            raise UnavailableError("CategoryBusy", busy) from error
        except ConcurrencySlotAcquisitionError as error:
            if "must be created" not in str(error):
                raise InfrastructureError(f"Prefect's server gives no slot of `{limit}`: {error}.") from error
            raise UnavailableError(
                "NotSetUp", f"There is no concurrency limit `{limit}`; make it with `python -m flows.setup`."
            ) from error
        yield


class Steps:
    """The flow's steps as Prefect tasks: never cached, repeated after infrastructure trouble alone."""

    def __init__(self, retries: int, retry_seconds: float) -> None:
        self._options: dict[str, Any] = {
            "cache_policy": NO_CACHE,
            "persist_result": False,
            "retries": retries,
            "retry_delay_seconds": exponential_backoff(retry_seconds),
            "retry_condition_fn": _may_help,
        }

    def run(self, name: str, function: Any, *arguments: Any) -> Any:
        return Task(function, name=name, task_run_name=name, **self._options)(*arguments)


def _may_help(_task: Task[Any, Any], _run: TaskRun, state: State[Any]) -> bool:
    return isinstance(state.data, InfrastructureError)


def _run(trail: Trail, targets: list[str], steps: Steps, publish_branch: str | None) -> None:
    category = trail.category
    trail.remote = steps.run("sync data", _sync, trail, targets)
    steps.run("check", refuse, trail.root / "params.yaml", category)
    for target in targets:
        trail.stages.append(steps.run(target, _stage, trail, target))
    trail.registered = steps.run("register", _cli, trail, "register")
    trail.promotion = steps.run("promote", _cli, trail, "promote", "--version", str(trail.registered["version"]))
    if trail.remote or publish_branch:
        steps.run("publish", _publish, trail, targets, (publish_branch or "").replace("{category}", category))


def _environment() -> dict[str, str]:
    """What the stages are told, so that their MLflow runs name this one."""
    return {"FLAWSMITH_FLOW_RUN": str(flow_run.id), "FLAWSMITH_ACTOR": f"prefect flow run {flow_run.name}"}


def _say(line: str) -> None:
    if line.strip():
        get_run_logger().info("%s", line)


def _sync(trail: Trail, targets: list[str]) -> bool:
    """Bring data and known results; say whether there is a remote to send the new ones to."""
    remote = dvc.has_remote(trail.root)
    if not remote:
        get_run_logger().info("No DVC remote is configured: data and results are those of this machine's cache.")
    dvc.pull(trail.root, trail.category, trail.settings.data.root, targets, _say, remote=remote)
    return remote


def _stage(trail: Trail, target: str) -> StageOutcome:
    if target.partition("@")[0] in COMPUTING:
        gpu = os.environ.get("FLAWSMITH_GPU") or "gpu-0"
        with _slot(gpu, None):
            return dvc.reproduce(trail.root, target, _say, _environment())
    return dvc.reproduce(trail.root, target, _say, _environment())


def _cli(trail: Trail, command: str, *options: str) -> dict[str, Any]:
    """Run `flawsmith register` or `promote`; a refusal is an answer (exit status 1 and JSON all the same)."""
    words = ["flawsmith", command, "--category", trail.category, *options, "--json"]
    finished = stream(words, trail.root, _say, _environment(), keep_stdout=True)
    try:
        answer = json.loads(finished.stdout) if finished.status in (0, 1) else None
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise dvc.failure(f"`flawsmith {command}`", finished)
    get_run_logger().info("%s", json.dumps({key: value for key, value in answer.items() if key != "checks"}))
    return answer


def _publish(trail: Trail, targets: list[str], branch: str) -> None:
    if trail.remote:
        dvc.push(trail.root, trail.category, trail.settings.data.root, targets, _say)
    if branch:
        message = f"{trail.category}: version {trail.promotion['version']} {trail.promotion['outcome']}"
        commit = dvc.publish(trail.root, trail.category, trail.settings.data.root, branch, message)
        get_run_logger().info("branch %s: %s", branch, commit or "nothing new")


def _try_to_show(show: Callable[..., None], *arguments: Any) -> None:
    """Whatever befalls a run's page, the run ends as it would have: the page must not hide why."""
    try:
        show(*arguments)
    except Exception as error:
        get_run_logger().warning("The page of this run is not complete (%s: %s).", type(error).__name__, error)


def _show(trail: Trail) -> None:
    """Put on the run's page what there is so far."""
    create_table_artifact(stage_rows(trail.stages), trail.key("stages"), f"{trail.category}: what DVC did")
    done = {item.target.partition("@")[0] for item in trail.stages}
    rows: list[dict[str, Any]] = []
    if "evaluate" in done:
        rows = metric_rows(trail.artifacts("evaluate") / "summary")
        create_table_artifact(rows, trail.key("metrics"), f"{trail.category}: scores on the test set")
        for picture in sorted((trail.artifacts("evaluate") / "figures").glob("*.png")):
            _show_picture(trail, f"evaluate-{picture.stem}", picture)
    if "synthesize" in done:
        _show_picture(trail, "triplets", trail.artifacts("synthesize") / "sheet.png")
    if trail.promotion:
        outcome = ENDINGS[ending(trail.promotion)[0]]
        create_table_artifact(check_rows(trail.promotion), trail.key("promotion"), f"{trail.category}: {outcome}")
        create_table_artifact([_outcome(trail, rows)], trail.key(OUTCOME), f"{trail.category}: {outcome}")


def _outcome(trail: Trail, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    auroc = next((row.get("detector") for row in metrics if row["metric"] == "image_auroc"), None)
    known: Mapping[str, Any] = trail.promotion
    return {
        "category": trail.category,
        "outcome": ENDINGS[ending(known)[0]],
        "version": known["version"],
        "reason": known.get("reason"),
        "image_auroc": auroc,
        "lock": dvc.lock_digest(trail.root),
    }


def _show_gate(trail: Trail, verdict: dict[str, Any]) -> None:
    report = trail.artifacts("validate")
    experiment = f"{trail.settings.tracking.experiment_prefix}/{trail.category}"
    worst = report / "worst.png"
    text = gate_report(
        trail.category,
        verdict,
        f"{socket.gethostname()}:{report / 'docs' / 'index.html'}",
        mlflow_run(experiment, "validate", str(flow_run.id)),
        data_uri(worst) if worst.is_file() else None,
    )
    create_markdown_artifact(text, trail.key("quality-gate"), f"{trail.category}: why the quality gate said no")
    if worst.is_file():
        _show_picture(trail, "worst-triplets", worst)


def _show_picture(trail: Trail, name: str, path: Path) -> None:
    if path.is_file():
        create_image_artifact(data_uri(path), trail.key(slug(name)), f"{trail.category}: {name}")
