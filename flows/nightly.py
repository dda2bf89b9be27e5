"""The night: every category is retrained, side by side on as many machines as there are workers.

    python -m flows.nightly        # starts a night now, tells how it goes, and exits 1 if a category needs a person

One broken category does not stop the others. A sub-run that crashed is started once more. The night is `Completed` if
each category was promoted, kept its champion, is unchanged or was at work already; it is `Failed` if one was refused,
or its gate or its run failed.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL
from prefect.states import Completed, Failed

from flawsmith.config import load_settings
from flawsmith.errors import UserError
from flows.artifacts import ENDINGS, OUTCOME, nightly_report, slug
from flows.machine import command

RETRAIN, NIGHTLY = "retrain/retrain", "nightly/nightly"
POLL_SECONDS = 2.0
SERVER_ERROR = 500  # an HTTP status from here on may pass
TRIES = 2  # a crashed sub-run is started once more
GOOD = frozenset({"promoted", "kept", "unchanged", "skipped"})


@dataclass
class CategoryRun:
    """One category of the night, with the newest state of its sub-run."""

    category: str
    run: FlowRun | None = None
    tries: int = 0
    trouble: str = ""  # why there is no run, or no end

    @property
    def _state(self) -> State[Any] | None:
        return self.run.state if self.run else None

    @property
    def may_try_again(self) -> bool:
        """Whether the sub-run crashed and is to be started again."""
        return self._state is not None and self._state.is_crashed() and self.tries < TRIES

    @property
    def over(self) -> bool:
        """Whether nothing more happens to it this night."""
        ended = self._state is not None and self._state.is_final() and not self.may_try_again
        return ended or bool(self.trouble)

    @property
    def state(self) -> str:
        """The name of the sub-run's state, or what prevents one."""
        return self.trouble or ((self._state.name or "?") if self._state else "not started")

    @property
    def outcome(self) -> str:
        """In one word of ENDINGS, or `failed`."""
        return "failed" if self.trouble else ENDINGS.get(self.state, "failed")

    @property
    def good(self) -> bool:
        """Whether it needs no person."""
        return self.outcome in GOOD


@flow(name="nightly", persist_result=False)
def nightly(categories: list[str] | None = None, hours: float = 20.0) -> State[Any]:
    """Retrain every category through `retrain/retrain` and wait for all of them.

    Args:
        categories: default: `categories` of params.yaml.
        hours: what has not ended by then counts as broken (its run goes on), so that the next night can begin.
    """
    names = categories or list(load_settings(Path.cwd() / "params.yaml").categories)
    items = [CategoryRun(name) for name in dict.fromkeys(names)]
    until = time.monotonic() + hours * 3600
    with get_client(sync_client=True) as client:
        while not all(item.over for item in items):
            for item in (item for item in items if not item.over):
                before = item.state
                if time.monotonic() > until:
                    item.trouble = f"not over after {hours:g} hours"
                else:
                    _advance(client, item)
                if item.state != before:
                    get_run_logger().info("%s: %s", item.category, item.state)
            time.sleep(POLL_SECONDS)
        rows = [_row(client, item) for item in items]
    create_markdown_artifact(nightly_report(rows), "nightly", "the night, a line a category")
    return verdict(items)


def _advance(client: SyncPrefectClient, item: CategoryRun) -> None:
    """Start a category's run, start it again, or look how it is; a server that is away is asked again later."""
    try:
        if item.run is not None and not item.may_try_again:
            item.run = client.read_flow_run(item.run.id)
            return
        number = item.tries + 1
        # The name keeps the automation that restarts crashed runs away from these (automations.yaml). The key makes
        # one run of a request that is sent twice because the first answer got lost.
        item.run = _start(
            RETRAIN,
            parameters={"category": item.category},
            flow_run_name=f"nightly {item.category}{' again' if number > 1 else ''}",
            idempotency_key=f"{flow_run.id}-{item.category}-{number}",
        )
        item.tries = number
    except ObjectNotFound:
        item.trouble = f"there is no deployment {RETRAIN}" if item.run is None else "its run was deleted"
    except (httpx.TransportError, PrefectHTTPStatusError) as error:
        if isinstance(error, PrefectHTTPStatusError) and error.response.status_code < SERVER_ERROR:
            item.trouble = f"the server refused it: {error}"
        else:
            get_run_logger().warning("%s: the server did not answer (%s); asked again soon", item.category, error)


