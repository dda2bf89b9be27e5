"""The README's own order: a fresh clone, `make repro`, `make up`, `make nightly`; and there is a champion."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from flows.stack import Stack

CATEGORY = "woven_fabric"  # no other test has registered a model of it yet


@pytest.fixture(scope="module")
def checkout(stack: Stack, bare: Any) -> Iterator[Any]:
    """The clone in which the pipeline has run, and then the stack's workers."""
    made = bare.checkout
    params = made.folder / "params.yaml"
    params.write_text(yaml.safe_dump(yaml.safe_load(params.read_text()) | {"categories": [CATEGORY]}, sort_keys=False))
    made.run("git", "commit", "--quiet", "--message", "One category", "params.yaml")
    made.run("python", "-m", "flows.setup", **stack.variables())
    stack.start_worker("gpu", "first", made.folder, gpu="gpu-0")
    stack.start_worker("control", "first-lead", made.folder)
    yield made
    for name in ("first", "first-lead"):
        stack.stop_worker(name)


def history(stack: Stack, checkout: Any) -> Any:
    said = checkout.run("flawsmith", "history", "--category", CATEGORY, "--json", **stack.variables())
    return json.loads(said.stdout)


def test_the_first_night_makes_what_was_there_before_the_champion(stack: Stack, checkout: Any) -> None:
    assert history(stack, checkout)["champion"] is None
    said = checkout.run("python", "-m", "flows.nightly", **stack.variables()).stdout
    assert f"promoted: {CATEGORY}." in said
    assert history(stack, checkout)["champion"] == "1"
    (run_id,) = set(re.findall(r"/flow-run/([0-9a-f-]{36})", said))
    (run,) = stack.api("flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [run_id]}}})
    found = stack.api("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    shown = {item["key"]: item["data"] for item in found}
    did = {row["stage"]: row["DVC"] for row in json.loads(shown["woven-fabric-stages"])}
    learned = {stage: done for stage, done in did.items() if not stage.startswith("demo-data@")}  # `categories` changed
    assert len(learned) == 6
    assert set(learned.values()) == {"unchanged"}, "nothing was stale"
    origin = checkout.run("flawsmith", "lineage", f"{CATEGORY}@champion", **stack.variables()).stdout
    assert "Nothing is missing." in origin
    assert "mlflow.db" in origin, "where the runs of `make repro` are recorded"


def test_a_file_changed_by_hand_is_named(stack: Stack, checkout: Any) -> None:
    verdict = checkout.folder / "artifacts" / CATEGORY / "validate" / "verdict.json"
    content = verdict.read_text()
    verdict.write_text(f"{content} ")
    try:
        chain = checkout.run(
            "flawsmith", "lineage", f"artifacts/{CATEGORY}/export/model.onnx", succeeds=False, **stack.variables()
        )
        assert chain.returncode == 1
        assert f"validate/verdict.json is not what dvc.lock says of `validate@{CATEGORY}`" in chain.stdout
    finally:
        verdict.write_text(content)
