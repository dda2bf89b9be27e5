"""Measuring, and the file that a registered model carries: what is written comes back, what is damaged is refused."""

import weakref
import zipfile
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from monitoring_samples import measurement, part

from flawsmith.data.images import FloatImage, resize_image
from flawsmith.data.tiling import Tiling
from flawsmith.detector.teacher import Teacher, pooled_features
from flawsmith.errors import UserError
from flawsmith.inference.predictor import Predictor
from flawsmith.monitoring.reference import (
    STORED_AS,
    Measurement,
    image_statistics,
    load_reference,
    measure,
    save_reference,
    teacher_digest,
)


@pytest.fixture
def some() -> Measurement:
    generator = np.random.default_rng(0)
    return measurement(generator.normal(size=6), generator.normal(size=(6, 4)))


def equal(first: Measurement, second: Measurement) -> bool:
    pairs = [(getattr(first, item.name), getattr(second, item.name)) for item in fields(Measurement)]
    return all(np.array_equal(one, other) and np.asarray(one).dtype == np.asarray(other).dtype for one, other in pairs)


def test_scores_and_peaks_are_those_of_the_product(predictor: Predictor, teacher: Teacher) -> None:
    images = [part(index) for index in range(5)]
    found = measure(predictor, teacher, ((f"{index}.png", image) for index, image in enumerate(images)), batch=2)
    answers = predictor.predict(images)
    assert found.names.tolist() == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    assert found.scores.tolist() == [np.float32(answer.score) for answer in answers]
    assert found.peaks.tolist() == [answer.anomaly_map.max() for answer in answers]
    assert found.detector_digest == predictor.metadata.detector_digest
    assert len(found) == len(found.features) == len(found.image_statistics) == 5


def test_features_are_means_and_deviations_of_every_level(predictor: Predictor, teacher: Teacher) -> None:
    found = measure(predictor, teacher, [("a", part(0))])
    assert found.features.shape == (1, 2 * sum(teacher.channels))
    assert found.features.dtype == np.float32
    means, deviations = np.split(found.features[0], 2)
    assert (deviations > 0).mean() > 0.9
    assert not np.allclose(means, deviations)


def test_an_image_is_measured_the_same_in_any_batch_and_size(predictor: Predictor, teacher: Teacher) -> None:
    alone = measure(predictor, teacher, [("b", part(1))])
    among = measure(predictor, teacher, [("a", part(0)), ("b", part(1)), ("c", part(2))])
    np.testing.assert_allclose(among.features[1], alone.features[0], rtol=1e-4, atol=1e-5)
    large = np.ascontiguousarray(part(1).repeat(2, axis=1).repeat(2, axis=2))
    mixed = measure(predictor, teacher, [("a", part(0)), ("large", large)])
    assert len(mixed) == 2


