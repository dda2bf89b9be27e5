"""Tiles: they cover every image, merge to what the whole would give, and need no memory for it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from toy_onnx import SIZE, write_toy

from flawsmith.data.tiling import Tiling
from flawsmith.inference.predictor import Predictor
from flawsmith.inference.serialise import describe

sides = st.integers(1, 5 * SIZE)
tilings = st.builds(Tiling, st.just((SIZE, SIZE)), st.just(1.0), st.integers(0, SIZE // 2))


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random((3, height, width), np.float32)


def brightness(batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    maps = batch.mean(axis=1)
    return maps, maps.max(axis=(1, 2))


@given(tilings, sides, sides)
def test_tiles_lie_inside_and_cover_every_pixel(tiling: Tiling, height: int, width: int) -> None:
    places = tiling.places(height, width)
    assert len(set(places)) == len(places)
    covered = np.zeros((max(height, SIZE), max(width, SIZE)), np.bool_)
    for top, left in places:
        assert 0 <= top <= covered.shape[0] - SIZE
        assert 0 <= left <= covered.shape[1] - SIZE
        covered[top : top + SIZE, left : left + SIZE] = True
    assert covered.all()
    for starts in (sorted({top for top, _ in places}), sorted({left for _, left in places})):
        assert all(gap <= SIZE - tiling.overlap for gap in np.diff(starts))


@given(tilings, sides)
def test_weights_sum_to_one_and_are_full_at_the_borders(tiling: Tiling, length: int) -> None:
    weights, starts = tiling.weights(length), sorted({top for top, _ in tiling.places(length, 1)})
    total = np.zeros(max(length, SIZE))
    for row, start in zip(weights, starts, strict=True):
        assert (row > 0).all()
        total[start : start + SIZE] += row
    np.testing.assert_allclose(total, 1, atol=1e-12)
    assert len(starts) == 1 or weights[0, 0] == weights[-1, -1] == 1


def test_weights_fall_linearly_over_the_overlap() -> None:
    first, second = Tiling((8, 8), 1.0, 4).weights(12)
    np.testing.assert_allclose(first, [1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    np.testing.assert_allclose(second, first[::-1])


@given(tilings, sides, sides, st.integers(1, 9))
def test_a_pointwise_network_answers_in_tiles_as_on_the_whole(
    tiling: Tiling, height: int, width: int, batch: int
) -> None:
    image = noise(height, width)
    ((anomaly_map, score),) = tiling.answer(brightness, [image], batch)
    np.testing.assert_allclose(anomaly_map, image.mean(axis=0), atol=1e-6)
    assert score == pytest.approx(image.mean(axis=0).max(), abs=1e-6)


def test_images_of_many_sizes_share_batches_and_keep_their_answers() -> None:
    tiling, sizes = Tiling((SIZE, SIZE), 1.0, 8), []

    def run(batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        sizes.append(len(batch))
        return brightness(batch)

    images = [noise(height, width, height) for height, width in ((32, 32), (70, 33), (5, 200), (90, 90))]
    answers = tiling.answer(run, images, batch=4)
    assert set(sizes[:-1]) == {4}
    assert sum(sizes) == sum(len(tiling.places(*image.shape[1:])) for image in images)
    for image, (anomaly_map, score) in zip(images, answers, strict=True):
        ((alone, peak),) = tiling.answer(brightness, [image])
        np.testing.assert_array_equal(alone, anomaly_map)
        assert score == peak


def test_the_score_is_the_highest_of_the_tiles() -> None:
    def means(batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return batch[:, 0], batch.mean(axis=(1, 2, 3))

    image = np.zeros((3, 64, 96), np.float32)
    image[:, 32:, :32] = 1
    ((_, score),) = Tiling((32, 32), 1.0, 0).answer(means, [image])
    assert score == 1


def test_an_exported_model_sees_an_image_of_one_tile_as_it_sees_it_whole(tmp_path: Path) -> None:
    whole = Predictor(write_toy(tmp_path / "whole.onnx"))
    tiled = Predictor(write_toy(tmp_path / "tiled.onnx", scale=1.0, tile_overlap=8))
    for one, other in zip(*(model.predict([noise(SIZE, SIZE)]) for model in (whole, tiled)), strict=True):
        assert (one.score, one.is_defective) == (other.score, other.is_defective)
        np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
def test_an_exported_model_answers_at_working_resolution(tmp_path: Path, scale: float) -> None:
    predictor = Predictor(write_toy(tmp_path / "model.onnx", scale=scale, tile_overlap=10))
    images = [noise(150, 61), noise(20, 31, 1), noise(333, 50, 2)]
    for image, answer in zip(images, predictor.predict(images), strict=True):
        prepared = predictor.tiling.prepare(image)
        assert answer.anomaly_map.shape == tuple(round(scale * side) for side in image.shape[1:])
        np.testing.assert_allclose(answer.anomaly_map, prepared.mean(axis=0), atol=1e-6)
        assert answer.score == pytest.approx(prepared.mean(axis=0).max(), abs=1e-6)
        assert predictor.predict_prepared([prepared])[0].score == pytest.approx(answer.score, abs=1e-6)


@pytest.mark.parametrize(("shape", "scale", "overlap"), [
    ((32, 32), -0.5, 0), ((32, 32), float("inf"), 0), ((32, 32), 1.0, 17), ((32, 32), 1.0, -1), ((32, 64), 1.0, 0),
])  # fmt: skip
def test_a_tiling_that_cannot_be_is_refused(shape: tuple[int, int], scale: float, overlap: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        Tiling(shape, scale, overlap)


@pytest.mark.parametrize("shape", [(32, 96), (96, 32)])
def test_a_network_that_is_not_square_answers_in_its_shape_and_at_the_right_place(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    predictor = Predictor(write_toy(tmp_path / "model.onnx", shape=shape))
    image = np.zeros((3, 2 * shape[0], 2 * shape[1]), np.float32)
    image[:, 8:12, 40:44] = 1  # off the diagonal
    (answer,) = predictor.predict([image])
    assert predictor.input_shape == answer.anomaly_map.shape == shape
    assert np.argwhere(answer.anomaly_map > 0.5).tolist() == [[4, 20], [4, 21], [5, 20], [5, 21]]
    assert describe(answer, predictor, *image.shape[1:])["regions"][0].items() >= {"x": 40, "y": 8}.items()


MEASURE = """
import re, sys
from pathlib import Path
import numpy as np
from flawsmith.inference.predictor import Predictor