def _start(deployment: str, **options: Any) -> FlowRun:
    """Create a run and leave it to the workers."""
    started = run_deployment(deployment, timeout=0, **options)
    if not isinstance(started, FlowRun):  # it is a coroutine in asynchronous code alone
        raise TypeError("run_deployment must be called from synchronous code")
    return started


def _row(client: SyncPrefectClient, item: CategoryRun) -> dict[str, Any]:
    """A category's line of the night's report."""
    message = item.run.state.message if item.run and item.run.state and not item.trouble else ""
    told = item.state if item.outcome == "failed" else ""  # the others say it in their outcome
    row = {"category": item.category, "outcome": item.outcome, "why": ": ".join(filter(None, [told, message]))}
    if item.run is None:
        return row
    found = client.read_artifacts(
        artifact_filter=ArtifactFilter(
            flow_run_id=ArtifactFilterFlowRunId(any_=[item.run.id]),
            key=ArtifactFilterKey(any_=[f"{slug(item.category)}-{OUTCOME}"]),
        ),
        limit=1,
    )
    rows = json.loads(found[0].data) if found and isinstance(found[0].data, str) else []
    return {
        **row,
        "run": item.run.name,
        "link": f"{PREFECT_UI_URL.value()}/runs/flow-run/{item.run.id}",
        "image_auroc": rows[0].get("image_auroc") if rows else None,
    }


def verdict(items: Sequence[CategoryRun]) -> State[Any]:
    """Failed if a category needs a person; the message tells how each ended, those first."""
    broken = [item for item in items if not item.good]
    ended: dict[str, list[str]] = {}
    for item in [*broken, *(item for item in items if item.good)]:
        shown = f"{item.category} ({item.state})" if item.outcome == "failed" else item.category
        ended.setdefault(item.outcome, []).append(shown)
    told = "; ".join(f"{outcome}: {', '.join(names)}" for outcome, names in ended.items())
    if broken:
        return Failed(message=f"{len(broken)} of {len(items)} categories need a person. {told}.")
    return Completed(message=f"{told}.")


def main() -> None:
    """Start the deployment, print what changes, and exit with 1 unless it ends well.

    Raises:
        UserError: there is no server or no deployment.
    """
    if not PREFECT_API_URL.value():
        raise UserError("PREFECT_API_URL is not set; `make up` starts a server, .stack/env says where.")
    with get_client(sync_client=True) as client:
        try:
            night = _start(NIGHTLY, as_subflow=False)
        except ObjectNotFound as error:
            raise UserError(f"{PREFECT_API_URL.value()} knows no {NIGHTLY}; run `python -m flows.setup`.") from error
        print(f"{night.name}: {PREFECT_UI_URL.value()}/runs/flow-run/{night.id}", flush=True)
        children = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[night.id]))
        seen: dict[UUID, str] = {}
        while True:
            night = client.read_flow_run(night.id)
            for run in [*client.read_flow_runs(flow_run_filter=children), night]:
                state = run.state.name if run.state and run.state.name else "?"
                if seen.get(run.id) != state:
                    seen[run.id] = state
                    message = run.state.message if run.state and run.state.is_final() else None
                    print(f"{run.name}: {state}{f' - {message}' if message else ''}", flush=True)
            if night.state and night.state.is_final():
                sys.exit(0 if night.state.is_completed() else 1)
            time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    command("flows.nightly", main)
