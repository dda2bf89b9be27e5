"""evaluate: how good the detector is, beside PatchCore; of dvc.yaml's stages it alone opens the labelled test set.

flawsmith evaluate --category C: reads distill/, validate/verdict.json and data/C, ddpm-train/ for defects to try, and
synthesize/ where there is no labelled test set. Writes network.onnx, metrics.json, draws.npz, roc.csv, pr.csv, curves/,
scores.csv, calibration_scores.csv, summary/, figures/, gallery/, parity/ and report.html. `run_baseline` judges
PatchCore alone, which needs the data and no trained model.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flawsmith.data.images import stored_size
from flawsmith.data.tiling import Tiling
from flawsmith.detector.model import load_detector
from flawsmith.devices import Compute
from flawsmith.evaluation.assess import Assessment, assess
from flawsmith.evaluation.baseline import fit_baseline
from flawsmith.evaluation.detection import Findings, Unit, findings, real_defects
from flawsmith.evaluation.measure import flagged_share, measure
from flawsmith.evaluation.outputs import write_data, write_parity_images, write_performance
from flawsmith.evaluation.report import ReportHeader, summary, write_report
from flawsmith.evaluation.samples import EvaluationSet, evaluation_set, normal_samples
from flawsmith.evaluation.scoring import Scorer, tiled_scorer, torch_scorer
from flawsmith.evaluation.trials import judge_by, spots, try_defects
from flawsmith.export.onnx import export_network
from flawsmith.files import atomic_folder, read_json
from flawsmith.inference.network import Network
from flawsmith.inference.predictor import flags
from flawsmith.layout import Layout
from flawsmith.randomness import numpy_generator
from flawsmith.sections import section_values
from flawsmith.sequences import evenly
from flawsmith.stages.synthesize import build_generator
from flawsmith.tracking import stage_run

STAGE, BASELINE = "evaluate", "patchcore"
NETWORK = "network.onnx"  # the exported detector, without a threshold: `export` makes model.onnx of it

log = logging.getLogger(__name__)


def run(layout: Layout) -> None:
    """Score one category and write its report.

    The detector is judged as every later user runs it, exported and in onnxruntime: the threshold is chosen, and the
    figures are measured, on the answers that the product gives.

    Raises:
        UserError: an earlier stage's output is missing, or the test set is not usable as it is.
        FlawsmithError: the detector does not export, or answers NaN.
    """
    settings, tiling, out = layout.settings, Tiling.of(layout.data), layout.stage(STAGE)
    weights, verdict = layout.input("distill", "detector.safetensors").parent, layout.input("validate", "verdict.json")
    split, judged = layout.split(), evaluation_set(layout)
    if judged.labelled:
        log.info("%s: test: %s", layout.category, layout.surface().find_test())
    params = _params(layout) | {"export": {"opset": settings.export.opset}}
    with stage_run(layout, STAGE, params) as tracked:
        with atomic_folder(out) as folder:
            baseline = _baseline_scorer(layout, judged.foreign_to(split))
            export_network(load_detector(weights), tiling.shape, settings.export.opset, folder / NETWORK)
            network = Network(folder / NETWORK)
            tracked.set_tag("provider", network.provider)
            detector = tiled_scorer(network.run, tiling)
            calibration = normal_samples(split.calibration, tiling, layout.data.reading)
            generator = numpy_generator(settings.evaluate.seed, "bootstrap")
            result = assess(detector, baseline, judged.samples, calibration, generator, settings.evaluate)
            result = replace(result, findings=_findings(layout, network, result, judged))
            shades = flagged_share(detector, judged.shades, result.detector.threshold.value, settings.evaluate.batch)
            header = ReportHeader(
                layout.category, replace(settings, data=layout.data), judged, read_json(verdict), shades
            )
            write_data(folder, result, judged, read_json(weights / "config.json").get("precision", ""), shades)
            write_parity_images(folder / "parity", judged.samples, settings.evaluate.parity_images, tiling)
            write_report(folder, result, header)
        tracked.log_metrics(
            {
                **result.detector.measured,
                **{f"baseline_{key}": value for key, value in result.baseline.measured.items()},
                "test_detection_rate": result.detector.test_detections.value,
                "test_false_alarm_rate": result.detector.test_false_alarms.value,
                "threshold": result.detector.threshold.value,
                **{
                    f"a90_95_{name}": one.a90_95
                    for name, one in result.findings.by_source.items()
                    if one.a90_95 is not None
                },
            }
        )
        for name in ("report.html", "metrics.json", "figures", "gallery"):
            tracked.log_artifact(out / name)
        tracked.set_output(out / "metrics.json")
    log.info("%s: %s (computed on %s)", layout.category, summary(result, judged), network.provider)


def run_baseline(layout: Layout) -> None:
    """Judge PatchCore alone, as `run` judges it beside the detector: the same images, split and resamples.

    Writes metrics.json, draws.npz and scores.csv into the folder `patchcore` beside the stages' own.

    Raises:
        UserError: the test set is not usable as it is, or there is neither it nor a held-out triplet.
    """
    settings, out = layout.settings.evaluate, layout.stage(BASELINE)
    split, judged = layout.split(), evaluation_set(layout)
    with stage_run(layout, BASELINE, _params(layout)) as tracked:
        (result,) = measure(
            [_baseline_scorer(layout, judged.foreign_to(split))],
            judged.samples,
            normal_samples(split.calibration, Tiling.of(layout.data), layout.data.reading),
            numpy_generator(settings.seed, "bootstrap"),
            settings,
        )
        with atomic_folder(out) as folder:
            write_performance(folder, result, judged)
        tracked.log_metrics(result.measured)
        tracked.set_output(out / "metrics.json")


def _findings(layout: Layout, network: Network, result: Assessment, judged: EvaluationSet) -> Findings:
    """Try defects of `evaluate.detection_sources` on calibration normals; labelled ones stand beside them."""
    options, synthesis, data = layout.settings.evaluate, layout.settings.synthesize, layout.data
    sources: list[str] = [name for name in options.detection_sources if name != "diffusion" or name in synthesis.shares]
    if not sources:
        return Findings()
    calibration, compute = layout.split().calibration, Compute.choose(layout.settings.compute)
    paths = [calibration[place] for place in evenly(len(calibration), options.detection_defects, 0.5)]
    maker = build_generator(layout, compute, sources, paths, options.detection_defects)
    maker = replace(maker, settings=spots(synthesis, data.shape[0] * data.shape[1]))
    size = stored_size(paths[0])
    unit = Unit.of(size, Tiling.of(data).working_shape(*size), options.pixels_per_mm)
    threshold = result.detector.threshold.value
    judge = judge_by(network.run, threshold, options.batch)
    with compute.fast_math():
        plain = np.flatnonzero(~judge(maker.normals))
        trials = {name: try_defects(maker, name, judge, plain, unit, options.detection_defects) for name in sources}
    areas = result.detector.areas if judged.labelled else np.zeros_like(result.detector.areas)
    real = real_defects(areas, flags(result.detector.scores.scores, threshold), unit)
    return findings(trials, real, unit, options)


def _baseline_scorer(layout: Layout, normals: list[Path]) -> Scorer:
    device = Compute.choose(layout.settings.compute).device
    baseline = torch_scorer(fit_baseline(layout, normals, device), device)
    return tiled_scorer(baseline, Tiling.of(layout.data))


def _params(layout: Layout) -> dict[str, dict[str, Any]]:
    settings = layout.settings
    sections = {STAGE: settings.evaluate, "data": layout.data, "teacher": settings.teacher}
    return {name: section_values(section) for name, section in sections.items()}
