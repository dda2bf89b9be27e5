"""Promotion, refusal, rollback and a race of two processes, on the stack's own MLflow server and database."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from stack_workers import load_module

from flawsmith.registry.history import history
from flawsmith.registry.registration import register
from flawsmith.stages.promote import run as promote
from flows.stack import Stack

PLANTS = Path(__file__).parents[1] / "registry" / "plants.py"


@pytest.fixture(scope="module")
def plant(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", stack.variables()["MLFLOW_TRACKING_URI"])
        plant = load_module("plants", PLANTS).Plant(tmp_path_factory.mktemp("plant"))
        params = plant.layout.root / "params.yaml"
        content = yaml.safe_load(params.read_text()) | {"categories": ["plate"]}
        params.write_text(yaml.safe_dump(content))
        plant.train()
        yield plant


def cli(plant: Any, stack: Stack, *words: str) -> "subprocess.Popen[str]":
    command = [str(Path(sys.executable).with_name("flawsmith")), *words, "--json"]
    environment = stack.environment()
    return subprocess.Popen(
        command, cwd=plant.layout.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_champion_is_made_defended_and_rolled_back(plant: Any, stack: Stack) -> None:
    assert register(plant.layout).version == "1"
    assert promote(plant.layout).outcome == "promoted"

    plant.train(noise=0.25)  # worse
    register(plant.layout)
    refused = cli(plant, stack, "promote")
    out, errors = refused.communicate()
    assert refused.returncode == 1, errors
    answer = json.loads(out)
    assert (answer["outcome"], answer["version"], answer["previous_champion"]) == ("refused", "2", "1")
    assert plant.registry.champion() == "1"

    plant.train(gain=2.0)  # as good
    register(plant.layout)
    assert promote(plant.layout).outcome == "promoted"
    assert plant.registry.champion() == "3"

    back = cli(plant, stack, "rollback", "--reason", "alarms at every part")
    out, errors = back.communicate()
    assert back.returncode == 0, errors
    assert json.loads(out)["version"] == "1"
    assert plant.registry.champion() == "1"
    kinds = [(entry["kind"], entry["version"]) for entry in history(plant.layout)["trail"]]
    assert kinds == [("promotion", "1"), ("refusal", "2"), ("promotion", "3"), ("rollback", "1")]


def test_two_processes_that_promote_at_once_leave_one_champion_and_no_silent_loser(plant: Any, stack: Stack) -> None:
    for gain in (4.0, 5.0):
        plant.train(gain=gain)
        register(plant.layout)
    versions = [version.number for version in plant.registry.versions()[-2:]]
    running = [cli(plant, stack, "promote", "--version", version) for version in versions]
    ended = [(process, *process.communicate()) for process in running]
    found = history(plant.layout)
    winners = [entry for entry in found["trail"] if entry["kind"] == "promotion" and not entry["lost"]]
    assert found["champion"] == winners[-1]["version"]
    assert found["notes"] == []
    for version, (process, out, errors) in zip(versions, ended, strict=True):
        won = any(entry["version"] == version for entry in winners)
        if process.returncode == 0:
            assert json.loads(out)["outcome"] == "promoted"
            assert won
        else:
            assert "somebody else" in errors or "overtaken" in errors or "being carried out" in errors
