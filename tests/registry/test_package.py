"""What a version holds beside its network: complete, from the right images, and able to catch damage."""

import json
import math
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from toy_onnx import write_toy

from flawsmith.config import load_settings
from flawsmith.data.images import write_png
from flawsmith.data.triplets import TripletFolder
from flawsmith.dvc import Artefact, LockedStage
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.files import digest_file, read_json, write_json
from flawsmith.inference.predictor import Predictor
from flawsmith.layout import Layout
from flawsmith.lineage import Lineage, render_lineage
from flawsmith.monitoring.reference import load_reference
from flawsmith.registry import package
from flawsmith.registry.evidence import lineage_objections
from flawsmith.registry.package import (
    Sources,
    build_content,
    check_health,
    digest_tags,
    lineage_json,
    write_health,
)
from flawsmith.tracking import Run

SIZE = 32


def picture(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random((3, SIZE, SIZE), np.float32)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor(write_toy(tmp_path_factory.mktemp("model") / "model.onnx"), threads=1)


# --- health


@pytest.fixture
def health(tmp_path: Path, predictor: Predictor) -> Path:
    folder = tmp_path / "health"
    write_health(folder, predictor, {f"{seed}.png": picture(seed) for seed in range(3)})
    return folder


def test_a_model_is_as_healthy_as_when_its_answers_were_written(health: Path, predictor: Predictor) -> None:
    assert check_health(health, predictor, tolerance=0.0) == 0
    stored = read_json(health / "scores.json")
    assert set(stored) == {"0.png", "1.png", "2.png"} == {path.name for path in health.glob("*.png")}
    exact = predictor.predict([picture(0)])[0].score
    assert stored["0.png"] == pytest.approx(exact, abs=1 / 255)
    assert stored["0.png"] != exact, "the 8-bit image on disk is scored, not the float image"


def test_another_model_is_not_healthy_on_these_images(health: Path, tmp_path: Path) -> None:
    other = Predictor(write_toy(tmp_path / "other.onnx", gain=1.1), threads=1)
    gap = check_health(health, other, tolerance=0.2)
    assert gap == pytest.approx(0.1 * max(read_json(health / "scores.json").values()), rel=1e-5)
    with pytest.raises(FlawsmithError, match=r"3 known images .* allowed 0\.05"):
        check_health(health, other, tolerance=0.05)


@pytest.mark.parametrize("name", ["0.png", "2.png"])
@pytest.mark.parametrize("damage", [0.01, -0.01, math.nan, math.inf, "image"])
def test_any_one_score_or_image_that_differs_fails_the_check(
    health: Path, predictor: Predictor, name: str, damage: float | str
) -> None:
    stored = read_json(health / "scores.json")
    if isinstance(damage, str):
        write_png(health / name, np.zeros((SIZE, SIZE, 3), np.uint8))
    else:
        (health / "scores.json").write_text(json.dumps(stored | {name: stored[name] + damage}))
    with pytest.raises(FlawsmithError, match="does not score"):
        check_health(health, predictor, tolerance=0.005)


@pytest.mark.parametrize("file", ["scores.json", "1.png"])
@pytest.mark.parametrize("keep", [0, 30])
def test_a_damaged_folder_is_a_clear_error_that_names_the_file(
    health: Path, predictor: Predictor, file: str, keep: int
) -> None:
    content = (health / file).read_bytes()
    (health / file).unlink()
    if keep:
        (health / file).write_bytes(content[:keep])
    with pytest.raises(UserError, match=file):
        check_health(health, predictor, tolerance=1.0)


def test_no_known_image_is_no_health(tmp_path: Path, predictor: Predictor) -> None:
    write_health(tmp_path, predictor, {})
    with pytest.raises(FlawsmithError, match="no image to check"):
        check_health(tmp_path, predictor, tolerance=1.0)


# --- the files that make a version


@pytest.fixture
def layout(tmp_path: Path, params_path: Path) -> Layout:
    """A finished category `plate` with tiny outputs of every stage that a version is made of."""
    overrides = {
        "categories": ["plate"],
        "data.image_size": 64,
        "ddpm-train.crop": 32,
        "synthesize.windows": [32, 48],
        "promote.health_images": 5,
    }
    made = Layout(load_settings(params_path, overrides), "plate", tmp_path)
    for index in range(10):
        write_png(tmp_path / f"data/plate/train/good/{index:03d}.png", bright(index))
    for index in range(3):
        write_png(tmp_path / f"data/plate/test/dent/{index:03d}.png", bright(100 + index))
    triplets = TripletFolder(made.stage("synthesize"))
    mask = np.zeros((SIZE, SIZE), np.bool_)
    mask[4:9, 4:9] = True
    for role, count in (("fit", 6), ("val", 4)):
        for index in range(count):
            normal, defect = (bright(seed).transpose(2, 0, 1) for seed in (200 + index, 300 + index))
            triplets.write(f"{role}-{index:05d}", normal, defect, mask)
    for stage in ("export", "validate", "evaluate"):
        made.stage(stage).mkdir(parents=True)
    model = write_toy(made.stage("export") / "model.onnx", shape=(64, 64))
    proof = {"batches": {}, "model_digest": digest_file(model), "tolerance": 1e-4}
    write_json(made.stage("export") / "parity.json", proof)
    write_json(made.stage("validate") / "verdict.json", {"passed": True, "triplets": 400, "expectations": []})
    (made.stage("validate") / "docs").mkdir()
    (made.stage("validate") / "docs" / "index.html").write_text("<p>docs")
    write_json(made.stage("evaluate") / "metrics.json", {"image_auroc": 0.9})
    (made.stage("evaluate") / "report.html").write_text("<p>report")
    (tmp_path / "dvc.lock").write_text("schema: '2.0'")
    return made


def bright(seed: int) -> NDArray[np.uint8]:
    """(S, S, 3) bytes, of a mean brightness of its own."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 60 + seed % 150, (SIZE, SIZE, 3), np.uint8)


class ToyTeacher(nn.Module):
    """Two levels of average-pooled colours."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("mean", torch.zeros(1))  # tells the device, as a teacher's does

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(nn.functional.avg_pool2d(image * self.scale, step) for step in (4, 8))


def test_the_content_digest_is_of_the_files_that_make_a_version(layout: Layout) -> None:
    sources = Sources.of(layout)
    seen = {sources.content_digest}
    for file in (sources.model, sources.parity, sources.verdict, sources.metrics):
        content = file.read_bytes()
        file.write_bytes(content + b" ")
        seen.add(sources.content_digest)
        file.write_bytes(content)
    assert len(seen) == 5
    for rendering in (sources.docs / "index.html", sources.report):
        rendering.write_text("another rendering of the same figures")
    assert sources.content_digest in seen
    parity, verdict = sources.parity.read_bytes(), sources.verdict.read_bytes()
    sources.parity.write_bytes(verdict)
    sources.verdict.write_bytes(parity)
    assert sources.content_digest not in seen, "which file holds what counts too"


@pytest.mark.parametrize(
    ("missing", "stage"),
    [
        ("export/model.onnx", "export"),
        ("export/parity.json", "export"),
        ("validate/verdict.json", "validate"),
        ("validate/docs", "validate"),
        ("evaluate/metrics.json", "evaluate"),
        ("evaluate/report.html", "evaluate"),
    ],
)
def test_a_stage_that_has_not_run_is_named(layout: Layout, missing: str, stage: str) -> None:
    path = layout.root / "artifacts" / "plate" / missing
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(UserError, match=f"run `flawsmith {stage} --category plate`"):
        Sources.of(layout)


def test_a_version_holds_all_that_its_judges_and_watchers_need(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "build_teacher", lambda settings, root: ToyTeacher())
    shutil.rmtree(layout.root / "data/plate/test")  # not even looked at: no test image may leave the test set
    folder = tmp_path / "content"
    folder.mkdir()
    sources = Sources.of(layout)
    build_content(layout, sources, CHAIN, folder)

    assert {path.name for path in folder.iterdir()} == {
        "parity.json", "verdict.json", "metrics.json", "report.html", "docs", "health", "lineage.json", "lineage.txt",
        "reference.npz", "dvc.lock",
    }  # fmt: skip
    assert (folder / "parity.json").read_bytes() == sources.parity.read_bytes()
    assert (folder / "verdict.json").read_bytes() == sources.verdict.read_bytes()
    assert read_json(folder / "lineage.json") == lineage_json(CHAIN)
    assert (folder / "lineage.txt").read_text() == f"{render_lineage(CHAIN)}\n"
    assert check_health(folder / "health", Predictor(sources.model), tolerance=0.0) == 0

    calibration = layout.split().calibration
    reference = load_reference(folder / "reference.npz")
    assert list(reference.names) == [path.name for path in calibration]
    assert reference.detector_digest == Predictor(sources.model).metadata.detector_digest
    names = set(read_json(folder / "health" / "scores.json"))
    normals = {name for name in names if name.startswith("normal-")}
    assert normals <= {f"normal-{path.stem}.png" for path in calibration}
    assert names - normals == {"defect-val-00000.png", "defect-val-00003.png"}, "held out: they trained nothing"
    assert len(normals) == min(3, len(calibration))


# --- lineage


def made_by(stage: str, path: str, *parents: Lineage, digest: str = "") -> Lineage:
    artefact = Artefact(path, digest or f"digest of {path}")
    made = LockedStage(stage, "plate", tuple(parent.artefact for parent in parents), (artefact,))
    run = Run(f"run-{stage}", datetime(2026, 1, 2, tzinfo=UTC), "0123456789abcdef", stage == "distill", "flow-1")
    return Lineage(artefact, made, run, parents)


def source(path: str) -> Lineage:
    return Lineage(Artefact(path, f"digest of {path}"), is_source=True)


def lost(path: str) -> Lineage:
    return Lineage(Artefact(path, "another digest"), note="nobody wrote it")


MODEL, WEIGHTS = "artifacts/plate/export/model.onnx", "artifacts/plate/distill/detector.safetensors"
DATA = source("data/plate/train")
DDPM = made_by("ddpm-train", "artifacts/plate/ddpm-train/unet.safetensors", DATA)
TRIPLETS = made_by("synthesize", "artifacts/plate/synthesize/defect", DATA, DDPM)
DETECTOR = made_by("distill", WEIGHTS, TRIPLETS, DATA)
METRICS = made_by("evaluate", "artifacts/plate/evaluate/metrics.json", DETECTOR, DATA, source("data/plate/test"))
CHAIN = made_by("export", MODEL, DETECTOR, METRICS)


def test_lineage_in_json_names_every_artefact_with_its_digest_and_run() -> None:
    found = lineage_json(CHAIN)
    assert set(found) == {node.artefact.path for node in CHAIN.nodes()}
    assert found["data/plate/train"] == {"digest": DATA.artefact.digest, "source": True}
    assert found[WEIGHTS] == {
        "digest": DETECTOR.artefact.digest,
        "source": False,
        "stage": "distill",
        "run_id": "run-distill",
        "revision": "0123456789abcdef",
        "dirty": True,
        "flow_run": "flow-1",
    }
    assert json.loads(json.dumps(found)) == found


def test_a_file_changed_since_is_named_with_the_remedy() -> None:
    path = METRICS.artefact.path
    other = "artifacts/plate/evaluate/report.html"
    changed = tuple((name, f"{name} is not what dvc.lock says: run `dvc repro`") for name in (path, other))
    objections = lineage_objections(lineage_json(replace(CHAIN, changed=changed)))
    assert objections == tuple(f"{sentence} and register again" for _, sentence in changed)


@pytest.mark.parametrize("parents", [(lost(WEIGHTS), METRICS), (METRICS, lost(WEIGHTS)), (lost(WEIGHTS),)])
def test_a_missing_link_is_not_hidden_by_another_content_of_the_same_path(parents: tuple[Lineage, ...]) -> None:
    """Model and metrics may come from different contents of one file: the unknown one must still be seen."""
    chain = made_by("export", MODEL, *parents)
    assert len(chain.missing()) == len(lineage_objections(lineage_json(chain))) == 1
    assert lineage_objections(lineage_json(CHAIN)) == ()


def test_tags_hold_the_digests_a_person_asks_for_first() -> None:
    assert digest_tags(CHAIN, "plate") == {
        "detector": DETECTOR.artefact.digest,
        "triplets": TRIPLETS.artefact.digest,
        "ddpm": DDPM.artefact.digest,
        "data": DATA.artefact.digest,
    }
    assert digest_tags(made_by("export", MODEL, lost(WEIGHTS)), "plate") == {"detector": "another digest"}
    alike = made_by("export", MODEL, source("data/steelplate/train"), DATA)
    assert digest_tags(alike, "plate")["data"] == DATA.artefact.digest
