"""What the flow costs beside the bare `dvc repro` of the same work, both from nothing on the same machine.

pytest -m stack tests/stack/test_what_a_flow_costs.py -s      # prints the figures
"""

import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from flows.stack import Stack

LIMIT_SECONDS = 60.0
MINUTES = 15


def finished(stack: Stack, run_id: str) -> dict[str, Any]:
    """The flow run, when it has ended."""
    deadline = time.monotonic() + MINUTES * 60
    while time.monotonic() < deadline:
        run: dict[str, Any] = stack.api(f"flow_runs/{run_id}")
        if run["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            return run
        time.sleep(1)
    raise AssertionError(f"flow run {run_id} has not ended after {MINUTES} minutes")


def seconds(run: dict[str, Any]) -> float:
    start, end = (datetime.fromisoformat(run[key].replace("Z", "+00:00")) for key in ("start_time", "end_time"))
    return (end - start).total_seconds()


def test_the_flow_adds_less_than_a_minute_to_bare_dvc(stack: Stack, make_checkout: Callable[..., Any]) -> None:
    bare, flown = make_checkout("bare"), make_checkout("flown")
    stack.set_up(flown.folder)
    begun = time.monotonic()
    bare.run("dvc", "repro", **stack.variables())
    bare_seconds = time.monotonic() - begun

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
    added = whole - beyond - bare_seconds
    print(
        f"\nbare dvc repro {bare_seconds:.1f} s; flow {whole:.1f} s from submission to end, of it register and promote "
        f"{beyond:.1f} s; added by the flow {added:.1f} s ({added / bare_seconds:.1%} of this small run)"
    )
    assert added < LIMIT_SECONDS
