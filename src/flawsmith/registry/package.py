"""What a registered version holds beside its network, so that it can be judged, traced and watched without its makers.

model.onnx                       the network with its threshold inside
parity.json  verdict.json        the certificate of the export, the quality gate's verdict on its triplets
metrics.json report.html docs/   how good it was when it was made; Data Docs of its triplets
reference.npz                    its answers on the calibration normals: what later images are compared with
health/                          images and the scores it gave them, to be given again before it becomes champion
dvc.lock                         what each stage read and left: with it `dvc pull` brings back all behind the model
lineage.json  lineage.txt        the chain of digests from the model back to the data, and the same drawn
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flawsmith.data.dataset import load_prepared, normal_name
from flawsmith.data.images import FloatImage, read_image, write_png
from flawsmith.data.triplets import VALIDATION, TripletFolder
from flawsmith.detector.teacher import build_teacher
from flawsmith.errors import FlawsmithError
from flawsmith.files import digest_file, digest_json, read_json, write_json
from flawsmith.inference.predictor import Predictor
from flawsmith.layout import Layout
from flawsmith.lineage import SHOWN, Lineage, render_lineage
from flawsmith.monitoring.reference import measure, save_reference
from flawsmith.sequences import evenly

MODEL, PARITY, VERDICT, METRICS = "model.onnx", "parity.json", "verdict.json", "metrics.json"
REPORT, DOCS, REFERENCE, HEALTH = "report.html", "docs", "reference.npz", "health"
LINEAGE, DRAWN_LINEAGE, LOCK = "lineage.json", "lineage.txt", "dvc.lock"
HEALTH_SCORES = "scores.json"


@dataclass(frozen=True)
class Sources:
    """The finished outputs of the stages that a version is made of, all of them on disk."""

    model: Path
    parity: Path
    verdict: Path
    docs: Path
    metrics: Path
    report: Path

    @classmethod
    def of(cls, layout: Layout) -> "Sources":
        """Find them.

        Raises:
            UserError: a stage has not run.
        """
        return cls(
            model=layout.input("export", MODEL),
            parity=layout.input("export", PARITY),
            verdict=layout.input("validate", VERDICT),
            docs=layout.input("validate", DOCS),
            metrics=layout.input("evaluate", METRICS),
            report=layout.input("evaluate", REPORT),
        )

    @property
    def content_digest(self) -> str:
        """What makes a version: the model and what was proven of it. Registering the same twice adds nothing."""
        files = (self.model, self.parity, self.verdict, self.metrics)
        return digest_json({path.name: digest_file(path) for path in files})


def build_content(layout: Layout, sources: Sources, lineage: Lineage, folder: Path) -> None:
    """Put everything that a version holds beside model.onnx into the existing `folder`.

    Raises:
        UserError: an output is damaged, or the images are gone.
        FlawsmithError: the model answers with NaN.
    """
    for path in (sources.parity, sources.verdict, sources.metrics, sources.report):
        shutil.copyfile(path, folder / path.name)
    shutil.copytree(sources.docs, folder / DOCS)
    write_json(folder / LINEAGE, lineage_json(lineage))
    (folder / DRAWN_LINEAGE).write_text(f"{render_lineage(lineage)}\n")
    if (layout.root / LOCK).is_file():
        shutil.copyfile(layout.root / LOCK, folder / LOCK)
    data, predictor = layout.data, Predictor(sources.model)
    calibration = layout.split().calibration
    images = ((normal_name(path), load_prepared(path, data)) for path in calibration)
    teacher = build_teacher(layout.settings.teacher, layout.root)
    save_reference(folder / REFERENCE, measure(predictor, teacher, images))
    write_health(folder / HEALTH, predictor, _health_images(layout, calibration))


def _health_images(layout: Layout, calibration: Sequence[Path]) -> dict[str, FloatImage]:
    """Half calibration normals, half defects of held-out triplets, evenly spaced: no test image leaves the test set.

    All are at working resolution, the only one that triplets have.
    """
    count = layout.settings.promote.health_images
    triplets = TripletFolder(layout.stage("synthesize"))
    ids = triplets.ids(VALIDATION)
    normals = [calibration[place] for place in evenly(len(calibration), count - count // 2)]
    defects = [ids[place] for place in evenly(len(ids), count // 2)]
    return {f"normal-{path.stem}.png": load_prepared(path, layout.data) for path in normals} | {
        f"defect-{name}.png": triplets.read(name)[1] for name in defects
    }


def write_health(folder: Path, predictor: Predictor, images: Mapping[str, FloatImage]) -> None:
    """Store images, as PNG, and the scores of what the PNG holds."""
    for name, image in images.items():
        write_png(folder / name, image)
    write_json(folder / HEALTH_SCORES, {name: _score(predictor, folder / name) for name in images})


def check_health(folder: Path, predictor: Predictor, tolerance: float) -> float:
    """The largest difference between the scores a model gives now and those stored in `folder`.

    Raises:
        FlawsmithError: it exceeds `tolerance`, or there is nothing to compare.
        UserError: the folder is damaged.
    """
    expected = read_json(folder / HEALTH_SCORES)
    if not expected:
        raise FlawsmithError(f"{folder} holds no image to check the model's health on; register the model again.")
    gap = float(np.max([abs(_score(predictor, folder / name) - score) for name, score in expected.items()]))
    if not gap <= tolerance:  # NaN fails, and np.max, unlike max, keeps it
        raise FlawsmithError(
            f"The model does not score its {len(expected)} known images as it did when it was registered (largest "
            f"difference {gap:.3g}, allowed {tolerance:g}); it was damaged, or this machine computes otherwise: "
            "compare `flawsmith doctor` here with the machine that registered it."
        )
    return gap


def _score(predictor: Predictor, path: Path) -> float:
    return predictor.predict_prepared([read_image(path)])[0].score


def lineage_json(lineage: Lineage) -> dict[str, Any]:
    """Every artefact behind the model, by path: its digest, the stage that made it, and the recorded run.

    A path that was read with several contents is there once for each, the later ones as `path@digest`: none may hide
    another whose origin is unknown.
    """
    found: dict[str, Any] = {}
    for node in lineage.nodes():
        name = node.artefact.path
        item: dict[str, Any] = {"digest": node.artefact.digest, "source": node.is_source}
        if node.stage:
            item["stage"] = node.stage.name
        if node.run:
            item |= {key: getattr(node.run, key) for key in ("run_id", "revision", "dirty", "flow_run")}
        found[name if name not in found else f"{name}@{node.artefact.digest[:SHOWN]}"] = item
    for path, sentence in lineage.changed:
        found.setdefault(path, {"digest": "", "source": False})["changed"] = sentence
    return found


def digest_tags(lineage: Lineage, category: str) -> dict[str, str]:
    """The digests a person asks for first, as tags: of the detector, the triplets, the DDPM and the training data."""
    wanted = {
        f"artifacts/{category}/distill/detector.safetensors": "detector",
        f"artifacts/{category}/synthesize/defect": "triplets",
        f"artifacts/{category}/ddpm-train/unet.safetensors": "ddpm",
    }
    tags: dict[str, str] = {}
    for node in lineage.nodes():
        path = node.artefact.path
        name = "data" if path.endswith(f"/{category}/train") else wanted.get(path)
        if name:
            tags.setdefault(name, node.artefact.digest)
    return tags