def peak():  # MiB; the peak that getrusage tells may be that of the process which started this one
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10

predictor = Predictor(Path(sys.argv[1]), threads=1)
predictor.predict([np.zeros((3, 600, 600), np.float32)])  # what the runtime itself needs
image = np.full((3, 8000, 2000), 0.25, np.float32)
before = peak()
(answer,) = predictor.predict([image])
assert answer.anomaly_map.shape == (round(8000 * predictor.metadata.scale), round(2000 * predictor.metadata.scale))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("scale", "limit"), [(1.0, 100), (0.5, 180)])
def test_a_large_image_costs_its_map_and_one_batch(tmp_path: Path, scale: float, limit: float) -> None:
    """8000 x 2000 pixels, 183 MiB: the map is 61 MiB; at half scale it is 15 MiB, the resized image 46 MiB, and while
    that is made one channel of the original, once in full and once half-way, 92 MiB.

    All 324 tiles of 256 pixels together would be 243 MiB."""
    model = write_toy(tmp_path / "model.onnx", scale=scale, tile_overlap=32, shape=(256, 256))
    answer = subprocess.run([sys.executable, "-c", MEASURE, str(model)], capture_output=True, text=True, check=True)
    print(f"peak above the image at scale {scale:g}: {float(answer.stdout):.0f} MiB")
    assert float(answer.stdout) < limit


@pytest.mark.parametrize(("height", "width", "scale"), [
    (8000, 300, "0.85"), (4096, 4096, "0.25"), (3000, 6000, "0.25"), (400, 700, "0.64"), (100, 200, "1"),
    (1024, 1024, ""), (256, 384, ""), (64, 64, ""),
])  # fmt: skip
def test_what_stretching_loses_is_said_with_the_scale_to_try(height: int, width: int, scale: str) -> None:
    said = Tiling((256, 256)).objection(height, width)
    assert bool(said) == bool(scale)
    assert not Tiling((height, width)).objection(height, width)
    assert (
        Tiling((height, width)).objection(height, 2 * width).startswith(f"{2 * width} x {height} pixels become {width}")
    )
    assert not scale or f"try data.scale {scale} (docs/tiles.md)" in said
    assert not Tiling((256, 256), scale=0.5).objection(height, width)
