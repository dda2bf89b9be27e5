import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_detector import Exported

from flawsmith.errors import FlawsmithError
from flawsmith.export import latency
from flawsmith.export.parity import Difference, certificate, compare, measure_parity, objections, time_predictor
from flawsmith.files import digest_file
from flawsmith.inference.predictor import Prediction, Predictor


def with_metadata(exported: Exported, path: Path, **changes: float) -> Predictor:
    """The exported model with other metadata, as somebody who edits the file would leave it."""
    model = onnx.load(exported.path)
    onnx.helper.set_model_props(model, replace(exported.metadata, **changes).to_properties())
    onnx.save(model, path)
    return Predictor(path)


def shifted(exported: Exported, shift: float) -> torch.nn.Module:
    """A detector whose maps and scores differ from the exported one's by `shift`."""
    detector = copy.deepcopy(exported.detector)
    forward = detector.forward
    detector.forward = lambda image: tuple(part + shift for part in forward(image))  # type: ignore[method-assign]
    return detector


def certify(
    exported: Exported,
    predictor: Predictor | None = None,
    detector: torch.nn.Module | None = None,
    tolerance: float = 1e-4,
) -> dict:
    return certificate(
        detector or exported.detector,
        exported.metadata.threshold,
        predictor or Predictor(exported.path),
        exported.path,
        exported.images,
        exported.sources,
        tolerance,
    )


def test_a_true_export_is_certified(exported: Exported) -> None:
    proof = certify(exported)
    assert set(proof["batches"]) == {"1", "8"}
    for figures in proof["batches"].values():
        assert 0 <= figures["map_difference"] < 1e-5
        assert 0 <= figures["score_difference"] < 1e-5
        assert figures["decision_flips"] == 0
    assert proof["model_digest"] == digest_file(exported.path)
    assert proof["images"][3] == {"file": "03.png", "digest": digest_file(exported.sources[3])}
    assert proof["versions"]["onnxruntime"]
    assert proof == certify(exported)  # no times in it


def test_a_difference_over_the_tolerance_fails_at_both_batches(exported: Exported) -> None:
    with pytest.raises(
        FlawsmithError, match=r"batch 1: maps differ by 0\.01.*batch 8: scores differ by 0\.00\d+ \(tolerance 0\.005"
    ) as error:
        certify(exported, detector=shifted(exported, 0.01), tolerance=0.005)
    assert error.value.exit_code == 1
    certify(exported, detector=shifted(exported, 1e-5), tolerance=0.005)


def test_a_flip_fails_although_the_difference_is_tolerated(exported: Exported) -> None:
    with pytest.raises(FlawsmithError, match=r"batch 1: \d+ decision\(s\) flipped"):
        certify(exported, detector=shifted(exported, -0.9), tolerance=1.0)


def test_a_tampered_threshold_in_the_file_fails(exported: Exported, tmp_path: Path) -> None:
    moved = with_metadata(exported, tmp_path / "m.onnx", threshold=-10.0)  # flags everything
    differences = measure_parity(exported.detector, exported.metadata.threshold, moved, exported.images)
    # 6 of 11 images are good; batches of 8 are filled up with the first five
    first = Predictor(exported.path).predict(list(exported.images))
    good = [not prediction.is_defective for prediction in first]
    assert [item.decision_flips for item in differences] == [sum(good), sum(good + good[:5])]
    assert sum(good) == 6
    with pytest.raises(FlawsmithError, match="6 decision"):
        certify(exported, predictor=moved)


def test_only_the_difference_of_the_worst_pixel_counts(exported: Exported) -> None:
    maps, scores = np.zeros((2, 1, 4, 4), np.float32), np.array([0.0, 1.0], np.float32)
    maps[1, 0, 2, 3] = 0.25
    answers = [
        Prediction(0.0, False, np.zeros((4, 4), np.float32)),
        Prediction(1.5, True, np.zeros((4, 4), np.float32)),
    ]
    assert compare(2, maps, scores, 0.5, answers) == Difference(2, 0.25, 0.5, 0)
    assert compare(2, maps, scores, 1.2, answers).decision_flips == 1


def test_large_values_are_compared_by_their_share() -> None:
    maps, scores = np.full((1, 1, 2, 2), 400.0, np.float32), np.full(1, -200.0, np.float32)
    answer = Prediction(-200.1, False, np.full((2, 2), 400.1, np.float32))
    difference = compare(1, maps, scores, 0.5, [answer])
    assert difference.map == pytest.approx(0.1 / 400, rel=1e-3)
    assert difference.score == pytest.approx(0.1 / 200, rel=1e-3)


@pytest.mark.parametrize("side", ["torch", "onnx"])
def test_nan_is_never_within_tolerance(side: str) -> None:
    clean, broken = np.zeros((1, 1, 2, 2), np.float32), np.full((1, 1, 2, 2), np.nan, np.float32)
    maps, answer = (broken, clean) if side == "torch" else (clean, broken)
    difference = compare(1, maps, np.zeros(1, np.float32), 0.5, [Prediction(0.0, False, answer[0, 0])])
    assert objections([difference], 1.0)


differences = st.builds(Difference, st.just(8), st.floats(0, 1), st.floats(0, 1), st.integers(0, 3))


@given(st.lists(differences, max_size=5), st.floats(0, 1))
def test_all_must_be_within_tolerance_without_a_flip(found: list[Difference], tolerance: float) -> None:
    assert (not objections(found, tolerance)) == all(
        max(item.map, item.score) <= tolerance and not item.decision_flips for item in found
    )


def test_latency_is_measured_in_turns_at_each_batch(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Predictor(exported.path, threads=1)
    sizes: list[int] = []
    answer: Callable = predictor.predict
    monkeypatch.setattr(predictor, "predict", lambda images: sizes.append(len(images)) or answer(images))
    figures = time_predictor(predictor, exported.images, rounds=5)
    assert sizes == [1, 8] * 8
    for batch, figure in figures.items():
        assert 0 < figure["p50_ms"] <= figure["p95_ms"]
        assert figure["images_per_second"] == pytest.approx(int(batch) * 1000 / figure["p50_ms"], rel=0.2)


def test_calls_are_timed_in_turns_without_the_first_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = [0.0], {"one": 0, "two": 0}
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])

    def call(name: str, milliseconds: float) -> None:
        clock[0] += 0.001 * milliseconds if asked[name] >= latency.WARM_UP else 100
        assert asked["one"] - asked["two"] == (name == "two")
        asked[name] += 1

    found = latency.measure_latency([partial(call, "one", 2), partial(call, "two", 5)], 7)
    np.testing.assert_allclose(found, [[2] * 7, [5] * 7])
    assert latency.measure_latency([], 3).shape == (0, 3)
