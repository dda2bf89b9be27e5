"""Registering, promoting and rolling back in a real MLflow store."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plants import PARAMS, SIDE, Plant, onnx_model

from flawsmith.config import load_settings
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.files import digest_file, digest_path, write_json
from flawsmith.layout import Layout
from flawsmith.lineage import read_lineage, render_lineage
from flawsmith.registry import package, promotion
from flawsmith.registry.history import describe_origin, history
from flawsmith.registry.promotion import fetch_champion, rollback
from flawsmith.registry.registration import register
from flawsmith.registry.store import Registry
from flawsmith.stages.promote import run as promote
from flawsmith.tracking import stage_run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of MLflow's own dependencies


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initialised SQLite store: creating its tables takes seconds, copying it does not."""
    root = tmp_path_factory.mktemp("store")
    with stage_run(Layout(load_settings(PARAMS), "other", root), "nothing", {}):
        pass
    return root / "mlflow.db"


@pytest.fixture
def new_plant(tmp_path: Path, empty_store: Path) -> Callable[..., Plant]:
    def build(**options: Any) -> Plant:
        plant = Plant(tmp_path / "plant", **options)
        shutil.copyfile(empty_store, plant.layout.root / "mlflow.db")
        plant.train()
        return plant

    return build


@pytest.fixture(autouse=True)
def unchanged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`dvc status` costs seconds: where no test changes a file by hand, none was changed."""
    for name in ("DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "no-config"))
    if "real_dvc" not in request.fixturenames:
        monkeypatch.setattr("flawsmith.dvc.changed", lambda root, targets: {})


@pytest.fixture
def real_dvc() -> None:
    """Ask for it to have DVC itself asked."""


@pytest.fixture
def plant(new_plant: Callable[..., Plant]) -> Plant:
    return new_plant()


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Plant:
    """A plant whose first model is champion, by a flow; its tests change nothing."""
    plant = Plant(tmp_path_factory.mktemp("first") / "plant")
    shutil.copyfile(empty_store, plant.layout.root / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flawsmith.dvc.changed", lambda root, targets: {})
        patch.setenv("FLAWSMITH_FLOW_RUN", "11112222-3333")
        patch.setenv("FLAWSMITH_ACTOR", "prefect flow run calm-otter")
        plant.train()
        with pytest.raises(UserError, match="has no champion"):
            rollback(plant.layout, reason="x")
        with pytest.raises(UserError, match="has no champion"), fetch_champion(plant.layout):
            pass
        made = register(plant.layout)
        assert (made.model, made.version, made.created) == ("flawsmith-plate", "1", True)
        done = promote(plant.layout, reason="first light")
        assert (done.outcome, done.version, done.previous_champion, done.labelled) == ("promoted", "1", "", True)
        assert not [check.name for check in done.checks if "difference" in check.name], "the floors alone bind it"
    return plant


def test_the_tags_of_a_version_say_what_speaks_for_it(first: Plant) -> None:
    tags = first.registry.version("1").tags
    assert tags["flawsmith.model_digest"] == digest_file(first.layout.stage("export") / "model.onnx")
    assert tags["flawsmith.lineage"] == "complete"
    assert tags["flawsmith.gate"].startswith("passed; 6 triplets")
    assert tags["flawsmith.parity"] == "proven"
    (entry,) = history(first.layout)["trail"]
    assert entry["reason"].startswith("first light First model: image AUROC 1.000")
    assert entry["done"]
    assert tags["flawsmith.promoted_at"] == entry["at"]
    assert tags["flawsmith.previous_champion"] == ""


def test_the_same_again_adds_nothing(first: Plant) -> None:
    again = register(first.layout)
    assert (again.version, again.created) == ("1", False)
    assert len(first.registry.versions()) == 1
    assert promote(first.layout).outcome == "unchanged"
    with pytest.raises(UserError, match="had no champion before version 1"):
        rollback(first.layout, reason="x")
    with pytest.raises(UserError, match="has no version 7"):
        rollback(first.layout, reason="x", to="7")


def test_the_runs_record_the_data_that_decided(first: Plant) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(first.registry.uri)
    experiment = client.get_experiment_by_name("flawsmith/plate")
    (run,) = client.search_runs([experiment.experiment_id], "tags.`flawsmith.stage` = 'promote'")
    assert run.data.params["data.image_size"] == str(SIDE)
    for name in ("train", "test", "ground_truth"):
        assert run.data.params[f"images.{name}"] == digest_path(first.layout.root / "data" / "plate" / name)


def test_the_champion_can_be_fetched_and_mlflows_own_choice_of_a_store_is_left(first: Plant) -> None:
    import mlflow

    before = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_") and "URI" in name}
    with fetch_champion(first.layout) as champion:
        assert (champion.model, champion.version) == ("flawsmith-plate", "1")
        assert (champion.folder / "model.onnx").is_file()
        scores = json.loads((champion.folder / "health" / "scores.json").read_text())
    assert max(score for name, score in scores.items() if name.startswith("normal")) < 0.62
    assert min(score for name, score in scores.items() if name.startswith("defect")) > 0.62
    assert {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_") and "URI" in name} == before
    assert first.registry.uri not in (mlflow.get_tracking_uri(), mlflow.get_registry_uri())


def test_the_origin_of_a_version_names_its_runs_and_what_is_missing(first: Plant) -> None:
    origin = describe_origin(first.layout, "champion")
    assert "flawsmith-plate version 1 (champion)" in origin.text
    assert "by prefect flow run calm-otter, Prefect run 11112222-3333" in origin.text
    assert "<- synthesize (plate)" in origin.text
    assert "source data" in origin.text
    assert any("git revision" in item for item in origin.missing), "this plant keeps no git"


def test_of_two_registrations_at_once_one_version_stays(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    real, others = Registry.add_version, []

    def after_another(self: Registry, *arguments: Any) -> Any:
        if not others:
            others.append(None)
            others.append(register(plant.layout))  # it saw no version either, and is quicker
        return real(self, *arguments)

    monkeypatch.setattr(Registry, "add_version", after_another)
    ours, theirs = register(plant.layout), others[1]
    assert (theirs.version, theirs.created) == ("1", True)
    assert (ours.version, ours.created) == ("1", False)
    assert [version.number for version in plant.registry.versions()] == ["1"]


def test_outputs_that_change_while_they_are_registered_make_no_version(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = package.build_content

    def then_trained_again(*arguments: Any) -> None:
        real(*arguments)
        onnx_model(3.0, 0.0, plant.layout.stage("export") / "model.onnx")

    monkeypatch.setattr(package, "build_content", then_trained_again)
    with pytest.raises(UserError, match="have changed while they were registered"):
        register(plant.layout)
    assert plant.registry.versions() == ()


def test_a_dry_run_changes_nothing(plant: Plant) -> None:
    planned = register(plant.layout, dry_run=True)
    assert (planned.version, planned.created, planned.dry_run) == ("1", True, True)
    assert plant.registry.versions() == ()
    register(plant.layout)
    decided = promote(plant.layout, dry_run=True)
    assert (decided.outcome, decided.dry_run) == ("promoted", True)
    assert plant.registry.champion() == ""
    assert plant.trail() == []


def test_a_first_model_below_the_floor_is_refused(plant: Plant) -> None:
    plant.train(gain=-1.0)  # sees the dark side: normals score higher than defects
    register(plant.layout)
    done = promote(plant.layout)
    assert done.outcome == "refused"
    assert "below the floor" in done.reason
    assert plant.registry.champion() == ""
    assert plant.trail() == [("refusal", "1", False)]


def test_a_worse_challenger_is_refused_with_its_figures_and_the_champion_stays(plant: Plant) -> None:
    register(plant.layout)
    promote(plant.layout)
    plant.train(noise=0.25)
    register(plant.layout)
    done = promote(plant.with_settings(min_image_auroc=0.0, min_aupro=0.0))
    assert (done.outcome, done.version, done.previous_champion) == ("refused", "2", "1")
    failed = {check.name: check for check in done.checks if not check.passed}
    assert failed["image_auroc_difference"].value is not None
    assert failed["image_auroc_difference"].value < -0.02
    assert plant.registry.champion() == "1"
    assert plant.registry.version("2").tags["flawsmith.last_decision"].startswith("refused: ")


def test_an_equal_challenger_on_other_bytes_is_promoted_and_rolled_back_and_barred(plant: Plant) -> None:
    register(plant.layout)
    promote(plant.layout)
    plant.train(gain=2.0)  # the same ranking from another file
    register(plant.layout)
    assert promote(plant.layout).outcome == "promoted"
    assert plant.registry.champion() == "2"

    done = rollback(plant.layout, reason="floods the line with alarms")
    assert (done.outcome, done.version, done.previous_champion) == ("rolled-back", "1", "2")
    assert plant.registry.champion() == "1"
    again = promote(plant.layout)  # what the next nightly does
    assert again.outcome == "refused"
    assert "was rolled back (floods the line with alarms)" in again.reason
    assert promote(plant.layout, readmit=True, reason="lamp was broken").outcome == "promoted"
    assert plant.trail() == [
        ("promotion", "1", False), ("promotion", "2", False), ("rollback", "1", False), ("refusal", "2", False),
        ("promotion", "2", False),
    ]  # fmt: skip


def test_a_model_without_its_proofs_is_refused(plant: Plant) -> None:
    plant.train(gate=False, flips=1)
    register(plant.layout)
    done = promote(plant.layout)
    assert done.outcome == "refused"
    assert "the quality gate failed: triplet_count" in done.reason
    assert "torch and ONNX disagree" in done.reason


def test_a_verdict_on_other_triplets_is_no_proof(plant: Plant) -> None:
    verdict = plant.layout.stage("validate") / "verdict.json"
    write_json(verdict, json.loads(verdict.read_text()) | {"triplets": 7})  # validated again, not distilled again
    register(plant.layout)
    done = promote(plant.layout)
    assert done.outcome == "refused"
    assert "not the one that the model was trained under" in done.reason


def test_of_two_promotions_at_once_one_wins_and_the_other_says_so(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(plant.layout)
    promote(plant.layout)
    for gain in (2.0, 3.0):
        plant.train(gain=gain)
        register(plant.layout)
    both = threading.Barrier(2)  # both have judged before either writes
    real: Callable[..., int] = promotion._change_champion

    def together(registry: Registry, entry: Any) -> int:
        both.wait(60)
        return real(registry, entry)

    monkeypatch.setattr(promotion, "_change_champion", together)
    said: dict[str, Any] = {}

    def attempt(version: str) -> None:
        try:
            said[version] = promote(plant.layout, version=version)
        except FlawsmithError as error:
            said[version] = error

    threads = [threading.Thread(target=attempt, args=(version,)) for version in ("2", "3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    losers = [version for version, outcome in said.items() if isinstance(outcome, FlawsmithError)]
    assert len(losers) == 1
    (winner,) = {"2", "3"} - set(losers)
    assert plant.registry.champion() == winner
    assert "was changed by somebody else while version" in str(said[losers[0]])
    assert sorted(lost for _, _, lost in plant.trail()) == [False, False, True]


def test_a_promotion_that_died_before_the_alias_moved_is_waited_for_and_then_passed_over(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(plant.layout)

    def dies(registry: Registry, version: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "move_alias", dies)
        with pytest.raises(KeyboardInterrupt):
            promote(plant.layout)
    assert plant.registry.champion() == ""
    assert "was never finished" in history(plant.layout)["notes"][0]
    with pytest.raises(FlawsmithError, match="is being carried out"):
        promote(plant.layout)
    monkeypatch.setattr(promotion, "IN_PROGRESS", promotion.timedelta(seconds=0))
    time.sleep(1.1)
    assert promote(plant.layout).outcome == "promoted"
    assert plant.registry.champion() == "1"


def test_an_alias_moved_by_hand_is_told(plant: Plant) -> None:
    register(plant.layout)
    promote(plant.layout)
    plant.train(gain=2.0)
    register(plant.layout)
    plant.registry.move_alias("2")
    (note,) = history(plant.layout)["notes"]
    assert "moved by hand" in note


def test_a_model_that_scores_otherwise_than_when_registered_never_becomes_champion(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(plant.layout)
    real = package.check_health

    def damaged(folder: Path, predictor: Any, tolerance: float) -> float:
        scores = json.loads((folder / "scores.json").read_text())
        scores[next(iter(scores))] += 1.0
        (folder / "scores.json").write_text(json.dumps(scores))
        return real(folder, predictor, tolerance)

    monkeypatch.setattr(package, "check_health", damaged)
    with pytest.raises(FlawsmithError, match="does not score its 8 known images"):
        promote(plant.layout)
    assert plant.registry.champion() == ""
    assert plant.trail() == []


def test_a_file_changed_in_the_artifact_store_is_found_out(plant: Plant) -> None:
    register(plant.layout)
    (stored,) = plant.layout.root.glob("mlruns/**/artifacts/artifacts/model.onnx")
    onnx_model(1.5, 0.0, stored)
    with pytest.raises(FlawsmithError, match="not the file that was registered"):
        promote(plant.layout)


def test_without_labels_held_out_triplets_decide_and_the_answer_says_so(new_plant: Callable[..., Plant]) -> None:
    plant = new_plant(labelled=False)
    register(plant.layout)
    done = promote(plant.layout)
    assert (done.outcome, done.labelled) == ("promoted", False)
    assert "no labelled test set" in done.reason


# --- a pipeline that DVC ran before there was this store


@pytest.fixture
def early(plant: Plant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, empty_store: Path, real_dvc: None) -> Plant:
    """A plant as after `make repro` and `make up`: its runs are in its own store, and another one is in use."""
    command = [sys.executable, "-m", "dvc", "commit", "--quiet", "--force"]  # into its cache
    subprocess.run(command, cwd=plant.layout.root, check=True, capture_output=True, timeout=300)
    shutil.copyfile(empty_store, tmp_path / "server.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'server.db'}")
    return plant


def test_what_ran_before_the_servers_were_there_becomes_champion(early: Plant) -> None:
    assert register(early.layout).tags["flawsmith.lineage"] == "complete"
    done = promote(early.layout)
    assert done.outcome == "promoted", done.reason
    origin = describe_origin(early.layout, "champion")
    assert "<- validate (plate)" in origin.text
    assert f"in sqlite:///{early.layout.root / 'mlflow.db'}" in origin.text, "the store that its runs are recorded in"
    (early.layout.root / "mlflow.db").unlink()
    chain = read_lineage(early.layout.root, early.layout.settings, early.layout.stage("export") / "model.onnx")
    assert chain.complete
    assert "no run recorded here" in render_lineage(chain)


def test_a_model_behind_which_a_file_was_changed_is_refused_until_it_is_as_it_was(early: Plant) -> None:
    layout = early.layout
    verdict = layout.stage("validate") / "verdict.json"
    content = verdict.read_bytes()
    verdict.unlink()  # DVC links its cache, or shares blocks with it
    verdict.write_bytes(content + b" ")
    register(layout)
    done = promote(layout)
    assert done.outcome == "refused"
    assert "validate/verdict.json is not what dvc.lock says of `validate@plate`" in done.reason
    assert "run `dvc repro export@plate` and register again" in done.reason
    verdict.write_bytes(content)
    assert register(layout).created
    assert promote(layout).outcome == "promoted"


def test_a_content_whose_origin_was_not_proven_is_registered_again_once_it_is(early: Plant) -> None:
    """Else a plant that was refused before its lineage could be proven would be refused for ever."""
    lock = early.layout.root / "dvc.lock"
    content = lock.read_text()
    lock.unlink()
    assert register(early.layout).tags["flawsmith.lineage"].startswith("not proven: artifacts/plate/export/model.onnx")
    done = promote(early.layout)
    assert done.outcome == "refused"
    assert (
        "the origin of artifacts/plate/export/model.onnx is not recorded: run `dvc repro` and register" in done.reason
    )
    lock.write_text(content)
    assert [register(early.layout).version for _ in range(2)] == ["2", "2"]
    assert promote(early.layout).outcome == "promoted"
