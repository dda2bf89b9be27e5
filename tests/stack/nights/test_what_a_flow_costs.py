"""What the flow costs beside the bare `dvc repro` of the same work, both from nothing on the same machine.

pytest -m stack tests/stack/nights/test_what_a_flow_costs.py -s      # prints the figures
"""

import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from flows.stack import Stack

LIMIT_SECONDS = 60.0
# The time that the stages themselves took, by their runs: what else the machine does changes it most, and it is no cost
# of the flow.
COMPUTED = """
import mlflow
client = mlflow.MlflowClient()
runs = client.search_runs(
    [item.experiment_id for item in client.search_experiments()], "tags.`flawsmith.category` = 'brushed_metal'"
)
here = [run for run in runs if run.data.tags["flawsmith.checkout"].endswith({!r})]
stages = [run.info for run in here if run.data.tags["flawsmith.stage"] not in ("register", "promote")]
print(sum(run.end_time - run.start_time for run in stages) / 1000)
"""


def finished(stack: Stack, run_id: str) -> dict[str, Any]:
    """The flow run, when it has ended."""
    while True:
        run: dict[str, Any] = stack.api(f"flow_runs/{run_id}")
        if run["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            return run
        time.sleep(0.5)


def seconds(run: dict[str, Any]) -> float:
    start, end = (datetime.fromisoformat(run[key].replace("Z", "+00:00")) for key in ("start_time", "end_time"))
    return (end - start).total_seconds()


def computed(checkout: Any, store: str) -> float:
    said = checkout.run("python", "-c", COMPUTED.format(str(checkout.folder)), MLFLOW_TRACKING_URI=store)
    return float(said.stdout)


def test_the_flow_adds_less_than_a_minute_to_bare_dvc(
    stack: Stack, bare: Any, make_checkout: Callable[..., Any]
) -> None:
    flown = make_checkout("flown")
    stack.set_up(flown.folder)
    stack.start_worker("gpu", "gpu-overhead", flown.folder, gpu="gpu-0")
    try:
        deployment = stack.api("deployments/name/retrain/retrain")
        begun = time.monotonic()
        created = stack.api(
            f"deployments/{deployment['id']}/create_flow_run", {"parameters": {"category": "brushed_metal"}}
        )
        run = finished(stack, created["id"])
        whole = time.monotonic() - begun
    finally:
        stack.stop_worker("gpu-overhead")
    assert run["state"]["type"] == "COMPLETED", run["state"]
    tasks = stack.api("task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
    own = {task["name"]: seconds(task) for task in tasks}
    beyond = sum(own[name] for name in ("register", "promote"))  # work that bare DVC does not do
    flow = whole - beyond - computed(flown, stack.mlflow_url)
    dvc = bare.seconds - computed(bare.checkout, f"sqlite:///{bare.checkout.folder / 'mlflow.db'}")
    print(
        f"\nbare dvc repro {bare.seconds:.1f} s; flow {whole:.1f} s from submission to end, of it register and promote "
        f"{beyond:.1f} s; beside the stages' work {dvc:.1f} s and {flow:.1f} s; added by the flow {flow - dvc:.1f} s"
    )
    assert flow - dvc < LIMIT_SECONDS
