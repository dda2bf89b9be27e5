"""Look at a folder of new production images with the champion; where they have drifted, say so with an event.

    prefect deployment run monitor/monitor -p category=brushed_metal -p folder=/line/today
    python -m flows.monitor --category brushed_metal --folder /line/today

`flawsmith monitor` judges; this flow runs it in the current folder, which is the worker's checkout, and publishes what
it found. Drift emits the event `flawsmith.drift` for the resource `flawsmith.category.<category>`, from which the
automation of `flows.setup` starts a retraining.

How a run ends: `Completed` (no drift), `Drift` (a normal end too: the monitoring worked), `BadInput` (no or too few
readable images, no champion), `InfrastructureFailed`, or `Failed`.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flawsmith.dvc import InfrastructureError, failure
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.processes import stream
from flows.artifacts import slug

EVENT, RESOURCE = "flawsmith.drift", "flawsmith.category."
NO_DRIFT, DRIFT = 0, 3  # exit statuses of `flawsmith monitor` that come with an answer
EXIT_CODES = {"Completed": 0, "Drift": DRIFT, "BadInput": UserError.exit_code}


@flow(name="monitor", persist_result=False)
def monitor(category: str, folder: str, out: str | None = None) -> State[Any]:
    """Judge new images of one category, publish the verdict, and emit the drift event if they have drifted.

    Args:
        category: one of `categories` in params.yaml.
        folder: where the new images lie, as the worker sees it; relative to its checkout.
        out: folder for report.html, drift.json and scores.csv; artifacts/<category>/monitor if null.
    """
    try:
        answer = judge_folder(category, folder, out)
    except FlawsmithError as error:
        name = {UserError: "BadInput", InfrastructureError: "InfrastructureFailed"}.get(type(error), "Failed")
        return Failed(name=name, message=str(error))
    results = out or f"artifacts/{category}/monitor"
    key = slug(category)
    create_markdown_artifact(
        drift_report(answer, folder, results), key=f"{key}-drift", description=f"{category}: {answer['verdict']}"
    )
    create_table_artifact(
        statistic_rows(answer), key=f"{key}-drift-statistics", description="What the verdict rests on"
    )
    if not answer["drifted"]:
        return Completed(message=answer["reason"])
    emit_event(
        event=EVENT,
        resource={"prefect.resource.id": f"{RESOURCE}{category}", "prefect.resource.name": category},
        payload=event_payload(answer, folder),
    )
    return Completed(name="Drift", message=answer["reason"])


def judge_folder(category: str, folder: str, out: str | None) -> dict[str, Any]:
    """Run `flawsmith monitor`; its log lines go to the run's log, its answer is the content of drift.json.

    Raises:
        FlawsmithError: it gave no answer; the class says whose fault it is.
    """
    command = ["flawsmith", "monitor", "--category", category, "--json", *(["--out", out] if out else []), "--", folder]
    environment = {"FLAWSMITH_FLOW_RUN": str(flow_run.id), "FLAWSMITH_ACTOR": f"prefect flow run {flow_run.name}"}
    finished = stream(command, Path.cwd(), _say, environment, keep_stdout=True)
    try:
        answer = json.loads(finished.stdout) if finished.status in (NO_DRIFT, DRIFT) else None
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise failure("`flawsmith monitor`", finished)
    return answer


def event_payload(answer: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """What the event tells whoever listens."""
    return {
        "category": answer["category"],
        "reason": answer["reason"],
        "statistics": answer["statistics"],
        "folder": folder,
    }


def drift_report(answer: Mapping[str, Any], folder: str, results: str) -> str:
    """The verdict as markdown for the run's page."""
    files, flagged, images, known = (answer[key] for key in ("files", "flagged", "images", "reference"))
    low, high = flagged["interval"]
    lines = [
        f"# `{answer['category']}`: {answer['verdict']}",
        "\n\n".join([answer["reason"], *answer["notes"]]),
        "",
        f"- Model: {answer['model']}",
        f"- Images: {images['measured']} of {files['found']} files in `{folder}`, against {known['measured']} "
        f"calibration normals; compared are those judged good, {images['compared']} and {known['compared']}",
        f"- Flagged: {flagged['images']} ({flagged['share']:.1%}, interval {low:.1%} to {high:.1%}; "
        f"{flagged['expected']:.1%} expected without drift and defects)",
        *(
            f"- {shift['name'].capitalize()}: {shift['before']:.3g} → {shift['after']:.3g} "
            f"({shift['deviations']:+.1f} deviations of the calibration normals)"
            for shift in answer["shifts"]
        ),
        f"- Unreadable files: {len(files['unreadable'])}",
        f"- Report: `{results}/report.html`",
    ]
    return "\n".join(lines) + "\n"


def statistic_rows(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a statistic."""
    return [
        {
            "statistic": item["name"],
            "value": item["value"],
            "expected without drift": item["expected"],
            "effect": item["effect"],
            "limit": item["limit"],
            "p, adjusted": item["adjusted_p"],
            "verdict": item["verdict"],
        }
        for item in answer["statistics"]
    ]


def _say(line: str) -> None:
    if line.strip():
        get_run_logger().info("%s", line)


def main(
    category: Annotated[str, typer.Option("--category", "-c", metavar="NAME", help="Folder under data.root.")],
    folder: Annotated[str, typer.Option("--folder", metavar="DIR", help="New production images.")],
    out: Annotated[str | None, typer.Option("--out", "-o", metavar="DIR", help="Results.")] = None,
) -> None:
    """Run the flow here and now. Exit status 0: no drift, 3: drift, 2: bad input, 1: anything else."""
    state = monitor(category, folder, out, return_state=True)
    if state.is_completed():
        print(state.message)
    else:
        print(f"flows.monitor: {state.name}: {state.message}", file=sys.stderr)
    raise typer.Exit(EXIT_CODES.get(state.name or "", 1))


if __name__ == "__main__":
    typer.run(main)
