"""prefect.yaml and the automations, as far as they can be judged without a stack (tests/stack tries them)."""

import asyncio
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.events.schemas.automations import AutomationCore

from flawsmith.errors import UserError
from flows import setup
from flows.monitor import EVENT, RESOURCE, monitor
from flows.nightly import nightly
from flows.retrain import retrain

ROOT = Path(__file__).parents[2]
SPECIFICATION = yaml.safe_load((ROOT / "prefect.yaml").read_text())
DEPLOYMENTS = {item["name"]: item for item in SPECIFICATION["deployments"]}


ZOMBIES, RESTART, DRIFT = (
    f"flawsmith: {what}"
    for what in (
        "a run without heartbeat has crashed",
        "a crashed retraining is started again",
        "drift starts a retraining",
    )
)


def made(window: float = 540.0) -> dict[str, AutomationCore]:
    return {item.name: item for item in setup.automations(uuid4(), DEPLOYMENTS["retrain"]["parameters"], window)}


def test_every_parameter_of_a_retraining_is_carried_over_when_it_is_started_again() -> None:
    """Prefect's run holds what its deployment names, not the function's defaults."""
    flow_parameters = set(retrain.parameters.properties) - {"category"}
    assert set(DEPLOYMENTS["retrain"]["parameters"]) == flow_parameters
    action: Any = made()[RESTART].actions[0]
    assert set(action.parameters) == flow_parameters | {"category"}
    assert "+ 1" in action.parameters["attempt"]


def test_a_run_is_dead_after_a_window_without_any_sign_of_life() -> None:
    trigger: Any = made()[ZOMBIES].trigger
    assert trigger.expect == {"prefect.flow-run.*"}, "the end of a run under any name counts"
    assert trigger.within == timedelta(seconds=540)
    assert "prefect.flow-run.heartbeat" in trigger.after
    assert set(trigger.match_related.root["prefect.resource.name"]) == {retrain.name, nightly.name, monitor.name}


def test_each_automation_listens_to_what_the_flows_say() -> None:
    restart: Any = made()[RESTART].trigger
    assert restart.match.root["prefect.resource.name"] in ("!nightly *", ["!nightly *"]), "nights look after theirs"
    drift: Any = made()[DRIFT].trigger
    assert drift.expect == {EVENT}
    assert drift.match.root["prefect.resource.id"] in (f"{RESOURCE}*", [f"{RESOURCE}*"])


def test_deployments_lie_on_the_pools_that_set_up_makes() -> None:
    assert {item["work_pool"]["name"] for item in DEPLOYMENTS.values()} <= set(setup.POOLS)
    assert DEPLOYMENTS["retrain"]["work_pool"]["name"] == "gpu"
    night = DEPLOYMENTS["nightly"]
    assert night["work_pool"]["name"] == "control"
    assert night["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
    assert all(item["timezone"] for item in night["schedules"])


def test_entrypoints_exist() -> None:
    for item in DEPLOYMENTS.values():
        path, _, name = item["entrypoint"].partition(":")
        assert (ROOT / path).is_file()
        assert f"def {name}(" in (ROOT / path).read_text()


def test_prefect_yaml_names_no_folder_of_any_machine() -> None:
    assert not [word for word in (ROOT / "prefect.yaml").read_text().split() if word.startswith(("/", "~"))]


def test_an_automation_is_made_once_and_changed_afterwards(prefect_server: None) -> None:
    async def twice() -> list[Any]:
        async with get_client() as client:
            for seconds in (540, 90):
                for item in made(seconds).values():
                    await setup._upsert(client, item)
            return await client.read_automations()

    found = asyncio.run(twice())
    assert sorted(item.name for item in found) == sorted([ZOMBIES, RESTART, DRIFT])
    assert {item.name: item.trigger.within for item in found}[ZOMBIES] == timedelta(seconds=90)


def test_pools_and_limits_are_made_once(prefect_server: None) -> None:
    async def read() -> tuple[set[str], dict[str, int]]:
        async with get_client() as client:
            pools = {item.name for item in await client.read_work_pools()}
            limits = {item.name: item.limit for item in await client.read_global_concurrency_limits()}
            return pools, limits

    for _ in range(2):
        asyncio.run(setup._before(["gpu-7", "category-wool"]))
    pools, limits = asyncio.run(read())
    assert pools >= {"gpu", "control"}
    assert limits["gpu-7"] == limits["category-wool"] == 1


def test_a_prefect_that_cannot_deploy_is_said_in_one_sentence(tmp_path: Path, prefect_server: None) -> None:
    with pytest.raises(setup.FlawsmithError, match="prefect deploy --all"):
        setup._deploy(tmp_path)


def test_params_that_cannot_be_read_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    with pytest.raises(UserError, match=r"params\.yaml"):
        setup.main()


@pytest.mark.parametrize(("address", "words"), [(None, "is not set"), ("http://127.0.0.1:1/api", "does not answer")])
def test_a_server_that_is_not_there_is_said_in_one_sentence(tmp_path: Path, address: str | None, words: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    environment["PREFECT_HOME"] = str(tmp_path)
    if address:
        environment["PREFECT_API_URL"] = address
    done = subprocess.run(
        [sys.executable, "-m", "flows.setup"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
