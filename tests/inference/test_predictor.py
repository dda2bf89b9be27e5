import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from flawsmith.data.images import on_levels, resize_image
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.inference.predictor import Predictor, is_defective

MODULES = [path.stem for path in Path(sys.modules["flawsmith.inference.predictor"].__file__ or "").parent.glob("*.py")]


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random((3, height, width), np.float32)


def test_map_and_score_are_those_of_the_resized_image(model: Path) -> None:
    image = noise(50, 70)
    (prediction,) = Predictor(model).predict([image])
    expected = on_levels(resize_image(image, (32, 32))).mean(axis=0)
    np.testing.assert_allclose(prediction.anomaly_map, expected, atol=1e-6)
    assert prediction.score == pytest.approx(expected.max(), abs=1e-6)


def test_a_batch_of_mixed_sizes_answers_as_single_images_do(model: Path) -> None:
    predictor = Predictor(model)
    images = [noise(8 + 9 * n, 64 - 7 * n, n) for n in range(6)]
    together = predictor.predict(images)
    for image, prediction in zip(images, together, strict=True):
        (alone,) = predictor.predict([image])
        assert alone.score == prediction.score
        np.testing.assert_array_equal(alone.anomaly_map, prediction.anomaly_map)
    assert predictor.predict([]) == []


@pytest.mark.parametrize(("value", "verdict"), [(0.25, False), (0.5, False), (0.75, True)])
def test_only_a_score_strictly_above_the_threshold_is_a_defect(model: Path, value: float, verdict: bool) -> None:
    (prediction,) = Predictor(model).predict([np.full((3, 32, 32), value, np.float32)])
    assert prediction.is_defective is verdict
    assert is_defective(value, 0.5) is verdict


def test_thresholds_come_from_the_file_unless_given(model: Path) -> None:
    predictor = Predictor(model)
    assert (predictor.threshold, predictor.pixel_threshold) == (0.5, 0.4)
    moved = Predictor(model, threads=1, threshold=0.0, pixel_threshold=0.9)
    assert (moved.threshold, moved.pixel_threshold) == (0.0, 0.9)
    assert moved.predict([np.full((3, 4, 4), 0.25, np.float32)])[0].is_defective


@pytest.mark.parametrize("content", [b"", b"no model at all", b"\x08\x0a" + bytes(200)])
def test_a_file_that_is_no_onnx_model_is_refused(tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.onnx cannot be loaded as an ONNX model"):
        Predictor(path)
    assert capfd.readouterr().err == ""


def test_a_truncated_model_is_refused(model: Path) -> None:
    model.write_bytes(model.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"model\.onnx"):
        Predictor(model)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.onnx", tmp_path):
        with pytest.raises(UserError, match="does not exist or is no file"):
            Predictor(path)


def test_a_model_of_another_tool_is_refused(write_model: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="not a flawsmith model"):
        Predictor(write_model(properties={"author": "someone"}))


def test_a_model_with_another_interface_is_refused(write_model: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"takes .*pixels"):
        Predictor(write_model(image_name="pixels"))
    with pytest.raises(UserError, match=r"not \(batch, 3, height, width\)"):
        Predictor(write_model(batch=1))
    with pytest.raises(UserError, match=r"metadata.*must be square"):
        Predictor(write_model(shape=(32, 64), scale=1.0))


@pytest.mark.parametrize("arguments", [{"threads": 0}, {"threshold": float("nan")}, {"pixel_threshold": float("inf")}])
def test_arguments_out_of_range_are_refused(model: Path, arguments: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        Predictor(model, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((32, 32), np.float32),
        np.zeros((4, 8, 8), np.float32),
        np.zeros((3, 0, 8), np.float32),
        np.full((3, 8, 8), 255, np.float32),
        np.full((3, 8, 8), np.nan, np.float32),
    ],
)
def test_an_image_of_wrong_shape_or_range_is_refused(model: Path, image: NDArray[np.float32]) -> None:
    with pytest.raises(UserError, match="Image 1 has"):
        Predictor(model).predict([noise(4, 4), image])


def test_a_model_that_answers_nan_is_no_verdict(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Predictor(model)

    class Broken:
        def run(self, names: object, feed: object) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            return np.zeros((1, 1, 32, 32), np.float32), np.array([np.nan], np.float32)

    monkeypatch.setattr(predictor._network, "_session", Broken())
    with pytest.raises(FlawsmithError, match="NaN"):
        predictor.predict([noise(4, 4)])


def test_inference_loads_nothing_that_trains() -> None:
    imports = "\n".join(f"import flawsmith.inference.{name}" for name in MODULES if name != "__init__")
    heavy = "{'torch', 'timm', 'sklearn', 'matplotlib', 'pandas', 'onnx', 'diffusers'}"
    answer = subprocess.run(
        [sys.executable, "-c", f"import sys\n{imports}\nprint(sorted({heavy} & set(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(MODULES) > 4
    assert answer.stdout.strip() == "[]"
