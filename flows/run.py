"""What the flows share: how a run asks `flawsmith`, what it tells the stages, and how it ends when that fails."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Failed

from flawsmith.dvc import InfrastructureError, failure
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.processes import stream


def say(line: str) -> None:
    """Put a line of a stage into the run's log."""
    if line.strip():
        get_run_logger().info("%s", line)


def environment() -> dict[str, str]:
    """What the stages are told, so that their MLflow runs name this one."""
    return {"FLAWSMITH_FLOW_RUN": str(flow_run.id), "FLAWSMITH_ACTOR": f"prefect flow run {flow_run.name}"}


def ask(root: Path, statuses: Sequence[int], command: str, *words: str) -> dict[str, Any]:
    """Run `flawsmith COMMAND --json` in `root`; its log lines go to the run's log.

    Returns:
        Its answer, which comes with these exit statuses alone.

    Raises:
        FlawsmithError: it gave no answer; the class says whose fault it is.
    """
    finished = stream(["flawsmith", command, "--json", *words], root, say, environment(), keep_stdout=True)
    try:
        answer = json.loads(finished.stdout) if finished.status in statuses else None
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise failure(f"`flawsmith {command}`", finished)
    return answer


def failed(error: FlawsmithError) -> State[Any]:
    """The state of a run that an error has ended; its name says whose fault it is."""
    name = {UserError: "BadInput", InfrastructureError: "InfrastructureFailed"}.get(type(error), "Failed")
    return Failed(name=name, message=str(error))