def test_a_tiled_model_scores_tiles_and_looks_at_the_whole(
    predictor: Predictor, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = np.ascontiguousarray(part(1).repeat(2, axis=1))
    whole = measure(predictor, teacher, [("a", resize_image(large, predictor.input_shape))])
    monkeypatch.setattr(predictor, "tiling", Tiling(predictor.input_shape, 1.0, 0))
    found = measure(predictor, teacher, [("a", large), ("b", part(0))])
    assert found.scores.tolist() == [np.float32(predictor.predict([image])[0].score) for image in (large, part(0))]
    np.testing.assert_array_equal(found.image_statistics[0], whole.image_statistics[0])
    np.testing.assert_allclose(found.features[0], whole.features[0], rtol=1e-4, atol=1e-5)


def test_only_a_batch_of_images_is_held(predictor: Predictor, teacher: Teacher) -> None:
    given: list[weakref.ref[FloatImage]] = []
    peak = 0

    def images() -> Iterator[tuple[str, FloatImage]]:
        nonlocal peak
        for index in range(20):
            image = part(index)
            given.append(weakref.ref(image))
            peak = max(peak, sum(reference() is not None for reference in given))
            yield str(index), image

    assert len(measure(predictor, teacher, images(), batch=4)) == 20
    assert peak <= 9  # the batch before, the one being read, and the image in the reader's hand


def test_darker_images_have_other_features(teacher: Teacher) -> None:
    plain, dark = (pooled_features(teacher, np.stack([part(0, light)])) for light in (1.0, 0.7))
    assert np.abs(plain - dark).max() > 0.05


def test_image_statistics_by_hand() -> None:
    flat = np.full((3, 4, 4), 0.25, np.float32)
    assert image_statistics(flat) == pytest.approx((0.25, 0.0, 0.0))
    stripes = np.zeros((3, 4, 4), np.float32)
    stripes[:, :, ::2] = 1.0  # every step to the side is 1, none up or down; the deviation is 0.5
    assert image_statistics(stripes) == pytest.approx((0.5, 0.5, 1.0))
    assert image_statistics(stripes * 0.5) == pytest.approx((0.25, 0.25, 1.0))  # light leaves sharpness


def test_nothing_to_measure_is_refused(predictor: Predictor, teacher: Teacher) -> None:
    with pytest.raises(UserError, match="no image to measure"):
        measure(predictor, teacher, [])


def test_a_teacher_digest_knows_its_weights(teacher: Teacher) -> None:
    other = Teacher("resnet18", (1, 2, 3))
    assert teacher_digest(teacher) == teacher_digest(teacher)
    before = teacher_digest(other)
    other.state_dict()["body.conv1.weight"][0] += 1
    assert len({teacher_digest(teacher), before, teacher_digest(other)}) == 3


def test_what_is_saved_comes_back(some: Measurement, tmp_path: Path) -> None:
    named = replace(some, names=np.asarray([f"ünï/{index}.png" for index in range(6)]))
    save_reference(tmp_path / "new" / "reference.npz", named)
    assert equal(load_reference(tmp_path / "new" / "reference.npz"), named)


def test_equal_measurements_give_equal_bytes(
    some: Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_reference(tmp_path / "a.npz", some)
    monkeypatch.setattr("time.time", lambda: 2e9)
    monkeypatch.setattr("time.localtime", lambda *_: (2033, 5, 18, 3, 33, 20, 2, 138, 0))
    save_reference(tmp_path / "b.npz", some)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def write(path: Path, some: Measurement, **changes: Any) -> None:
    arrays = {STORED_AS.get(item.name, item.name): getattr(some, item.name) for item in fields(Measurement)} | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scores": None}, "scores"),
        ({"scores": np.zeros(0, np.float32)}, "no score"),
        ({"scores": np.float32(1.0)}, "no score"),
        ({"scores": np.zeros(5, np.float32)}, "beside 5 scores"),
        ({"scores": np.zeros(6)}, "float64, not float32"),
        ({"peaks": np.full(6, np.nan, np.float32)}, "`peaks` holds NaN"),
        ({"features": np.zeros(6, np.float32)}, r"`features` has shape \(6,\)"),
        ({"features": np.zeros((6, 0), np.float32)}, r"`features` has shape \(6, 0\)"),
        ({"looks": np.zeros((6, 2), np.float32)}, "`image_statistics` has 2 columns"),
        ({"names": np.arange(6)}, "not text"),
        ({"names": np.asarray([print] * 6, object)}, "allow_pickle"),
        ({"detector_digest": np.arange(3)}, "`detector_digest` is no text"),
    ],
)
def test_a_damaged_reference_is_refused(
    some: Measurement, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "reference.npz"
    write(path, some, **changes)
    with pytest.raises(UserError, match=reason) as caught:
        load_reference(path)
    assert str(caught.value).startswith(f"{path} is no drift reference (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "reference.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is no drift reference"):
        load_reference(path)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_a_truncated_or_flipped_reference_is_refused(some: Measurement, tmp_path: Path, keep: float) -> None:
    path = tmp_path / "reference.npz"
    save_reference(path, some)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(UserError, match="is no drift reference"):
        load_reference(path)
    with zipfile.ZipFile(tmp_path / "whole.npz", "w") as archive:
        archive.writestr("scores.npy", b"\x93NUMPY garbage")
    with pytest.raises(UserError, match="is no drift reference"):
        load_reference(tmp_path / "whole.npz")


def test_a_missing_reference_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.npz does not exist"):
        load_reference(tmp_path / "nowhere.npz")
