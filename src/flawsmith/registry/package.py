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
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flawsmith import dvc
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

MODEL, PARITY, VERDICT, METRICS = "model.onnx", "parity.json", "verdict.json", "metrics.json"
REPORT, DOCS, REFERENCE, HEALTH = "report.html", "docs", "reference.npz", "health"
LINEAGE, DRAWN_LINEAGE, LOCK = "lineage.json", "lineage.txt", "dvc.lock"
HEALTH_SCORES = "scores.json"
AGAIN = "run `dvc repro` and register again"  # what helps where a proof is missing
_WARM_UP = 3  # untimed runs: the first ones allocate


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
    normals = {
        f"normal-{path.stem}.png": load_prepared(path, layout.data) for path in _spaced(calibration, count - count // 2)
    }
    return normals | {f"defect-{name}.png": triplets.read(name)[1] for name in _spaced(ids, count // 2)}


def _spaced(items: Sequence[Any], count: int) -> list[Any]:
    return [items[place] for place in sorted({int(place) for place in np.linspace(0, len(items) - 1, count)})]


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


def parity_objections(certificate: Mapping[str, Any], model_digest: str) -> tuple[str, ...]:
    """What speaks against a parity certificate as proof of the model with this digest; empty if it is one."""
    found = []
    if certificate.get("model_digest") != model_digest:
        found.append(f"the parity certificate ({PARITY}) is of another file: {AGAIN}")
    batches = certificate.get("batches") or {}
    if not batches:
        found.append(f"the parity certificate ({PARITY}) holds no comparison: {AGAIN}")
    try:
        for batch, figures in batches.items():
            gap = float(np.max([figures["map_difference"], figures["score_difference"]]))  # max would drop a NaN
            flips = figures["decision_flips"]
            if flips or not gap <= certificate["tolerance"]:
                found.append(f"torch and ONNX disagree at batch {batch} ({flips} flips, difference {gap:.3g})")
    except (KeyError, TypeError) as error:
        found.append(f"the parity certificate is damaged ({error} is missing)")
    return tuple(found)


def gate_objections(verdict: Mapping[str, Any], is_known: bool = True) -> tuple[str, ...]:
    """What speaks against a verdict as proof of good triplets; `is_known`: the model was trained under this one."""
    if not is_known:
        return (f"the quality gate's verdict ({VERDICT}) is not the one that the model was trained under: {AGAIN}",)
    if verdict.get("passed") is True:
        return ()
    failed = [
        f"{item['name']} ({item['failing']} of {verdict.get('triplets')} triplets)"
        if item["failing"] or item["observed"] is None
        else f"{item['name']} ({item['meaning']}: {item['observed']})"
        for item in verdict.get("expectations", ())
        if not item["passed"] and item["severity"] == "critical"
    ]
    return (f"the quality gate failed: {', '.join(failed) or 'no expectation was checked'}",)


def lineage_objections(chain: Mapping[str, Any]) -> tuple[str, ...]:
    """What speaks against a version's lineage.json as proof of where the model came from; empty if it is one."""
    changed = [f"{item['changed']} and register again" for item in chain.values() if "changed" in item]
    missing = [
        f"the origin of {path} is not recorded: {AGAIN}"
        for path, item in chain.items()
        if not item["source"] and "stage" not in item and "changed" not in item
    ]
    return (*changed, *missing)


def knows(chain: Mapping[str, Any], path: Path) -> bool:
    """Whether a file's content, by either of its digests, is among those behind a model."""
    return not {item["digest"] for item in chain.values()}.isdisjoint({digest_file(path), dvc.content_digest(path)})


def ddpm_standing(verdict: Mapping[str, Any]) -> tuple[str, float | None, float | None]:
    """What the gate knew of the DDPM behind the triplets: in words, its samples' distance, and the critical bound."""
    found = next((item for item in verdict.get("expectations", ()) if item["name"] == "ddpm_not_noise"), None)
    if found is None:
        return "no DDPM made the triplets, or its readiness was not recorded", None, None
    return str(verdict.get("ddpm")), found["observed"], found["bounds"][1]


def measure_latency(predictors: Sequence[Predictor], image: FloatImage, runs: int) -> list[float]:
    """p95 of one image in milliseconds for each model, timed in turns so that a busy machine slows all alike."""
    times: list[list[float]] = [[] for _ in predictors]
    for run in range(_WARM_UP + runs):
        for index, predictor in enumerate(predictors):
            start = time.perf_counter()
            predictor.predict([image])
            if run >= _WARM_UP:
                times[index].append(1000 * (time.perf_counter() - start))
    return [float(np.percentile(values, 95)) for values in times]


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


def megabytes(path: Path) -> float:
    """The size of a file in MB (10^6 bytes)."""
    return path.stat().st_size / 1e6
