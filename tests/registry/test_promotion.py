"""Registering, promoting and rolling back in a real MLflow store, with tiny models whose answers are known."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper

from flawsmith.data.images import write_png
from flawsmith.data.triplets import TripletFolder
from flawsmith.dvc import content_digest
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.files import digest_file, digest_path, write_json
from flawsmith.inference.metadata import ModelMetadata
from flawsmith.layout import Layout
from flawsmith.lineage import read_lineage, render_lineage
from flawsmith.monitoring.reference import load_reference
from flawsmith.registry import package, promotion
from flawsmith.registry.history import describe_origin, history
from flawsmith.registry.promotion import fetch_champion, rollback
from flawsmith.registry.registration import register
from flawsmith.registry.store import Registry
from flawsmith.settings import load_settings
from flawsmith.stages.promote import run as promote
from flawsmith.tracking import stage_run

SIDE = 64
MADE = "artifacts/plate"
STAGES = {  # what each reads and leaves
    "synthesize": (["data/plate/train", "code.py"], [f"{MADE}/synthesize"]),
    "validate": ([f"{MADE}/synthesize"], [f"{MADE}/validate/docs", f"{MADE}/validate/verdict.json"]),
    "evaluate": (
        [f"{MADE}/synthesize", "data/plate"],
        [f"{MADE}/evaluate/metrics.json", f"{MADE}/evaluate/report.html"],
    ),
    "export": (
        [f"{MADE}/synthesize", f"{MADE}/validate/verdict.json", f"{MADE}/evaluate/metrics.json"],
        [f"{MADE}/export/model.onnx", f"{MADE}/export/parity.json"],
    ),
}
PARAMS = Path(__file__).parents[2] / "params.yaml"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of MLflow's own dependencies


def onnx_model(gain: float, noise: float, path: Path) -> None:
    """Map = gain * brightness + noise * an image-dependent wave; score = its largest value."""
    constants = {
        "channel": np.array([1]), "all": np.array([1, 2, 3]), "gain": np.array(gain, np.float32),
        "noise": np.array(noise, np.float32), "fast": np.array(5000, np.float32),
    }  # fmt: skip
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["image", "channel"], ["brightness"], keepdims=1),
            helper.make_node("Mul", ["brightness", "gain"], ["signal"]),
            helper.make_node("ReduceMean", ["image", "all"], ["level"], keepdims=1),
            helper.make_node("Mul", ["level", "fast"], ["phase"]),
            helper.make_node("Sin", ["phase"], ["wave"]),
            helper.make_node("Mul", ["wave", "noise"], ["disturbance"]),
            helper.make_node("Add", ["signal", "disturbance"], ["anomaly_map"]),
            helper.make_node("ReduceMax", ["anomaly_map", "all"], ["score"], keepdims=0),
        ],
        "known",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])],
        [
            helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, ["batch", 1, SIDE, SIDE]),
            helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch"]),
        ],
        initializer=[numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    metadata = ModelMetadata("plate", 0.62 * gain + noise, 0.62, 0.05, SIDE, 0.0, 1.0, "ab" * 32, "none", "0.1.0")
    helper.set_model_props(model, metadata.to_properties())
    path.write_bytes(model.SerializeToString())


def draw(generator: np.random.Generator, spots: int = 0) -> tuple[Any, Any]:
    """A gray plate with noise, and bright spots as defects: image (3, S, S) and mask (S, S)."""
    image = 0.4 + 0.02 * generator.standard_normal((SIDE, SIDE))
    mask = np.zeros((SIDE, SIDE), np.bool_)
    for _ in range(spots):
        row, column = generator.integers(4, SIDE - 8, 2)
        mask[row : row + 4, column : column + 4] = True
    image = np.where(mask, image + 0.35, image)
    return np.repeat(np.clip(image, 0, 1)[None], 3, axis=0).astype(np.float32), mask


class Plant:
    """A project whose stages have run, as far as the registry can see."""

    def __init__(self, root: Path, labelled: bool = True, **promote: Any) -> None:
        root.mkdir(parents=True, exist_ok=True)
        content = yaml.safe_load(PARAMS.read_text())
        content["data"]["image_size"] = SIDE
        content["ddpm-train"]["crop"], content["synthesize"]["windows"] = 64, [64]
        content["promote"].update({"bootstrap": 200, "latency_runs": 3, "max_latency_ratio": 100.0, **promote})
        (root / "params.yaml").write_text(yaml.safe_dump(content))
        (root / "code.py").write_text("code = 1\n")
        matrix = {"matrix": {"category": ["plate"]}, "cmd": "true"}
        stages = {name: matrix | {"deps": reads, "outs": leaves} for name, (reads, leaves) in STAGES.items()}
        (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
        (root / ".dvc").mkdir()
        (root / ".dvc" / "config").write_text("[core]\n    no_scm = True\n")
        self.layout = Layout(load_settings(root / "params.yaml"), "plate", root)
        generator, data = np.random.default_rng(0), root / "data" / "plate"
        for index in range(20):
            write_png(data / "train" / "good" / f"{index:03}.png", draw(generator)[0])
        if labelled:
            for index in range(12):
                write_png(data / "test" / "good" / f"{index:03}.png", draw(generator)[0])
                image, mask = draw(generator, spots=1 + index % 2)
                kind = "pit" if index % 2 else "scratch"
                write_png(data / "test" / kind / f"{index:03}.png", image)
                write_png(data / "ground_truth" / kind / f"{index:03}_mask.png", mask)
        triplets = TripletFolder(self.layout.stage("synthesize"))
        rows = []
        for index in range(6):
            normal, _ = draw(generator)
            image, mask = draw(generator, spots=1)
            as_bytes = [np.rint(part * 255).astype(np.uint8) for part in (normal, image)]
            triplets.write(f"val-{index:05}", *as_bytes, mask)
            rows.append({"triplet_id": f"val-{index:05}", "role": "val", "source": f"{index:03}.png"})
        import pandas as pd

        pd.DataFrame(rows).to_parquet(triplets.folder / "manifest.parquet")

    def train(self, gain: float = 1.0, noise: float = 0.0, gate: bool = True, flips: int = 0) -> str:
        """Write and record the stages' outputs; the digest of the model."""
        layout, stage = self.layout, self.layout.stage
        with stage_run(layout, "synthesize", {}) as run:
            run.set_output(stage("synthesize"))
        with stage_run(layout, "validate", {}) as run:
            failed = {"name": "triplet_count", "failing": 3, "passed": gate, "severity": "critical"}
            verdict = {
                "passed": gate,
                "severity": None if gate else "critical",
                "triplets": 6,
                "expectations": [failed],
            }
            write_json(stage("validate") / "verdict.json", verdict)
            (stage("validate") / "docs").mkdir(exist_ok=True)
            (stage("validate") / "docs" / "index.html").write_text("<h1>Data Docs</h1>")
            run.set_output(stage("validate") / "verdict.json")
        metrics = {"image_auroc": 1.0, "pixel_auroc": 1.0, "aupro": 1.0, "labelled": True, "gain": gain, "noise": noise}
        write_json(stage("evaluate") / "metrics.json", metrics)
        (stage("evaluate") / "report.html").write_text("<h1>Report</h1>")
        with stage_run(layout, "export", {"gain": gain}) as run:
            model = stage("export") / "model.onnx"
            model.parent.mkdir(parents=True, exist_ok=True)
            onnx_model(gain, noise, model)
            figures = {"map_difference": 0.0, "score_difference": 0.0, "decision_flips": flips}
            proof = {"batches": {"1": figures}, "model_digest": digest_file(model), "tolerance": 0.001}
            write_json(stage("export") / "parity.json", proof)
            run.set_output(model)
        self.lock()
        return digest_file(model)

    def lock(self) -> None:
        """Write dvc.lock as DVC would: without its processes, which cost seconds."""

        def entries(paths: list[str]) -> list[dict[str, str]]:
            root = self.layout.root
            return [{"path": path, "hash": "md5", "md5": content_digest(root / path)} for path in paths]

        stages = {
            f"{name}@plate": {"cmd": "true", "deps": entries(reads), "outs": entries(leaves)}
            for name, (reads, leaves) in STAGES.items()
        }
        (self.layout.root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))

    def with_settings(self, **changes: Any) -> Layout:
        rules = replace(self.layout.settings.promote, **changes)
        return replace(self.layout, settings=replace(self.layout.settings, promote=rules))

    @property
    def registry(self) -> Registry:
        return Registry(self.layout.root, "plate")

    def trail(self) -> list[tuple[str, str, bool]]:
        return [(item["kind"], item["version"], item["lost"]) for item in history(self.layout)["trail"]]


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


