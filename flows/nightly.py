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

from flawsmith.settings import load_settings
from flows.artifacts import ENDINGS, nightly_report, slug

RETRAIN, NIGHTLY = "retrain/retrain", "nightly/nightly"
POLL_SECONDS = 2.0
SERVER_ERROR = 500  # an HTTP status from here on may pass
TRIES = 2  # a crashed sub-run is started once more
GOOD = frozenset({"promoted", "kept", "unchanged", "skipped"})
OUTCOME = "outcome"  # key of the artifact a retraining leaves


@dataclass
class Part:
    """One category of the night."""

    category: str
    run: FlowRun | None = None
    tries: int = 0
    trouble: str = ""  # why there is no run, or no end

    @property
    def over(self) -> bool:
        ended = self.run is not None and self.run.state is not None and self.run.state.is_final()
        return bool(self.trouble) or (ended and not self.may_try_again)

    @property
    def may_try_again(self) -> bool:
        crashed = self.run is not None and self.run.state is not None and self.run.state.is_crashed()
        return crashed and self.tries < TRIES

    @property
    def state(self) -> str:
        if self.trouble:
            return self.trouble
        return self.run.state.name or "?" if self.run and self.run.state else "not started"

    @property
    def outcome(self) -> str:
        """In one word of ENDINGS, or `failed`."""
        return "failed" if self.trouble else ENDINGS.get(self.state, "failed")

    @property
    def good(self) -> bool:
        return self.outcome in GOOD


@flow(name="nightly", persist_result=False)
def nightly(categories: list[str] | None = None, hours: float = 20.0) -> State[Any]:
    """Retrain every category through `retrain/retrain` and wait for all of them.

    Args:
        categories: default: `categories` of params.yaml.
        hours: what has not ended by then counts as broken (its run goes on), so that the next night can begin.
    """
    log = get_run_logger()
    names = categories or list(load_settings(Path.cwd() / "params.yaml").categories)
    parts = [Part(name) for name in dict.fromkeys(names)]
    until = time.monotonic() + hours * 3600
    with get_client(sync_client=True) as client:
        while True:
            for part in (part for part in parts if not part.over):
                before = part.state
                if time.monotonic() > until:
                    part.trouble = f"not over after {hours:g} hours"
                else:
                    _advance(client, part)
                if part.state != before:
                    log.info("%s: %s", part.category, part.state)
            if all(part.over for part in parts):
                break
            time.sleep(POLL_SECONDS)
        rows = [_row(client, part) for part in parts]
    create_markdown_artifact(nightly_report(rows), "nightly", "the night, a line a category")
    return verdict(parts)


def _advance(client: SyncPrefectClient, part: Part) -> None:
    """Start a category's run, start it again, or look how it is; a server that is away is asked again later."""
    try:
        if part.run is None or part.may_try_again:
            number = part.tries + 1
            # The name keeps the automation that restarts crashed runs away from these (flows.setup). The key makes
            # one run of a request that is sent twice because the first answer got lost.
            part.run = _start(
                RETRAIN,
                {"category": part.category},
                name=f"nightly {part.category}{' again' if number > 1 else ''}",
                key=f"{flow_run.id}-{part.category}-{number}",
            )
            part.tries = number
        else:
            part.run = client.read_flow_run(part.run.id)
    except ObjectNotFound:
        part.trouble = f"there is no deployment {RETRAIN}" if part.run is None else "its run was deleted"
    except (httpx.TransportError, PrefectHTTPStatusError) as error:
        if isinstance(error, PrefectHTTPStatusError) and error.response.status_code < SERVER_ERROR:
            part.trouble = f"the server refused it: {error}"
        else:
            get_run_logger().warning("%s: the server did not answer (%s); asked again soon", part.category, error)


def _start(
    deployment: str, parameters: dict[str, Any], name: str | None = None, key: str | None = None, child: bool = True
) -> FlowRun:
    """Create a run and leave it to the workers."""
    started = run_deployment(
        deployment, parameters=parameters, flow_run_name=name, idempotency_key=key, timeout=0, as_subflow=child
    )
    if not isinstance(started, FlowRun):  # it is a coroutine in asynchronous code alone
        raise TypeError("run_deployment must be called from synchronous code")
    return started


def _row(client: SyncPrefectClient, part: Part) -> dict[str, Any]:
    message = part.run.state.message if part.run and part.run.state and not part.trouble else ""
    told = part.state if part.outcome == "failed" else ""  # the others say it in their outcome
    row = {"category": part.category, "outcome": part.outcome, "why": ": ".join(filter(None, [told, message]))}
    if part.run is None:
        return row
    return {
        **row,
        "run": part.run.name,
        "link": f"{PREFECT_UI_URL.value()}/runs/flow-run/{part.run.id}",
        "image_auroc": outcome(client, part.category, part.run.id).get("image_auroc"),
    }


def outcome(client: SyncPrefectClient, category: str, run: UUID) -> dict[str, Any]:
    """What a retraining left about its end; empty if it did not get that far."""
    found = client.read_artifacts(
        artifact_filter=ArtifactFilter(
            flow_run_id=ArtifactFilterFlowRunId(any_=[run]),
            key=ArtifactFilterKey(any_=[f"{slug(category)}-{OUTCOME}"]),
        ),
        limit=1,
    )
    if not found:
        return {}
    data = found[0].data
    rows = json.loads(data) if isinstance(data, str) else data
    return dict(rows[0]) if isinstance(rows, list) and rows else {}


def verdict(parts: Sequence[Part]) -> State[Any]:
    """Failed if a category needs a person; told of each is how it ended."""
    broken = [part for part in parts if not part.good]
    named = {
        part.category: f"{part.category} ({part.state})" if part.outcome == "failed" else part.category
        for part in parts
    }
    told = "; ".join(
        f"{outcome}: {', '.join(named[part.category] for part in parts if part.outcome == outcome)}"
        for outcome in dict.fromkeys(part.outcome for part in [*broken, *parts])
    )
    if broken:
        return Failed(message=f"{len(broken)} of {len(parts)} categories need a person. {told}.")
    return Completed(message=f"{told}.")


def main() -> int:
    """Start the deployment, print what changes, and say how it ended."""
    address = PREFECT_API_URL.value()
    if not address:
        print("flows.nightly: PREFECT_API_URL is not set; `make up` starts a server, .stack/env says where.",
              file=sys.stderr)  # fmt: skip
        return 2
    with get_client(sync_client=True) as client:
        try:
            night = _start(NIGHTLY, {}, child=False)
        except (httpx.TransportError, ObjectNotFound) as error:
            remedy = "run `python -m flows.setup`" if isinstance(error, ObjectNotFound) else "start it with `make up`"
            print(f"flows.nightly: {address} does not know {NIGHTLY} or does not answer ({error}); {remedy}.",
                  file=sys.stderr)  # fmt: skip
            return 2
        print(f"{night.name}: {PREFECT_UI_URL.value()}/runs/flow-run/{night.id}", flush=True)
        seen: dict[UUID, str] = {}
        while True:
            night = client.read_flow_run(night.id)
            children = client.read_flow_runs(
                flow_run_filter=FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[night.id]))
            )
            for run in [*children, night]:
                state = run.state.name if run.state and run.state.name else "?"
                if seen.get(run.id) != state:
                    seen[run.id] = state
                    message = run.state.message if run.state and run.state.is_final() else None
                    print(f"{run.name}: {state}{f' - {message}' if message else ''}", flush=True)
            if night.state and night.state.is_final():
                return 0 if night.state.is_completed() else 1
            time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
