"""Look at a folder of new production images with the champion; where they have drifted, say so with an event.

    prefect deployment run monitor/monitor -p category=brushed_metal -p folder=/line/today
    python -m flows.monitor --category brushed_metal --folder /line/today

`flawsmith monitor` judges; this flow runs it in the current folder, which is the worker's checkout, and publishes what
it found. Drift emits the event `flawsmith.drift` for the resource `flawsmith.category.<category>`, from which the
automation of `flows.setup` starts a retraining.

How a run ends: `Completed` (no drift), `Drift` (a normal end too: the monitoring worked), `BadInput` (no or too few
readable images, no champion), `InfrastructureFailed`, or `Failed`.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.states import Completed

from flawsmith.errors import FlawsmithError, UserError
from flows.artifacts import slug
from flows.run import ask, failed

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
    words = ["--category", category, *(["--out", out] if out else []), "--", folder]
    try:
        answer = ask(Path.cwd(), (NO_DRIFT, DRIFT), "monitor", *words)
    except FlawsmithError as error:
        return failed(error)
    page = drift_page(answer, folder, out or f"artifacts/{category}/monitor")
    create_markdown_artifact(page, f"{slug(category)}-drift", f"{category}: {answer['verdict']}")
    create_table_artifact(answer["statistics"], f"{slug(category)}-drift-statistics", "What the verdict rests on")
    if not answer["drifted"]:
        return Completed(message=answer["reason"])
    emit_event(
        event=EVENT,
        resource={"prefect.resource.id": f"{RESOURCE}{category}", "prefect.resource.name": category},
        payload={**{key: answer[key] for key in ("category", "reason", "statistics")}, "folder": folder},
    )
    return Completed(name="Drift", message=answer["reason"])


def drift_page(answer: Mapping[str, Any], folder: str, results: str) -> str:
    """The verdict as markdown for the run's page, from the content of drift.json."""
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
