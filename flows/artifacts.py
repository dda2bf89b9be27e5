"""What a run leaves on its page: tables, the gate's report, pictures. Text is made by pure functions."""

import base64
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from flawsmith.dvc import StageOutcome

LONGEST_SIDE = 1200  # pixels of a picture on a page
MOST_BYTES = 300_000  # of a picture; it lies in the server's database, as text
OUTCOME = "outcome"  # key of the artifact that a retraining leaves and `nightly` reads
ENDINGS = {  # names of a retraining's state, in words for the night's table; every other one is `failed`
    "Completed": "promoted",
    "Kept": "kept",
    "Unchanged": "unchanged",
    "CategoryBusy": "skipped",
    "Refused": "refused",
    "QualityGateFailed": "gate failed",
}


def slug(text: str) -> str:
    """Text as Prefect wants a key: lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def stage_rows(outcomes: Sequence[StageOutcome]) -> list[dict[str, Any]]:
    """A row a stage: what DVC did and how long it took."""
    return [{"stage": item.target, "DVC": item.did, "seconds": round(item.seconds, 1)} for item in outcomes]


def metric_rows(summary: Path) -> list[dict[str, Any]]:
    """A row a metric, a column a method, from the small JSON files of `evaluate/summary`."""
    methods = {path.stem: json.loads(path.read_text()) for path in sorted(summary.glob("*.json"))}
    names = dict.fromkeys(name for values in methods.values() for name in values)
    return [{"metric": name, **{method: values.get(name) for method, values in methods.items()}} for name in names]


def check_rows(promotion: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a check of the promotion, failures first."""
    rows = [
        {
            "check": check["name"],
            "passed": "yes" if check["passed"] else "NO",
            "value": check.get("value"),
            "bound": check.get("bound"),
            "detail": check.get("detail", ""),
        }
        for check in promotion.get("checks", [])
    ]
    return sorted(rows, key=lambda row: str(row["passed"]))  # "NO" sorts before "yes"


def ending(promotion: Mapping[str, Any]) -> tuple[str, str]:
    """How a retraining ended, by what `flawsmith promote --json` said: a key of ENDINGS, and a sentence.

    Where there is a champion, a model that does not stand against it, or does not keep the floors, leaves it in use:
    `Kept`. `Refused` needs a person: no model is in use, or a proof of the new one (lineage, gate, parity) is missing.
    """
    version, champion = promotion["version"], promotion.get("previous_champion")
    reason = promotion.get("reason") or ""
    if promotion["outcome"] == "promoted":
        return "Completed", f"Version {version} is champion now. {reason}"
    if promotion["outcome"] == "unchanged":
        return "Unchanged", reason
    failed = [check for check in promotion.get("checks", []) if not check["passed"]]
    named = f"version {version} does not pass {', '.join(check['name'] for check in failed)}: {reason}"
    stays = f"Version {champion} stays champion" if champion else "There is no champion"
    sound = champion and not any(check.get("proof") for check in failed)
    return "Kept" if sound else "Refused", f"{stays}; {named}"


def gate_report(
    category: str, verdict: Mapping[str, Any], docs: str, run: str | None = None, picture: str | None = None
) -> str:
    """The gate's refusal as markdown: which demands, how many triplets, the worst of them.

    Args:
        category: whose triplets they are.
        verdict: the content of verdict.json.
        docs: where the Data Docs lie.
        run: address of the MLflow run, if known.
        picture: the contact sheet of the worst triplets as a data URI, if there is one.
    """
    failed = [item for item in verdict["expectations"] if not item["passed"]]
    lines = [
        f"# The quality gate stopped `{category}`",
        f"{verdict['triplets']} triplets were judged; nothing was trained on them, and the champion stays.",
        "",
        "| expectation | severity | observed | demanded | triplets that fail | worst of them |",
        "|---|---|---|---|---|---|",
        *(
            f"| **{item['name']}**: {item['meaning']} | {item['severity']} | {_observed(item['observed'])} "
            f"| {_demanded(item)} | {item['failing']} of {verdict['triplets']} "
            f"| {', '.join(f'`{name}`' for name in item['failing_ids'][:5]) or '-'} |"
            for item in failed
        ),
        "",
        f"- Data Docs: `{docs}`",
        f"- MLflow run: {f'[{run}]({run})' if run else 'not recorded'}",
        f"- One triplet drawn step by step: `flawsmith explain TRIPLET_ID --category {category}`",
    ]
    if picture:
        lines += ["", f"![the worst triplets]({picture})"]
    return "\n".join(lines) + "\n"


def _observed(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(f"{number:.6g}" for number in value)
    return "-" if value is None else f"{value:.6g}"


def _demanded(item: Mapping[str, Any]) -> str:
    low, high = item["bounds"]
    text = "true of each"
    if low is not None or high is not None:
        text = f"at most {high:g}" if low is None else f"at least {low:g}" if high is None else f"{low:g} to {high:g}"
    share = item.get("mostly", 1.0)
    return text if share >= 1 else f"{text}, for {share:.0%} of them"


def nightly_report(rows: Sequence[Mapping[str, Any]]) -> str:
    """The night in one table, a line a category."""
    lines = ["| category | outcome | why | image AUROC | run |", "|---|---|---|---|---|"]
    for row in rows:
        auroc = row.get("image_auroc")
        shown = f"{auroc:.4f}" if isinstance(auroc, float) else "-"
        run = f"[{row['run']}]({row['link']})" if row.get("link") else row.get("run") or "-"
        why = " ".join(str(row.get("why") or "-").split()).replace("|", "\\|")
        lines.append(f"| `{row['category']}` | {row['outcome']} | {why} | {shown} | {run} |")
    return "\n".join(lines) + "\n"


def data_uri(path: Path) -> str:
    """A picture as a data URI, small enough for a page: scaled down, then JPEG of falling quality."""
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    content = b""
    for quality in (85, 70, 50, 30):
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality)
        content = stream.getvalue()
        if len(content) <= MOST_BYTES:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"


def mlflow_run(experiment: str, stage: str, flow_run: str) -> str | None:
    """The page of the newest MLflow run of a stage that this flow run started; None if no server can tell.

    Asked over HTTP, since importing MLflow takes longer than all else that a flow does for itself.
    """
    server = os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/")
    if not server.startswith(("http://", "https://")):
        return None
    wanted = f"tags.`flawsmith.stage` = '{stage}' AND tags.`flawsmith.flow_run` = '{flow_run}'"
    try:
        with httpx.Client(base_url=f"{server}/api/2.0/mlflow/") as client:
            answer = client.get("experiments/get-by-name", params={"experiment_name": experiment})
            found = answer.raise_for_status().json()["experiment"]["experiment_id"]
            search = {"experiment_ids": [found], "filter": wanted, "max_results": 1,
                      "order_by": ["attributes.start_time DESC"]}  # fmt: skip
            answer = client.post("runs/search", json=search)
            run = answer.raise_for_status().json()["runs"][0]["info"]["run_id"]
    except (httpx.HTTPError, ValueError, KeyError, IndexError):
        return None
    return f"{server}/#/experiments/{found}/runs/{run}"
