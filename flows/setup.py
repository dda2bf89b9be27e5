"""Make what the flows need on the Prefect server: pools, limits, deployments, automations. Again changes nothing.

    python -m flows.setup                         # after a change of prefect.yaml or of `categories`, again
    python -m flows.setup --gpu gpu-0 --gpu gpu-1  # a limit for each GPU; a worker names its own in FLAWSMITH_GPU

The server is the one of PREFECT_API_URL.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from string import Template
from typing import Annotated
from uuid import UUID

import typer
import yaml
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL

from flawsmith.config import load_settings
from flawsmith.errors import FlawsmithError, UserError
from flows.machine import command

ROOT = Path(__file__).resolve().parent.parent
POOLS = {
    "gpu": "Retrains categories. Start its workers with --limit 1: one retraining each.",
    "control": "Nights and monitoring: what only waits or looks.",
}
SHORTEST_WINDOW = 60.0  # Prefect sends a heartbeat each 30 s at most
DEPLOY_SECONDS = 240
AUTOMATIONS = Path(__file__).with_name("automations.yaml")


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
    asyncio.run(_after(window))
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


async def _after(window: float) -> None:
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


def automations(retrain: UUID, parameters: Iterable[str], window: float) -> list[AutomationCore]:
    """The automations of automations.yaml.

    Args:
        retrain: id of the deployment `retrain/retrain`.
        parameters: the names of its parameters; a run that is started again gets those of the crashed one.
        window: seconds without a heartbeat after which a run has crashed.
    """
    copied = {name: f"{{{{ flow_run.parameters.{name} }}}}" for name in ["category", *parameters]}
    # in brackets: Prefect appends `| tojson`, which would bind to the 1 alone
    copied["attempt"] = "{{ (flow_run.parameters.attempt + 1) }}"
    filled = Template(AUTOMATIONS.read_text()).substitute(
        retrain=retrain, copied=json.dumps(copied), window=f"{window:.0f}"
    )
    return [AutomationCore.model_validate(item) for item in yaml.safe_load(filled)]


if __name__ == "__main__":
    command("flows.setup", partial(typer.run, main))
