"""The flow against a real, temporary Prefect server: how it ends, what it publishes, which event it emits."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import State

import flows.run
from flawsmith.monitoring.reference import Measurement, save_reference
from flawsmith.processes import Finished, stream
from flows import monitor as module

Shoot = Callable[..., Path]
Start = Callable[..., State[Any]]
EVENT_SECONDS = 30.0  # the server stores events in batches


@pytest.fixture(scope="module")
def client(prefect_server: None) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def start(
    client: SyncPrefectClient,
    params_path: Path,
    model: Path,
    reference: Measurement,
    monkeypatch: pytest.MonkeyPatch,
) -> Start:
    """Run the flow in a checkout of its own; the command is the real one, with a model beside the registry."""
    content = yaml.safe_load(params_path.read_text())
    content["categories"] = ["plate"]
    params_path.write_text(yaml.safe_dump(content))
    save_reference(params_path.with_name("reference.npz"), reference)
    monkeypatch.chdir(params_path.parent)

    def with_model(
        command: Sequence[str], root: Path, on_line: Callable[[str], None], environment: Mapping[str, str], **more: Any
    ) -> Finished:
        given = ["--model", str(model), "--reference", "reference.npz"]
        return stream([*command[:2], *given, *command[2:]], root, on_line, environment, **more)

    monkeypatch.setattr(flows.run, "stream", with_model)

    def run(folder: str) -> State[Any]:
        state: State[Any] = module.monitor("plate", folder, return_state=True)
        return state

    return run


def events(client: SyncPrefectClient, run: Any) -> list[dict[str, Any]]:
    """The drift events of one flow run, after those of the run itself have arrived (they are sent later)."""
    related = {"id": [f"prefect.flow-run.{run}"]}
    deadline = time.monotonic() + EVENT_SECONDS
    while time.monotonic() < deadline:
        answer = client._client.post("/events/filter", json={"filter": {"any_resource": related}, "limit": 50})
        found: list[dict[str, Any]] = answer.json()["events"]
        if any(event["event"] in ("prefect.flow-run.Completed", "prefect.flow-run.Failed") for event in found) or any(
            event["event"] == module.EVENT for event in found
        ):
            return [event for event in found if event["event"] == module.EVENT]
        time.sleep(0.25)
    raise AssertionError("no event of the run has arrived")


def artifacts(client: SyncPrefectClient, run: Any) -> dict[str, Any]:
    """Of one flow run, by key (asked over HTTP: the sync client's `read_artifacts` sends a query that is refused)."""
    answer = client._client.post("/artifacts/filter", json={"artifacts": {"flow_run_id": {"any_": [str(run)]}}})
    return {item["key"]: item["data"] for item in answer.json()}


def test_drift_is_published_and_emits_the_event(client: SyncPrefectClient, start: Start, shoot: Shoot) -> None:
    shoot("dark", 25, light=0.7)
    state = start("dark")
    run = state.state_details.flow_run_id
    assert state.is_completed()
    assert state.name == "Drift"
    assert (state.message or "").startswith("Drift: ")

    (event,) = events(client, run)
    assert event["resource"]["prefect.resource.id"] == "flawsmith.category.plate"
    assert sorted(event["payload"]) == ["category", "folder", "reason", "statistics"]
    assert event["payload"]["category"] == "plate"
    assert event["payload"]["folder"] == "dark"
    assert event["payload"]["reason"] == state.message
    assert any(item["drifted"] for item in event["payload"]["statistics"])

    published = artifacts(client, run)
    assert set(published) == {"plate-drift", "plate-drift-statistics"}
    assert published["plate-drift"].startswith("# `plate`: drift\n")
    assert "artifacts/plate/monitor/report.html" in published["plate-drift"]
    assert Path("artifacts/plate/monitor/report.html").is_file()


@pytest.mark.slow
def test_without_drift_there_is_no_event(client: SyncPrefectClient, start: Start, shoot: Shoot) -> None:
    shoot("new", 25)
    state = start("new")
    assert (state.name, state.is_completed()) == ("Completed", True)
    assert "plate-drift" in artifacts(client, state.state_details.flow_run_id)
    assert events(client, state.state_details.flow_run_id) == []


def test_bad_input_fails_by_name_with_the_sentence_of_the_command(start: Start) -> None:
    state = start("nowhere")
    assert (state.name, state.is_failed()) == ("BadInput", True)
    assert "nowhere does not exist" in (state.message or "")
