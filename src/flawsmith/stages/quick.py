"""quick: a folder of good images → an ONNX detector of memories alone with its report, in minutes; nothing is trained.

flawsmith quick FOLDER [--out DIR]: writes model.onnx, parity.json, report.html, and what `evaluate` writes beside it.
No stage of dvc.yaml: nothing depends on it, and what it leaves can be neither registered nor promoted.
"""

import logging
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from flawsmith.config import Settings
from flawsmith.data.bare import name_folder, open_folder
from flawsmith.data.dataset import Dataset, plan_tiles
from flawsmith.data.tiling import Tiling
from flawsmith.detector.model import save_detector
from flawsmith.detector.normals import Normals, pixels, tensor_batches
from flawsmith.detector.teacher import build_teacher
from flawsmith.detector.untrained import untrained_detector
from flawsmith.devices import Compute
from flawsmith.errors import UserError
from flawsmith.evaluation.assess import assess
from flawsmith.evaluation.baseline import fit_baseline
from flawsmith.evaluation.outputs import write_data, write_parity_images
from flawsmith.evaluation.report import ReportHeader, summary, write_report
from flawsmith.evaluation.samples import EvaluationSet, Sample, evaluation_set, normal_samples
from flawsmith.evaluation.scoring import tiled_scorer, torch_scorer
from flawsmith.export.onnx import export_network
from flawsmith.files import atomic_folder, digest_file, write_json
from flawsmith.inference.network import Network
from flawsmith.layout import Layout
from flawsmith.randomness import numpy_generator
from flawsmith.stages.evaluate import NETWORK
from flawsmith.stages.export import write_proven

MARK = "quick.json"  # by it a folder is known as an earlier quick look, which may be replaced

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuickLayout(Layout):
    """The images of any folder with the settings of a category; `scratch` holds what nobody needs afterwards."""

    folder: Path = Path()
    scratch: Path = Path()

    def surface(self) -> Dataset:
        """The folder of images."""
        return self._surface

    @cached_property
    def _surface(self) -> Dataset:
        return open_folder(self.folder)

    def kept_statistics(self) -> Path:
        """A file that is gone afterwards."""
        return self.scratch / "statistics.npy"


def run(settings: Settings, root: Path, folder: Path, out: Path | None = None) -> Path:
    """Make a quick look at the images of a folder; return where it lies.

    Args:
        root: where params.yaml lies.
        folder: holds good images directly, or is a category with `train/good`, and perhaps `test`.
        out: replaced as a whole if it holds an earlier quick look. Default: artifacts/NAME/quick below `root`.

    Raises:
        UserError: the images cannot be used as they are, or `out` holds something else.
        FlawsmithError: the exported network disagrees with the detector.
    """
    with tempfile.TemporaryDirectory() as scratch:
        layout = QuickLayout(settings, name_folder(folder), root, folder, Path(scratch))
        layout.surface().normals()  # before anything slow: a wrong folder is the commonest mistake
        place = out or layout.stage("quick")
        _check_out(place, folder)
        layout.split()  # reads every image, and refuses what cannot be used before any folder is made
        with atomic_folder(place) as made:
            _look(layout, made)
    return place


def _look(layout: QuickLayout, out: Path) -> None:
    data, settings, tiling = layout.data, layout.settings, Tiling.of(layout.data)
    compute, split = Compute.choose(settings.compute), layout.split()
    judged, calibration = _judged(layout)
    with compute.fast_math():
        frozen = build_teacher(settings.teacher, layout.root).to(compute.device)
        detector = untrained_detector(
            frozen,
            settings.teacher,
            settings.distill,
            Normals(split.fit, data, split.twins),
            lambda: tensor_batches(pixels(plan_tiles(split.calibration, data), data), compute.device),
        ).cpu()
        baseline = tiled_scorer(torch_scorer(fit_baseline(layout, split.fit, compute.device), compute.device), tiling)
    export_network(detector, tiling.shape, settings.export.opset, out / NETWORK)
    scorer = tiled_scorer(Network(out / NETWORK).run, tiling)
    generator = numpy_generator(settings.evaluate.seed, "bootstrap")
    result = assess(scorer, baseline, judged.samples, calibration, generator, settings.evaluate)
    write_data(out, result, judged)
    write_parity_images(out / "parity", judged.samples, settings.evaluate.parity_images, tiling)
    header = ReportHeader(layout.category, replace(settings, data=data), judged, quick=True)
    write_report(out, result, header)
    save_detector(detector, layout.scratch, settings.teacher, settings.distill)
    write_proven(layout, detector, digest_file(layout.scratch / "detector.safetensors"), out, out, quick_look=True)
    (out / NETWORK).unlink()
    write_json(out / MARK, {
        "quick_look": True,
        "category": layout.category,
        "memories": {name: len(bank.patches) for name, bank in detector.banks.items()},
        "candidates": settings.distill.memory_candidates,
        "normals": {"fit": len(split.fit), "calibration": len(split.calibration)},
    })  # fmt: skip
    log.info("%s, quick look: %s", layout.category, summary(result, judged))


def _judged(layout: QuickLayout) -> tuple[EvaluationSet, tuple[Sample, ...]]:
    """What is judged, the labelled test set or else the calibration normals, and these normals."""
    calibration = normal_samples(layout.split().calibration, Tiling.of(layout.data), layout.data.reading)
    if layout.surface().labelled_test():
        return evaluation_set(layout), calibration
    return EvaluationSet(calibration, labelled=False), calibration


def _check_out(out: Path, folder: Path) -> None:
    """Refuse to replace anything but an earlier quick look, or to write among the images."""
    if out.exists() and not (out / MARK).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} holds something else than an earlier quick look; name a new folder for --out.")
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{out} lies inside {folder}, among the images; name another folder for --out.")
