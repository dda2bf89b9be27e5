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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import Task, flow
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.concurrency.asyncio import AcquireConcurrencySlotTimeoutError, ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from prefect.tasks import exponential_backoff

from flawsmith import dvc
from flawsmith.check import refuse
from flawsmith.config import Settings, load_settings
from flawsmith.dvc import GateFailed, InfrastructureError, StageOutcome
from flawsmith.errors import FlawsmithError
from flows import artifacts
from flows.run import ask, environment, failed, say

COMPUTING = frozenset({"ddpm-train", "synthesize", "distill", "evaluate", "export"})
LEASE_SECONDS = 120  # how long a slot stays taken after its holder has died without a word
BUSY_SECONDS = 10.0  # a first run does not queue behind one that is at work on its category


@dataclass
class RunContext:
    """One run: what it works on, and what has happened so far, for its page."""

    category: str
    root: Path
    settings: Settings
    task_options: dict[str, Any]
    stages: list[StageOutcome] = field(default_factory=list)
    promotion: dict[str, Any] = field(default_factory=dict)

    def results(self, stage: str) -> Path:
        """The folder of a stage's outputs."""
        return self.root / "artifacts" / self.category / stage

    def key(self, name: str) -> str:
        """The key of one of the run's artifacts."""
        return f"{artifacts.slug(self.category)}-{artifacts.slug(name)}"

    def step(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run one step as a Prefect task."""
        return Task(function, name=name, task_run_name=name, **self.task_options)(*arguments)


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
    if attempt > max_attempts:
        return Failed(
            name="GaveUp",
            message=f"`{category}` crashed {max_attempts} times in a row and is not started again; look at those "
            "runs, then start it by hand.",
        )
    task_options = {
        "cache_policy": NO_CACHE,
        "persist_result": False,
        "retries": retries,
        "retry_delay_seconds": exponential_backoff(retry_seconds),
        "retry_condition_fn": lambda _task, _run, state: isinstance(state.data, InfrastructureError),
    }
    try:
        root = Path.cwd()
        run = RunContext(category, root, load_settings(root / "params.yaml"), task_options)
        # first: a category that does not exist has no limit either, and that would be the wrong complaint
        targets = dvc.stages_of(root, run.settings, category)
        # a run that replaces a crashed one waits until the dead one's lease is over
        seconds = BUSY_SECONDS if attempt == 1 else LEASE_SECONDS + 60.0
        with _slot(f"category-{category}", seconds):
            get_run_logger().info("%s: attempt %d in %s on %s", category, attempt, root, socket.gethostname())
            try:
                _run(run, targets, (publish_branch or "").replace("{category}", category))
            finally:
                _try_to_show(_show, run)
    except GateFailed as error:
        _try_to_show(_show_gate, run, error.verdict)
        return Failed(name="QualityGateFailed", message=str(error))
    except UnavailableError as error:
        return Failed(name=error.name, message=str(error))
    except FlawsmithError as error:
        return failed(error)
    name, message = artifacts.ending(run.promotion)
    return (Failed if name == "Refused" else Completed)(name=name, message=message)


def _run(run: RunContext, targets: list[str], branch: str) -> None:
    """The steps, in order."""
    remote = run.step("sync data", _sync, run, targets)
    run.step("check", refuse, run.root / "params.yaml", run.category)
    for target in targets:
        run.stages.append(run.step(target, _stage, run, target))
    registered = run.step("register", _ask, run, "register")
    run.promotion = run.step("promote", _ask, run, "promote", "--version", str(registered["version"]))
    if remote:
        run.step("push", dvc.push, run.root, run.category, run.settings.data.root, targets, say)
    if branch:
        run.step("publish", _publish, run, branch)


class UnavailableError(FlawsmithError):
    """A slot cannot be had; `name` is the state's name."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


@contextmanager
def _slot(limit: str, seconds: float | None) -> Iterator[None]:
    """Hold one slot of a global concurrency limit.

    Raises:
        UnavailableError: there is no such limit, or no slot came free within `seconds` (None: however long it takes).
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
            category = limit.removeprefix("category-")
            message = f"`{category}` is being retrained by another run; this one is not needed."
            raise UnavailableError("CategoryBusy", message) from error
        except ConcurrencySlotAcquisitionError as error:
            if "must be created" not in str(error):
                raise InfrastructureError(f"Prefect's server gives no slot of `{limit}`: {error}.") from error
            message = f"There is no concurrency limit `{limit}`; make it with `python -m flows.setup`."
            raise UnavailableError("NotSetUp", message) from error
        yield


def _sync(run: RunContext, targets: list[str]) -> bool:
    """Bring data and known results; say whether there is a remote to send the new ones to."""
    remote = dvc.has_remote(run.root)
    if not remote:
        get_run_logger().info("No DVC remote is configured: data and results are those of this machine's cache.")
    dvc.pull(run.root, run.category, run.settings.data.root, targets, say, remote=remote)
    return remote


def _stage(run: RunContext, target: str) -> StageOutcome:
    """Let DVC bring one stage up to date; one that computes holds its GPU's slot meanwhile."""
    with ExitStack() as held:
        if target.partition("@")[0] in COMPUTING:
            held.enter_context(_slot(os.environ.get("FLAWSMITH_GPU") or "gpu-0", None))
        return dvc.reproduce(run.root, target, say, environment())


def _ask(run: RunContext, command: str, *options: str) -> dict[str, Any]:
    """Run `flawsmith register` or `promote`; a refusal is an answer (exit status 1 and JSON all the same)."""
    answer = ask(run.root, (0, 1), command, "--category", run.category, *options)
    get_run_logger().info("%s", json.dumps({key: value for key, value in answer.items() if key != "checks"}))
    return answer


def _publish(run: RunContext, branch: str) -> None:
    message = f"{run.category}: version {run.promotion['version']} {run.promotion['outcome']}"
    commit = dvc.publish(run.root, run.category, run.settings.data.root, branch, message)
    get_run_logger().info("branch %s: %s", branch, commit or "nothing new")


def _try_to_show(show: Callable[..., None], *arguments: Any) -> None:
    """Whatever befalls a run's page, the run ends as it would have: the page must not hide why."""
    try:
        show(*arguments)
    except Exception as error:
        get_run_logger().warning("The page of this run is not complete (%s: %s).", type(error).__name__, error)


def _show(run: RunContext) -> None:
    """Put on the run's page what there is so far."""
    create_table_artifact(artifacts.stage_rows(run.stages), run.key("stages"), f"{run.category}: what DVC did")
    done = {item.target.partition("@")[0] for item in run.stages}
    metrics: list[dict[str, Any]] = []
    if "evaluate" in done:
        metrics = artifacts.metric_rows(run.results("evaluate") / "summary")
        create_table_artifact(metrics, run.key("metrics"), f"{run.category}: scores on the test set")
        for picture in sorted((run.results("evaluate") / "figures").glob("*.png")):
            _show_picture(run, f"evaluate-{picture.stem}", picture)
    if "synthesize" in done:
        _show_picture(run, "triplets", run.results("synthesize") / "sheet.png")
    if run.promotion:
        outcome = artifacts.ENDINGS[artifacts.ending(run.promotion)[0]]
        told = f"{run.category}: {outcome}"
        create_table_artifact(artifacts.check_rows(run.promotion), run.key("promotion"), told)
        row = {
            "category": run.category,
            "outcome": outcome,
            "version": run.promotion["version"],
            "reason": run.promotion.get("reason"),
            "image_auroc": next((row.get("detector") for row in metrics if row["metric"] == "image_auroc"), None),
            "lock": dvc.lock_digest(run.root),
        }
        create_table_artifact([row], run.key(artifacts.OUTCOME), told)


def _show_gate(run: RunContext, verdict: dict[str, Any]) -> None:
    """Put on the run's page why the quality gate stopped it."""
    results = run.results("validate")
    experiment = f"{run.settings.tracking.experiment_prefix}/{run.category}"
    worst = results / "worst.png"
    text = artifacts.gate_report(
        run.category,
        verdict,
        f"{socket.gethostname()}:{results / 'docs' / 'index.html'}",
        artifacts.mlflow_run(experiment, "validate", str(flow_run.id)),
        artifacts.data_uri(worst) if worst.is_file() else None,
    )
    create_markdown_artifact(text, run.key("quality-gate"), f"{run.category}: why the quality gate said no")
    _show_picture(run, "worst-triplets", worst)


def _show_picture(run: RunContext, name: str, path: Path) -> None:
    if path.is_file():
        create_image_artifact(artifacts.data_uri(path), run.key(name), f"{run.category}: {name}")
