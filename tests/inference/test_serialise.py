"""Verdict, score, regions, mask and stamp of one image agree, whatever the threshold."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flawsmith.inference.draw import caption_parts, draw_prediction
from flawsmith.inference.metadata import PREFIX, ModelMetadata
from flawsmith.inference.options import PredictOptions
from flawsmith.inference.predictor import Prediction, Predictor, flags, is_defective, region_threshold
from flawsmith.inference.prefetch import Answer
from flawsmith.inference.serialise import describe
from flawsmith.inference.writers import Pictures

FINITE = st.floats(-1e6, 1e6)


def predicted(predictor: Predictor, score: float, hottest: float) -> Prediction:
    """A flat map with one hot patch, and any score."""
    anomaly_map = np.full((32, 32), -9, np.float32)
    anomaly_map[8:12, 8:12] = hottest
    return Prediction(score, is_defective(score, predictor.threshold), anomaly_map)


@pytest.mark.parametrize(("score", "hottest"), [(0.4, 0.9), (0.5, 0.9), (0.6, 0.9), (0.6, 0.3), (0.4, 0.3)])
def test_a_region_is_shown_in_a_defective_image_alone_and_everywhere(
    model: Path, tmp_path: Path, score: float, hottest: float
) -> None:
    predictor = Predictor(model)
    prediction = predicted(predictor, score, hottest)
    has_region = score > predictor.threshold and hottest > predictor.pixel_threshold
    answer = describe(prediction, predictor, 64, 64)
    assert (answer["region_count"], len(answer["regions"])) == (int(has_region), int(has_region))
    assert (answer["peak_x"], answer["peak_y"]) == (17, 17)  # the peak is told of every image

    image = np.full((3, 64, 64), 0.5, np.float32)
    Pictures(tmp_path, predictor, PredictOptions(overlays=False, masks=True)).add(
        "a.png", Answer("a", image, prediction)
    )
    with Image.open(tmp_path / "masks" / "a.png") as mask:
        assert np.asarray(mask).any() == has_region
    unmarked = Prediction(score, prediction.is_defective, np.minimum(prediction.anomaly_map, 0))
    outline = (draw_prediction(image, prediction, predictor) == 255) & (
        draw_prediction(image, unmarked, predictor) != 255
    )
    assert outline.all(axis=2).any() == has_region
    assert any("no region, peak at 17, 17" in part for part in caption_parts(prediction, predictor, 64, 64)) == (
        prediction.is_defective and not has_region
    )


@given(FINITE, FINITE, st.integers(-2, 2), st.sampled_from([None, 0.1, -3.3, 0.0]))
def test_the_verdict_follows_from_what_is_shown(
    threshold: float, typical: float, off: int, fixed: float | None
) -> None:
    threshold = threshold if fixed is None else fixed
    predictor = object.__new__(Predictor)
    predictor.metadata = ModelMetadata("c", threshold, 0.5, 0.05, 0, 1, "", "", "", typical_score=typical)
    predictor.threshold, predictor.pixel_threshold = threshold, 0.5
    score = np.float32(threshold)
    for _ in range(abs(off)):
        score = np.nextafter(score, np.float32(np.copysign(np.inf, off)))
    prediction = predicted(predictor, float(score), 0.9)
    answer = describe(prediction, predictor, 32, 32)
    is_bad = answer["verdict"] == "defective"
    assert is_bad == prediction.is_defective == bool(flags(np.asarray([score]), threshold)[0])
    assert (answer["score"] > answer["threshold"]) == is_bad
    assert (answer["relative_score"] > 1) == is_bad
    assert predictor.relative_score(threshold) == 1
    relative, raw = caption_parts(prediction, predictor, 32, 32)[:2]
    assert (float(relative.split()[1]) > 1) == is_bad
    left, _, right = raw.removeprefix("score ").split()
    assert (float(left) > float(right)) == is_bad


@given(st.lists(FINITE, min_size=2, max_size=9), FINITE, FINITE)
def test_a_relative_score_never_falls_where_the_score_rises(
    scores: list[float], threshold: float, typical: float
) -> None:
    predictor = object.__new__(Predictor)
    predictor.metadata = ModelMetadata("c", threshold, 0.5, 0.05, 0, 1, "", "", "", typical_score=typical)
    predictor.threshold = threshold
    found = [predictor.relative_score(score) for score in sorted(scores)]
    assert found == sorted(found)


def test_a_typical_normal_part_lies_at_0_and_an_older_file_has_a_scale_too(
    write_model: Callable[..., Path], metadata: ModelMetadata
) -> None:
    predictor = Predictor(write_model(threshold=-2.0, typical_score=-6.0))
    assert [predictor.relative_score(score) for score in (-6.0, -4.0, -2.0, 2.0)] == [0, 0.5, 1, 2]
    properties = metadata.to_properties()
    del properties[f"{PREFIX}typical_score"]
    assert "typical_score" in {item.name for item in fields(ModelMetadata)}
    older = Predictor(write_model(properties=properties))  # threshold 0.5
    assert [older.relative_score(score) for score in (0.0, 0.5, 1.0)] == [0, 1, 2]
    assert Predictor(write_model(properties=properties), threshold=0.25).relative_score(0.25) == 1


@given(st.floats(-1e300, 1e300), st.integers(-2, 2))
def test_map_values_are_held_against_the_pixel_threshold_exactly(threshold: float, off: int) -> None:
    with np.errstate(over="ignore"):
        value = np.float32(threshold)
        for _ in range(abs(off)):
            value = np.nextafter(value, np.float32(np.copysign(np.inf, off)))
    assert (value > region_threshold(True, threshold)) == (float(value) > threshold)
    assert not value > region_threshold(False, threshold)