def test_a_version_holds_all_that_speaks_for_it(plant: Plant) -> None:
    made = register(plant.layout)
    assert (made.model, made.version, made.created) == ("flawsmith-plate", "1", True)
    assert made.tags["flawsmith.model_digest"] == digest_file(plant.layout.stage("export") / "model.onnx")
    assert made.tags["flawsmith.lineage"] == "complete"
    assert made.tags["flawsmith.gate"].startswith("passed; 6 triplets")
    assert made.tags["flawsmith.parity"] == "proven"
    with plant.registry.download("1") as folder:
        held = sorted(path.name for path in folder.iterdir())
        assert held == [
            "docs", "dvc.lock", "health", "lineage.json", "lineage.txt", "metrics.json", "model.onnx", "parity.json",
            "reference.npz", "report.html", "verdict.json",
        ]  # fmt: skip
        assert digest_file(folder / "model.onnx") == made.model_digest
        assert len(load_reference(folder / "reference.npz").scores) == len(plant.layout.split().calibration)
        scores = json.loads((folder / "health" / "scores.json").read_text())
    normal = [score for name, score in scores.items() if name.startswith("normal")]
    defect = [score for name, score in scores.items() if name.startswith("defect")]
    assert len(normal) == len(defect) == 4
    assert max(normal) < 0.62 < min(defect)


