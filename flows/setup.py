"""Make what the flows need on the Prefect server: pools, limits, deployments, automations. Again changes nothing.

    python -m flows.setup                         # after a change of prefect.yaml or of `categories`, again
    python -m flows.setup --gpu gpu-0 --gpu gpu-1  # a limit for each GPU; a worker names its own in FLAWSMITH_GPU

The server is the one of PREFECT_API_URL.
"""

import asyncio
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import httpx
import typer
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, RunDeployment
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL

from flawsmith.errors import FlawsmithError, UserError
from flawsmith.settings import load_settings

ROOT = Path(__file__).resolve().parent.parent
POOLS = {
    "gpu": "Retrains categories. Start its workers with --limit 1: one retraining each.",
    "control": "Nights and monitoring: what only waits or looks.",
}
FLOWS = ["retrain", "nightly", "monitor"]
SHORTEST_WINDOW = 60.0  # Prefect sends a heartbeat each 30 s at most
DEPLOY_SECONDS = 240

ZOMBIES = "flawsmith: a run without heartbeat has crashed"
RESTART = "flawsmith: a crashed retraining is started again"
DRIFT = "flawsmith: drift starts a retraining"
NIGHTLY_RUN = "nightly "  # how `nightly` names the runs that it starts, and starts again by itself
DRIFT_EVENT, DRIFT_RESOURCE = "flawsmith.drift", "flawsmith.category."


def main(
    gpu: Annotated[
        list[str] | None, typer.Option("--gpu", metavar="NAME", help="A GPU's limit. Repeatable. Default: gpu-0.")
    ] = None,
    window: Annotated[
        float,
        typer.Option(
            envvar="FLAWSMITH_HEARTBEAT_WINDOW",
            metavar="SECONDS",
            help="A run that says nothing for this long has crashed. At least three heartbeats "
            "(PREFECT_FLOWS_HEARTBEAT_FREQUENCY of the workers, 180 s by default).",
            min=SHORTEST_WINDOW,
        ),
    ] = 540.0,
) -> None:
    """Make pools, concurrency limits, the deployments of prefect.yaml and the automations."""
    settings = load_settings(ROOT / "params.yaml")
    if not PREFECT_API_URL.value():  # Prefect would start a server for this command alone
        raise UserError("PREFECT_API_URL is not set; `make up` starts a server, and .stack/env says where it is.")
    limits = [*(gpu or ["gpu-0"]), *(f"category-{name}" for name in settings.categories)]
    asyncio.run(_before(limits))
    _deploy(ROOT)
    asyncio.run(_after(timedelta(seconds=window)))
    print(f"Ready: pools {', '.join(POOLS)}; limits {', '.join(limits)}; deployments of prefect.yaml; automations.")


async def _before(limits: list[str]) -> None:
    async with get_client() as client:
        for name, description in POOLS.items():
            try:
                await client.create_work_pool(WorkPoolCreate(name=name, type="process", description=description))
            except ObjectAlreadyExists:
                continue  # as it is: its owner may have changed it, to another type even
        for name in limits:
            await client.upsert_global_concurrency_limit_by_name(name, 1)


def _deploy(root: Path) -> None:
    """Deploy all of prefect.yaml, with Prefect's own command: it is what its documentation describes.

    Raises:
        FlawsmithError: the command failed.
    """
    environment = {**os.environ, "FLAWSMITH_DEPLOYED_FROM": str(root), "NO_COLOR": "1", "COLUMNS": "200"}
    # set here it would be written into the deployments, and every worker would work in this one checkout
    environment.pop("FLAWSMITH_CHECKOUT", None)
    finished = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", "prefect.yaml"],
        cwd=root, env=environment, capture_output=True, text=True, timeout=DEPLOY_SECONDS, check=False,
    )  # fmt: skip
    if finished.returncode != 0:
        words = " ".join((finished.stderr.strip() or finished.stdout.strip()).splitlines()[-3:])
        raise FlawsmithError(f"`prefect deploy --all` failed: {words}")


async def _after(window: timedelta) -> None:
    async with get_client() as client:
        retrain = await client.read_deployment_by_name("retrain/retrain")
        for automation in automations(retrain.id, retrain.parameters, window):
            await _upsert(client, automation)


