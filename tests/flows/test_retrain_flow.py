"""How a retraining ends when something is wrong: a real flow run, a real DVC, a real server."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State
from prefect.concurrency.sync import concurrency

from flows import retrain as module
from flows.retrain import retrain

EXPECTATION = {
    "name": "visible_share", "meaning": "most of the mask has visibly changed", "severity": "critical",
    "passed": False, "bounds": [0.5, None], "mostly": 0.9, "observed": [0.1, 0.8], "failing": 3,
    "failing_ids": ["fit-00001", "fit-00002", "fit-00003"],
}  # fmt: skip
REFUSES = "cp -r ../report artifacts/steel/validate; echo 'flawsmith: 3 of 8 triplets are no good' >&2; exit 1\n"


@pytest.fixture(autouse=True)
def limits(prefect_server: None) -> None:
    """What set-up makes, for one category and one GPU."""

    async def make() -> None:
        async with get_client() as client:
            for name in ("category-steel", "gpu-0"):
                await client.upsert_global_concurrency_limit_by_name(name, 1)

    asyncio.run(make())


def run(**parameters: Any) -> State[Any]:
    return retrain("steel", retry_seconds=0.01, return_state=True, **parameters)


def run_id(state: State[Any]) -> UUID:
    assert state.state_details.flow_run_id is not None
    return state.state_details.flow_run_id


def artifacts(state: State[Any]) -> dict[str, Any]:
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id(state)]))
        )
    return {item.key or "": item.data for item in found}


def tries(state: State[Any]) -> dict[str, int]:
    """How often each step of the run was started."""
    with get_client(sync_client=True) as client:
        found = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id(state)])))
    return {item.name: item.run_count for item in found}


def test_the_gate_s_refusal_has_its_own_name_a_report_and_no_second_try(project: Path) -> None:
    report = project.parent / "report"
    report.mkdir()
    verdict = {"passed": False, "severity": "critical", "triplets": 8, "expectations": [EXPECTATION]}
    (report / "verdict.json").write_text(json.dumps(verdict))
    Image.new("RGB", (64, 64), "red").save(report / "worst.png")
    (project / "validate.sh").write_text(REFUSES)
    state = run(retries=2)
    assert state.name == "QualityGateFailed"
    assert state.is_failed()
    assert "3 of 8 triplets are no good" in (state.message or "")
    assert tries(state)["validate@steel"] == 1
    made = artifacts(state)
    text = made["steel-quality-gate"]
    for words in ("visible_share", "0.1 to 0.8", "at least 0.5, for 90% of them", "3 of 8", "fit-00002", "docs"):
        assert words in text
    assert "data:image/jpeg;base64," in text
    assert made["steel-worst-triplets"].startswith("data:image/jpeg;base64,")
    assert [row["stage"] for row in json.loads(made["steel-stages"])] == ["ddpm-train@steel"]


def test_a_page_that_cannot_be_made_does_not_hide_why_the_run_ended(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = project.parent / "report"
    report.mkdir()
    (report / "verdict.json").write_text(json.dumps({"passed": False, "severity": "critical", "triplets": 8,
                                                     "expectations": [EXPECTATION]}))  # fmt: skip
    (project / "validate.sh").write_text(REFUSES)
    for name in ("create_table_artifact", "create_markdown_artifact"):
        monkeypatch.setattr(module, name, fail)
    state = run(retries=0)
    assert (state.name, state.is_failed()) == ("QualityGateFailed", True)
    assert "3 of 8 triplets are no good" in (state.message or "")


def fail(*_arguments: Any) -> None:
    raise RuntimeError("the server is away")


def test_trouble_with_the_machine_is_tried_again(project: Path) -> None:
    learn = (project / "learn.sh").read_text()
    (project / "learn.sh").write_text("[ -e ../once ] || { touch ../once; kill -9 $$; }\n" + learn)
    state = run(retries=1)
    assert tries(state)["ddpm-train@steel"] == 2
    # both stages are done; only then is there no model to register
    assert len(json.loads(artifacts(state)["steel-stages"])) == 2
    assert state.name == "BadInput"
    assert "register" in (state.message or "")


def test_trouble_that_stays_ends_the_run_by_name(project: Path) -> None:
    (project / "learn.sh").write_text("exit 137\n")
    state = run(retries=1)
    assert state.name == "InfrastructureFailed"
    assert tries(state)["ddpm-train@steel"] == 2


def test_bad_input_is_not_tried_again(project: Path) -> None:
    (project / "learn.sh").write_text("echo 'flawsmith: data/steel holds no images' >&2; exit 2\n")
    state = run(retries=2)
    assert state.name == "BadInput"
    assert "data/steel holds no images" in (state.message or "")
    assert tries(state)["ddpm-train@steel"] == 1


def test_an_unknown_category_is_bad_input(project: Path) -> None:
    state = retrain("rust", return_state=True)
    assert state.name == "BadInput"
    assert "`rust` is no category" in (state.message or "")


def test_a_category_that_is_at_work_is_not_retrained_twice(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUSY_SECONDS", 0.5)
    with concurrency("category-steel", strict=True):
        state = run()
    assert state.name == "CategoryBusy"
    assert not tries(state)


@pytest.mark.parametrize("limit", ["category-steel", "gpu-0"])
def test_a_missing_limit_is_no_free_pass(project: Path, limit: str) -> None:
    async def remove() -> None:
        async with get_client() as client:
            await client.delete_global_concurrency_limit_by_name(limit)

    asyncio.run(remove())
    state = run(retries=2)
    assert state.name == "NotSetUp"
    assert limit in (state.message or "")
    assert "flows.setup" in (state.message or "")
    assert not (project / "artifacts" / "steel" / "ddpm-train").exists()


def test_a_run_that_crashed_too_often_gives_up(project: Path) -> None:
    state = run(attempt=4, max_attempts=3)
    assert state.name == "GaveUp"
    assert not tries(state)


def test_importing_the_flow_imports_neither_torch_nor_mlflow() -> None:
    """They cost seconds at each start, and the overhead of the flow is bounded."""
    code = "import sys, flows.retrain; print([name for name in ('torch', 'mlflow', 'dvc') if name in sys.modules])"
    root = Path(module.__file__).parents[1]
    said = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
