"""The README's own order: a fresh clone, `make repro`, `make up`, `make nightly`; and there is a champion."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from stack_workers import at_work

from flows.stack import Stack

CATEGORY = "woven_fabric"  # no other test has registered a model of it yet


@pytest.fixture(scope="module")
def checkout(stack: Stack, bare: Any) -> Iterator[Any]:
    """The clone in which the pipeline has run, and then the stack's workers."""
    with at_work(stack, bare):
        yield bare


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
    assert set(did.values()) == {"unchanged"}, "nothing was stale"
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