async def _upsert(client: PrefectClient, automation: AutomationCore) -> None:
    known = await client.read_automations_by_name(automation.name)
    for surplus in known[1:]:
        await client.delete_automation(surplus.id)
    if known:
        await client.update_automation(known[0].id, automation)
    else:
        await client.create_automation(automation)


def automations(retrain: UUID, parameters: dict[str, Any], window: timedelta) -> list[AutomationCore]:
    """The automations, given the id and the default parameters of the deployment `retrain/retrain`."""
    ours: dict[str, str | list[str]] = {"prefect.resource.role": "flow", "prefect.resource.name": FLOWS}
    retraining: dict[str, str | list[str]] = {
        "prefect.resource.role": "deployment",
        "prefect.resource.id": f"prefect.deployment.{retrain}",
    }
    copied = {name: f"{{{{ flow_run.parameters.{name} }}}}" for name in ["category", *parameters]}
    return [
        AutomationCore(
            name=ZOMBIES,
            description="Its worker or machine died. Without this the run would be Running for ever.",
            trigger=EventTrigger(
                posture=Posture.Proactive,
                match={"prefect.resource.id": "prefect.flow-run.*"},
                match_related=ours,
                for_each={"prefect.resource.id"},
                # Pending: the worker died between taking the run and starting it
                after={"prefect.flow-run.heartbeat", "prefect.flow-run.Running", "prefect.flow-run.Pending"},
                # Any sign of life or end. The event of a state bears the state's own name (Kept,
                # QualityGateFailed, ...): a list of Prefect's names would crash runs that ended well.
                expect={"prefect.flow-run.*"},
                threshold=1,
                within=window,
            ),
            actions=[
                ChangeFlowRunState(
                    name=None,
                    state=StateType.CRASHED,
                    force=False,
                    message=f"No heartbeat for {window.total_seconds():.0f} s: its worker or machine has died.",
                )
            ],
        ),
        AutomationCore(
            name=RESTART,
            description="With the same parameters and one attempt more; the flow itself gives up after max_attempts. "
            "Nights start theirs again themselves.",
            trigger=EventTrigger(
                posture=Posture.Reactive,
                match={"prefect.resource.id": "prefect.flow-run.*", "prefect.resource.name": f"!{NIGHTLY_RUN}*"},
                match_related=retraining,
                for_each={"prefect.resource.id"},
                expect={"prefect.flow-run.Crashed"},
                threshold=1,
                within=timedelta(0),
            ),
            actions=[
                RunDeployment(
                    source="selected",
                    deployment_id=retrain,
                    job_variables=None,
                    # in brackets: Prefect appends `| tojson`, which would bind to the 1 alone
                    parameters={**copied, "attempt": "{{ (flow_run.parameters.attempt + 1) }}"},
                )
            ],
        ),
        AutomationCore(
            name=DRIFT,
            description=f"The event {DRIFT_EVENT} on {DRIFT_RESOURCE}CATEGORY; the category's limit keeps one at work.",
            trigger=EventTrigger(
                posture=Posture.Reactive,
                match={"prefect.resource.id": f"{DRIFT_RESOURCE}*"},
                for_each={"prefect.resource.id"},
                expect={DRIFT_EVENT},
                threshold=1,
                within=timedelta(0),
            ),
            actions=[
                RunDeployment(
                    source="selected",
                    deployment_id=retrain,
                    job_variables=None,
                    parameters={"category": f"{{{{ event.resource['prefect.resource.id'][{len(DRIFT_RESOURCE)}:] }}}}"},
                )
            ],
        ),
    ]


def run() -> None:
    """The command: whatever goes wrong ends in one sentence."""
    try:
        typer.run(main)
    except FlawsmithError as error:
        print(f"flows.setup: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    except httpx.TransportError as error:
        print(f"flows.setup: {PREFECT_API_URL.value()} does not answer ({error}); start it or correct PREFECT_API_URL.",
              file=sys.stderr)  # fmt: skip
        raise SystemExit(UserError.exit_code) from error


if __name__ == "__main__":
    run()
