"""Variants of a small real detector: what they are, what they lose, and when they are not exported."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

from flawsmith.cli import app
from flawsmith.data.images import write_png
from flawsmith.detector.model import Detector
from flawsmith.export.onnx import export_network, write_model
from flawsmith.export.variant_report import Images, Limits, VariantImages, build_variant, objections
from flawsmith.export.variants import FP16, INT8
from flawsmith.files import digest_file
from flawsmith.inference.metadata import ModelMetadata
from flawsmith.inference.predictor import Predictor

LENIENT = Limits(auroc_loss=0.2, flip_share=0.5)


@dataclass(frozen=True)
class Made:
    model: Path
    samples: VariantImages
    variants: dict[str, Path]
    reports: dict[str, dict]


def loaders(images: NDArray[np.float32]) -> Images:
    return [partial(images.__getitem__, row) for row in range(len(images))]


@pytest.fixture(scope="module")
def made(
    small_detector: Detector,
    small_images: Callable[[int, int, bool], NDArray],
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    folder = tmp_path_factory.mktemp("variants")
    normals, defects = small_images(1, 6, False), small_images(2, 6, True)
    with torch.inference_mode():
        scores = small_detector(torch.from_numpy(normals))[1]
    metadata = ModelMetadata(
        category="plate",
        threshold=float(scores.max()) + 1.0,
        pixel_threshold=3.0,
        false_alarm_rate=0.05,
        map_low=0.0,
        map_high=6.0,
        detector_digest="0" * 64,
        teacher=small_detector.config.backbone,
        flawsmith_version="0.1.0",
    )
    model = folder / "model.onnx"
    export_network(small_detector, small_detector.config.shape, 18, model)
    write_model(onnx.load(model), metadata, model)
    making = [*loaders(normals), *loaders(small_images(3, 4, True))]
    samples = VariantImages(making, loaders(normals), loaders(defects), loaders(small_images(4, 3, True)))
    variants = {precision: folder / f"model-{precision}.onnx" for precision in (FP16, INT8)}
    reports = {name: build_variant(name, model, samples, LENIENT, path) for name, path in variants.items()}
    return Made(model, samples, variants, reports)


@pytest.mark.parametrize("precision", [FP16, INT8])
def test_a_variant_is_smaller_and_judges_alike(made: Made, precision: str) -> None:
    report = made.reports[precision]
    assert (report["exported"], report["reasons"]) == (True, [])
    path = made.variants[precision]
    assert path.stat().st_size == report["model_bytes"] < 0.9 * made.model.stat().st_size
    assert report["model_digest"] == digest_file(path)
    assert report["reference_digest"] == digest_file(made.model)
    assert report["image_auroc"]["model"] > 0.9
    counts = [report[name]["images"] for name in ("calibration_normals", "held_out_defects", "parity_images")]
    assert counts == [6, 6, 3]
    bound = {FP16: 0.5, INT8: 4.0}[precision]  # deviations of normal pixels, which power distances have few of
    for name in ("calibration_normals", "held_out_defects"):
        assert 0 < report[name]["map_difference_mean"] < bound
    flips = sum(report[name]["decision_flips"] for name in ("calibration_normals", "held_out_defects", "parity_images"))
    assert report["flip_share"] == pytest.approx(flips / 15, abs=1e-6)


@pytest.mark.parametrize("precision", [FP16, INT8])
def test_the_report_says_what_the_predictor_answers(made: Made, precision: str) -> None:
    one, other = Predictor(made.model), Predictor(made.variants[precision])
    assert other.metadata == replace(one.metadata, precision=precision)
    images = [load() for load in made.samples.normals]
    pairs = list(zip(one.predict(images), other.predict(images), strict=True))
    gaps = [np.abs(before.anomaly_map - after.anomaly_map).max() for before, after in pairs]
    assert made.reports[precision]["calibration_normals"]["map_difference"] == pytest.approx(
        max(gaps), rel=0.01, abs=1e-3
    )


@pytest.mark.parametrize("precision", [FP16, INT8])
def test_the_same_model_gives_the_same_bytes(made: Made, precision: str, tmp_path: Path) -> None:
    again = tmp_path / "again.onnx"
    report = build_variant(precision, made.model, made.samples, LENIENT, again)
    assert again.read_bytes() == made.variants[precision].read_bytes()
    assert report == made.reports[precision]
    content = again.read_bytes()
    for trace in (b".py", b"site-packages", b"/tmp", str(Path.cwd()).encode()):
        assert trace not in content


def types_of(path: Path) -> dict[str, set[int]]:
    """Type of node → the element types of its weights."""
    graph = onnx.load(path).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    found: dict[str, set[int]] = {}
    for node in graph.node:
        found.setdefault(node.op_type, set()).update(kinds[name] for name in node.input if name in kinds)
    return found


def test_float16_stays_inside_the_network(made: Made) -> None:
    types = types_of(made.variants[FP16])
    assert types["Conv"] >= {onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT}  # the smoothing is float32
    graph = onnx.load(made.variants[FP16]).graph
    assert {item.type.tensor_type.elem_type for item in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    halves = {name for node in graph.node if node.op_type == "Cast" for name in node.output if name.endswith("_half")}
    for node in graph.node:
        if node.op_type in ("ReduceL2", "MatMul", "TopK", "ReduceMean", "Div", "Sub"):
            assert not halves.intersection(node.input), node.name
    # what casts to float16 feeds, and the scores, which no float16 rounds on their way out
    last = {name: node for node in graph.node for name in node.output}
    assert last["score"].op_type != "Cast"
    assert last["anomaly_map"].op_type != "Cast"


def test_int8_quantises_convolutions_a_channel_and_leaves_the_memory_alone(made: Made) -> None:
    graph = onnx.load(made.variants[INT8]).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    weights = [
        tensors[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in tensors and len(tensors[node.input[0]].dims) == 4
    ]
    assert len(weights) > 10
    for weight in weights:
        values = onnx.numpy_helper.to_array(weight)
        assert values.dtype == np.int8
        assert np.abs(values.astype(int)).max() <= 64  # 7 bits: nothing saturates on a CPU without VNNI
        assert weight.dims[1] > 1  # no depthwise one
    scales = {node.input[0]: node.input[1] for node in graph.node if node.op_type == "DequantizeLinear"}
    assert all(list(tensors[scales[weight.name]].dims) == [weight.dims[0]] for weight in weights)
    quantised = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    for node in graph.node:
        if node.op_type in ("MatMul", "ReduceL2", "TopK"):
            assert not quantised.intersection(node.input), node.name


@pytest.mark.parametrize(
    ("figures", "limits", "words"),
    [
        ({"image_auroc": {"loss": 0.011}, "flip_share": 0.0}, Limits(0.01, 0.0), ["loses 0.011 image AUROC"]),
        ({"image_auroc": {"loss": -0.2}, "flip_share": 0.1}, Limits(0.0, 0.05), ["10.0% of the images otherwise"]),
        ({"image_auroc": {"loss": 0.01}, "flip_share": 0.05}, Limits(0.01, 0.05), []),
        ({"image_auroc": {"loss": float("nan")}, "flip_share": 0.5}, Limits(1.0, 0.1), ["loses nan", "50.0%"]),
    ],
)
def test_what_speaks_against_a_variant(figures: dict, limits: Limits, words: list[str]) -> None:
    found = objections(figures, limits)
    assert len(found) == len(words)
    assert all(word in sentence for word, sentence in zip(words, found, strict=True))


def test_a_variant_that_loses_too_much_is_not_left(made: Made, tmp_path: Path) -> None:
    # at the very score of an image no rounding is small enough
    model, samples = onnx.load(made.model), made.samples
    predictor, variant = Predictor(made.model), Predictor(made.variants[INT8])
    image = samples.normals[0]()
    before, after = predictor.predict([image])[0].score, variant.predict([image])[0].score
    metadata = replace(predictor.metadata, threshold=(before + after) / 2)
    onnx.helper.set_model_props(model, metadata.to_properties())
    moved = tmp_path / "model.onnx"
    onnx.save(model, moved)
    path = tmp_path / "variants" / "model-int8.onnx"
    report = build_variant(INT8, moved, samples, Limits(1.0, 0.0), path)
    assert report["exported"] is False
    assert len(report["reasons"]) == 1
    assert "of the images otherwise (export.max_flip_share 0)" in report["reasons"][0]
    assert report["calibration_normals"]["decision_flips"] >= 1
    assert list(path.parent.iterdir()) == []


def test_values_that_float16_cannot_hold_are_found_although_a_cpu_would_answer(made: Made, tmp_path: Path) -> None:
    model = onnx.load(made.model)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "student.answer.0.bias")
    values = onnx.numpy_helper.to_array(bias) + np.float32(30_000)
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    large = tmp_path / "model.onnx"
    onnx.save(model, large)
    report = build_variant(FP16, large, made.samples, LENIENT, tmp_path / "v.onnx")
    assert report["exported"] is False
    assert "too near to the largest that float16 holds" in report["reasons"][0]
    assert not (tmp_path / "v.onnx").exists()


@pytest.mark.parametrize("precision", [FP16, INT8])
def test_predict_reads_a_variant(made: Made, precision: str, tmp_path: Path) -> None:
    image = (made.samples.defects[0]() * 255).round().astype(np.uint8).transpose(1, 2, 0)
    write_png(tmp_path / "in" / "part.png", np.ascontiguousarray(image))
    command = ["predict", str(made.variants[precision]), str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    with (tmp_path / "out" / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 1
    json.loads((tmp_path / "out" / "results.json").read_text())
