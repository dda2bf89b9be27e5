"""Retraining for real: servers, a worker, DVC, MLflow, and what goes wrong at night.

The tests share one checkout and follow one another: a scheduled run that goes well, then one that is killed and ends at
the quality gate, then one that drift starts.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from stack_workers import FAST, at_work, kill

from flows.stack import Stack

CATEGORY = "brushed_metal"
WINDOW = int(FAST["FLAWSMITH_HEARTBEAT_WINDOW"])
PATIENCE = 1500.0  # seconds a run may take on a machine that does other things too
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared") / "remote"


@pytest.fixture(scope="module")
def checkout(stack: Stack, make_checkout: Callable[..., Any], remote: Path) -> Iterator[Any]:
    """A checkout with a DVC remote and workers, and a server on which set-up has run twice."""
    made = make_checkout("retrain", remote=remote)
    with at_work(stack, made):
        made.run("python", "-m", "flows.setup", **stack.variables(), FLAWSMITH_HEARTBEAT_WINDOW=str(WINDOW))
        yield made


def deployment(stack: Stack, name: str) -> Any:
    return stack.api(f"deployments/name/{name}")


def runs(stack: Stack) -> list[Any]:
    """All retrainings of the category that were not merely planned, oldest first."""
    found = stack.api("flow_runs/filter", {"sort": "START_TIME_ASC", "flows": {"name": {"any_": ["retrain"]}}})
    return [run for run in found if run["state_type"] != "SCHEDULED" and run["parameters"]["category"] == CATEGORY]


def wait_for(what: str, look: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := look():
            return found
        time.sleep(1)
    raise AssertionError(f"{what} did not happen within {seconds:.0f} s")


def wait_for_end(stack: Stack, run: Any) -> Any:
    def ended() -> Any:
        now = stack.api(f"flow_runs/{run['id']}")
        return now if now["state_type"] in FINAL else None

    return wait_for(f"the end of run {run['name']}", ended)


def artifacts(stack: Stack, run: Any) -> dict[str, Any]:
    found = stack.api("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    return {item["key"]: item["data"] for item in found}


def log(stack: Stack, run: Any) -> str:
    wanted = {"flow_run_id": {"any_": [run["id"]]}}
    pages = [
        stack.api("logs/filter", {"logs": wanted, "sort": "TIMESTAMP_ASC", "offset": start}) for start in (0, 200, 400)
    ]
    return "\n".join(item["message"] for page in pages for item in page)


def is_clean(checkout: Any, *targets: str) -> bool:
    return json.loads(checkout.run("dvc", "status", "--json", *targets).stdout) == {}


def test_set_up_twice_leaves_one_of_each(stack: Stack, checkout: Any) -> None:
    automations = [item["name"] for item in stack.api("automations/filter", {}) if item["name"].startswith("flawsmith")]
    assert len(automations) == len(set(automations)) == 3
    for name in ("retrain/retrain", "nightly/nightly", "monitor/monitor"):
        pull = json.dumps(deployment(stack, name)["pull_steps"])
        assert str(checkout.folder) in pull, "the folder it was deployed from is where a worker without its own works"
    schedules = deployment(stack, "nightly/nightly")["schedules"]
    assert [(item["schedule"]["cron"], item["active"]) for item in schedules] == [("0 2 * * *", True)]
    assert schedules[0]["schedule"]["timezone"]


def test_a_schedule_fires_and_the_run_goes_from_nothing_to_the_registry(stack: Stack, checkout: Any) -> None:
    due = datetime.now(UTC) + timedelta(seconds=20)
    retrain = deployment(stack, "retrain/retrain")["id"]
    schedule = {"interval": 86400, "anchor_date": due.isoformat(), "timezone": "UTC"}
    parameters = {"category": CATEGORY, "publish_branch": "results/{category}"}
    planned = {"schedule": schedule, "active": True, "parameters": parameters, "slug": "soon"}
    head, index = git_state(checkout)
    (made,) = stack.api(f"deployments/{retrain}/schedules", [planned])
    run = wait_for("the scheduled run", lambda: next(iter(runs(stack)), None))
    assert run["auto_scheduled"]
    assert abs(datetime.fromisoformat(run["expected_start_time"]) - due) < timedelta(seconds=1)
    remove_schedule(stack, retrain, made["id"])
    ended = wait_for_end(stack, run)
    assert ended["state_name"] == "Completed", ended["state"]["message"]
    shown = artifacts(stack, ended)
    stages = json.loads(shown["brushed-metal-stages"])
    assert {row["DVC"] for row in stages} == {"ran"}
    assert len(stages) >= 8
    assert {row["metric"] for row in json.loads(shown["brushed-metal-metrics"])} >= {"image_auroc", "aupro"}
    assert json.loads(shown["brushed-metal-promotion"]), "the checks of the promotion"
    assert shown["brushed-metal-triplets"].startswith("data:image/jpeg;base64,")
    assert "> flawsmith distill" in log(stack, ended), "the stages' lines are the run's"
    assert is_clean(checkout)
    assert git_state(checkout) == (head, index), "the checkout's branch and index are its owner's"
    # the MLflow runs name the flow run that started them, and the registry has the model
    code = (
        "import json, mlflow; client = mlflow.MlflowClient();"
        f"version = client.search_model_versions(\"name = 'flawsmith-{CATEGORY}'\");"
        "experiments = [item.experiment_id for item in client.search_experiments()];"
        f"found = client.search_runs(experiments, \"tags.`flawsmith.flow_run` = '{ended['id']}'\");"
        "print(json.dumps([len(version), sorted(run.data.tags['flawsmith.stage'] for run in found)]))"
    )
    versions, stages_recorded = json.loads(checkout.run("python", "-c", code, **stack.variables()).stdout)
    assert versions == 1
    assert {"ddpm-train", "distill", "evaluate", "export"} <= set(stages_recorded)


def git_state(checkout: Any) -> tuple[str, str]:
    return checkout.run("git", "rev-parse", "HEAD").stdout, checkout.run("git", "ls-files", "--stage").stdout


def test_the_published_branch_and_the_remote_give_everything_to_anyone(checkout: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    branch = f"results/{CATEGORY}"
    checkout.run("git", "clone", "--quiet", "--branch", branch, str(checkout.folder), str(other))
    checkout.run("dvc", "--cd", str(other), "pull")
    model = Path("artifacts", CATEGORY, "export", "model.onnx")
    assert (other / model).read_bytes() == (checkout.folder / model).read_bytes()
    assert json.loads(checkout.run("dvc", "--cd", str(other), "status", "--json").stdout) == {}


def remove_schedule(stack: Stack, deployment_id: str, schedule: str) -> None:
    code = (
        "from uuid import UUID; from prefect.client.orchestration import get_client\n"
        "with get_client(sync_client=True) as client:\n"
        f"    client.delete_deployment_schedule(UUID('{deployment_id}'), UUID('{schedule}'))"
    )
    subprocess.run([sys.executable, "-c", code], env=stack.environment(), check=True, capture_output=True)


@pytest.fixture(scope="module")
def recovered(stack: Stack, checkout: Any) -> tuple[Any, Any, int]:
    """A run whose machine died in the middle of ddpm-train, the run that took its place, and its first checkpoint.

    The gate asks for more than any defect shows now, so that the second run ends there.
    """
    checkout.set_params({"ddpm-train": {"steps": 90, "checkpoint_every": 3}, "validate": {"min_change_inside": 0.9}})
    known = len(checkout.noted("ddpm-train"))
    retrain = deployment(stack, "retrain/retrain")["id"]
    run = stack.api(f"deployments/{retrain}/create_flow_run", {"parameters": {"category": CATEGORY}})

    def checkpoints() -> int:
        now = stack.api(f"flow_runs/{run['id']}")
        assert now["state_type"] not in FINAL, now["state"]["message"]
        return checkout.noted("ddpm-train")[known:].count("checkpoint.pt")

    wait_for("a checkpoint", lambda: checkpoints() >= 3)
    saved = checkpoints()
    kill(stack, "worker-gpu-0")
    assert not (checkout.stage("ddpm-train") / "unet.safetensors").exists(), "a half-written model must not be there"
    crashed = wait_for_end(stack, run)

    def second() -> Any:
        later = [item for item in runs(stack) if item["parameters"].get("attempt") == 2]
        return later[0] if later else None

    return crashed, wait_for_end(stack, wait_for("the second attempt", second)), saved


def test_a_run_whose_machine_died_is_crashed_and_started_again(recovered: tuple[Any, Any, int]) -> None:
    crashed, second, _ = recovered
    assert crashed["state_name"] == "Crashed"
    assert f"No heartbeat for {WINDOW} s" in crashed["state"]["message"]
    assert second["parameters"] == {**crashed["parameters"], "attempt": 2}


def test_nothing_is_lost_the_training_goes_on_from_its_checkpoint(
    stack: Stack, checkout: Any, recovered: tuple[Any, Any, int]
) -> None:
    _, _, saved = recovered
    assert saved < 30, "the run was killed in the middle"
    total = checkout.noted("ddpm-train").count("checkpoint.pt")
    first_run = 4  # the scheduled run: 12 steps, a checkpoint each 3
    assert total <= first_run + 30 + 1, "30 checkpoints make the whole training; one may have been made twice"
    assert is_clean(checkout, f"ddpm-train@{CATEGORY}", f"synthesize@{CATEGORY}")
    assert not list(checkout.folder.glob("artifacts/**/.*.tmp")), "nothing half-written stays"


def test_the_gate_s_refusal_is_a_state_and_a_report_and_is_not_tried_again(
    stack: Stack, checkout: Any, recovered: tuple[Any, Any, int]
) -> None:
    _, run, _ = recovered
    assert run["state_name"] == "QualityGateFailed"
    assert run["state_type"] == "FAILED"
    assert "change_inside" in run["state"]["message"]
    report = artifacts(stack, run)["brushed-metal-quality-gate"]
    assert "at least 0.9" in report
    assert f"{stack.url('mlflow')}/#/experiments/" in report, "the gate's MLflow run is linked"
    assert "validate/docs/index.html" in report
    assert "data:image/jpeg;base64," in report
    tasks = stack.api("task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
    assert {item["name"]: item["run_count"] for item in tasks}[f"validate@{CATEGORY}"] == 1
    assert not any(item["name"].startswith("distill") for item in tasks)


def test_drift_starts_a_retraining_of_its_category(
    stack: Stack, checkout: Any, recovered: tuple[Any, Any, int]
) -> None:
    before = {run["id"] for run in runs(stack)}
    code = (
        "from prefect.events import emit_event; "
        f"emit_event('flawsmith.drift', resource={{'prefect.resource.id': 'flawsmith.category.{CATEGORY}'}})"
    )
    subprocess.run([sys.executable, "-c", code], env=stack.environment(), check=True, capture_output=True)
    run = wait_for("a run", lambda: next((item for item in runs(stack) if item["id"] not in before), None))
    assert run["parameters"]["category"] == CATEGORY
    ended = wait_for_end(stack, run)
    stages = json.loads(artifacts(stack, ended)["brushed-metal-stages"])
    assert {row["DVC"] for row in stages} == {"unchanged"}, "what has not changed is not computed again"


def test_nobody_takes_a_refused_run_for_one_without_heartbeat(stack: Stack, recovered: tuple[Any, Any, int]) -> None:
    """Last of all: what was to be waited for has mostly passed by now."""
    _, run, _ = recovered
    due = datetime.fromisoformat(run["end_time"]) + timedelta(seconds=WINDOW + 15)
    time.sleep(max(0.0, (due - datetime.now(UTC)).total_seconds()))
    assert stack.api(f"flow_runs/{run['id']}")["state_name"] == "QualityGateFailed"