def test_registering_the_same_content_again_adds_nothing(plant: Plant) -> None:
    first = register(plant.layout)
    again = register(plant.layout)
    assert (again.version, again.created) == (first.version, False)
    assert len(plant.registry.versions()) == 1


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


def test_the_runs_record_the_data_that_decided(plant: Plant) -> None:
    register(plant.layout)
    promote(plant.layout)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(plant.registry.uri)
    experiment = client.get_experiment_by_name("flawsmith/plate")
    (run,) = client.search_runs([experiment.experiment_id], "tags.`flawsmith.stage` = 'promote'")
    assert run.data.params["data.image_size"] == str(SIDE)
    for name in ("train", "test", "ground_truth"):
        assert run.data.params[f"images.{name}"] == digest_path(plant.layout.root / "data" / "plate" / name)


def test_mlflows_own_choice_of_a_store_is_left_as_it_was(plant: Plant) -> None:
    import mlflow

    before = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_") and "URI" in name}
    register(plant.layout)
    with plant.registry.download("1") as folder:
        assert (folder / "model.onnx").is_file()
    assert {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_") and "URI" in name} == before
    assert plant.registry.uri not in (mlflow.get_tracking_uri(), mlflow.get_registry_uri())


def test_a_dry_run_changes_nothing(plant: Plant) -> None:
    planned = register(plant.layout, dry_run=True)
    assert (planned.version, planned.created, planned.dry_run) == ("1", True, True)
    assert plant.registry.versions() == ()
    register(plant.layout)
    decided = promote(plant.layout, dry_run=True)
    assert (decided.outcome, decided.dry_run) == ("promoted", True)
    assert plant.registry.champion() == ""
    assert plant.trail() == []


def test_the_first_model_must_keep_the_floors_alone(plant: Plant) -> None:
    register(plant.layout)
    done = promote(plant.layout, reason="first light")
    assert (done.outcome, done.version, done.previous_champion, done.labelled) == ("promoted", "1", "", True)
    assert not [check.name for check in done.checks if "difference" in check.name]
    assert plant.registry.champion() == "1"
    (entry,) = history(plant.layout)["trail"]
    assert entry["reason"].startswith("first light First model: image AUROC 1.000")
    assert entry["done"]
    tags = plant.registry.version("1").tags
    assert tags["flawsmith.promoted_at"] == entry["at"]
    assert tags["flawsmith.previous_champion"] == ""
    assert promote(plant.layout).outcome == "unchanged"


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


def test_a_rollback_needs_something_to_go_back_to(plant: Plant) -> None:
    with pytest.raises(UserError, match="has no champion"):
        rollback(plant.layout, reason="x")
    register(plant.layout)
    promote(plant.layout)
    with pytest.raises(UserError, match="had no champion before version 1"):
        rollback(plant.layout, reason="x")
    with pytest.raises(UserError, match="has no version 7"):
        rollback(plant.layout, reason="x", to="7")


@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [({"gate": False}, "the quality gate failed: triplet_count"), ({"flips": 1}, "torch and ONNX disagree")],
)
def test_a_model_without_its_proofs_is_refused(plant: Plant, trouble: dict[str, Any], sentence: str) -> None:
    plant.train(**trouble)
    register(plant.layout)
    done = promote(plant.layout)
    assert done.outcome == "refused"
    assert sentence in done.reason


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


def test_the_champion_can_be_fetched(plant: Plant) -> None:
    with pytest.raises(UserError, match="has no champion"), fetch_champion(plant.layout):
        pass
    register(plant.layout)
    promote(plant.layout)
    with fetch_champion(plant.layout) as champion:
        assert (champion.model, champion.version) == ("flawsmith-plate", "1")
        assert (champion.folder / "model.onnx").is_file()


def test_the_origin_of_a_version_names_its_runs_and_what_is_missing(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAWSMITH_FLOW_RUN", "11112222-3333")
    monkeypatch.setenv("FLAWSMITH_ACTOR", "prefect flow run calm-otter")
    plant.train(gain=2.0)
    register(plant.layout)
    promote(plant.layout)
    origin = describe_origin(plant.layout, "champion")
    assert "flawsmith-plate version 1 (champion)" in origin.text
    assert "by prefect flow run calm-otter, Prefect run 11112222-3333" in origin.text
    assert "<- synthesize (plate)" in origin.text
    assert "source data" in origin.text
    assert any("git revision" in item for item in origin.missing), "this plant keeps no git"


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
