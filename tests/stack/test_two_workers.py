"""A night on two machines: two workers with their own checkouts and one DVC cache retrain two categories at once."""

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from stack_workers import at_work

from flows.stack import Stack

CATEGORIES = ["brushed_metal", "woven_fabric"]


@dataclass(frozen=True)
class Night:
    """What is left when `python -m flows.nightly` has ended."""

    checkouts: list[Any]  # one a worker
    cache: Path
    runs: list[Any]  # the two retrainings
    night: Any  # the run of flow nightly
    said: str
    status: int


@pytest.fixture(scope="module")
def night(stack: Stack, make_checkout: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Night]:
    cache = tmp_path_factory.mktemp("shared") / "cache"
    checkouts = [make_checkout(name, categories=CATEGORIES, cache=cache) for name in ("left", "right")]
    with at_work(stack, *checkouts):
        done = checkouts[0].run("python", "-m", "flows.nightly", succeeds=False, **stack.variables())
        found = re.search(r"/flow-run/([0-9a-f-]{36})", done.stdout)
        assert found, f"{done.stdout}\n{done.stderr}"
        lead = stack.api(f"flow_runs/{found[1]}")
        runs = stack.api("flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [lead["id"]]}}})
        yield Night(checkouts, cache, runs, lead, f"{done.stdout}\n{done.stderr}", done.returncode)


def whole_lock(checkout: Any) -> dict[str, Any]:
    return dict(yaml.safe_load((checkout.folder / "dvc.lock").read_text())["stages"])


def lock(checkout: Any) -> dict[str, Any]:
    """What dvc.lock has of each category's own stages; a retraining brings the demo surfaces' stages up to date too."""
    return {target: stage for target, stage in whole_lock(checkout).items() if not target.startswith("demo-data@")}


def test_the_night_ends_well_and_tells_how_it_went(night: Night) -> None:
    assert night.status == 0, night.said
    assert night.night["state_type"] == "COMPLETED"
    for category in CATEGORIES:
        assert f"nightly {category}: Running" in night.said
    assert sorted(run["parameters"]["category"] for run in night.runs) == CATEGORIES
    assert all(run["state_name"] in ("Completed", "Unchanged") for run in night.runs)


def test_the_night_s_page_has_a_line_a_category(stack: Stack, night: Night) -> None:
    wanted = {"flow_run_id": {"any_": [night.night["id"]]}}
    (page,) = stack.api("artifacts/filter", {"artifacts": wanted})
    for run in night.runs:
        (line,) = (text for text in page["data"].splitlines() if f"`{run['parameters']['category']}`" in text)
        assert run["id"] in line
        assert "promoted" in line or "unchanged" in line
        assert line.split("|")[-3].strip() != "-", "the image AUROC"


def test_the_categories_were_retrained_at_once_by_different_workers(night: Night) -> None:
    first, second = (
        (datetime.fromisoformat(run["start_time"]), datetime.fromisoformat(run["end_time"])) for run in night.runs
    )
    assert max(first[0], second[0]) < min(first[1], second[1]), "one began after the other had ended"
    done = [{target.partition("@")[2] for target in lock(checkout)} for checkout in night.checkouts]
    assert sorted(map(sorted, done)) == [[category] for category in CATEGORIES], "each worker has one, in its own lock"


def test_every_object_of_the_shared_cache_is_what_its_name_says(night: Night) -> None:
    objects = [path for path in (night.cache / "files" / "md5").rglob("*") if path.is_file()]
    assert len(objects) > 50
    for path in objects:
        name = f"{path.parent.name}{path.name}".removesuffix(".dir")
        assert hashlib.md5(path.read_bytes()).hexdigest() == name, path  # noqa: S324 - DVC's own choice
    assert not list(night.cache.rglob("*.tmp"))


def test_both_checkouts_agree_with_their_locks(night: Night) -> None:
    for checkout in night.checkouts:
        targets = sorted(whole_lock(checkout))
        assert len(targets) >= 7
        assert json.loads(checkout.run("dvc", "status", "--json", *targets).stdout) == {}


def test_side_by_side_they_made_what_one_alone_makes(night: Night, bare: Any) -> None:
    found = {name: (checkout, stage) for checkout in night.checkouts for name, stage in whole_lock(checkout).items()}
    # the other surface is no category of `bare`, so that its folder is empty there
    expected = {target: stage for target, stage in whole_lock(bare).items() if target != "demo-data@brushed_metal"}
    assert set(expected) <= set(found)
    for target, stage in expected.items():
        checkout, other = found[target]
        for mine, theirs in zip(stage["outs"], other["outs"], strict=True):
            assert mine["path"] == theirs["path"]
            if mine["md5"] != theirs["md5"]:  # a linear algebra library may round the last digit as it likes
                assert mine["path"].endswith(".json"), mine["path"]
                values = [json.loads((folder / mine["path"]).read_text()) for folder in (bare.folder, checkout.folder)]
                assert alike(*values), mine["path"]


def alike(one: Any, other: Any) -> bool:
    """Whether two JSON values differ in the last digits of their numbers at most."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


def test_a_third_checkout_takes_everything_from_the_cache(night: Night, make_checkout: Callable[..., Any]) -> None:
    """Results made elsewhere are not computed again: git gives the lock and the small files, the cache the rest."""
    third = make_checkout("third", categories=CATEGORIES, cache=night.cache)
    locks: dict[str, Any] = {}
    for checkout in night.checkouts:
        locks |= whole_lock(checkout)
        for path in checkout.run("git", "ls-files", "--others", "--exclude-standard", "artifacts").stdout.split():
            (third.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (third.folder / path).write_bytes((checkout.folder / path).read_bytes())
    (third.folder / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": locks}, sort_keys=False))
    third.run("dvc", "checkout")
    started = time.monotonic()
    assert not third.ran(third.run("dvc", "repro"))
    assert time.monotonic() - started < 120
