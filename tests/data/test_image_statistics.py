"""Copies of one picture and pictures of nothing, told by what files show."""

import io
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from flawsmith.config import load_settings
from flawsmith.data import statistics
from flawsmith.data.images import Reading
from flawsmith.data.statistics import find_copies, read_statistics
from flawsmith.errors import UserError
from flawsmith.layout import Layout

SIDE = 128
LIMIT = Reading(10**6)


def brushed(seed: int) -> Image.Image:
    grain = ndimage.gaussian_filter(np.random.default_rng(seed).normal(0, 60, (SIDE, SIDE)), (0.7, 3))
    return Image.fromarray(np.clip(110 + grain, 0, 255).astype(np.uint8))


def woven(seed: int) -> Image.Image:
    """A regular texture: two honest pieces differ in phase, light and noise alone."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE] + generator.uniform(0, 8, (2, 1, 1))
    weave = 40 * np.sin(rows * 2 * np.pi / 8) * np.sin(columns * 2 * np.pi / 8)
    return Image.fromarray(np.clip(120 + weave + generator.normal(0, 12, (SIDE, SIDE)), 0, 255).astype(np.uint8))


def aligned(seed: int) -> Image.Image:
    """Parts of one shape, clamped: honest ones are alike but for a jitter, their grain and noise."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE] - SIDE / 2 + generator.normal(0, 0.3, (2, 1, 1))
    disc = 120 / (1 + np.exp(np.hypot(rows, columns) - 42))
    grain = ndimage.gaussian_filter(generator.normal(0, 1, (SIDE, SIDE)), 2) * 20 + generator.normal(0, 2, (SIDE, SIDE))
    return Image.fromarray(np.clip(60 + disc + grain, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return Image.open(buffer).convert("L")


def noisy(image: Image.Image) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 2, (SIDE, SIDE))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "the same pixels": lambda image: image,
    "another format": jpeg,
    "half the size": lambda image: image.resize((SIDE // 2, SIDE // 2), Image.Resampling.LANCZOS),
    "brighter": lambda image: image.point(lambda value: min(255, value + 12)),
    "shot again": noisy,
}


def saved(folder: Path, pictures: dict[str, Image.Image]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        picture.save(folder / name)
    return sorted(folder / name for name in pictures)


def groups(paths: list[Path]) -> list[list[str]]:
    return [[path.name for path in group] for group in find_copies(paths, read_statistics(paths, LIMIT))]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *product((brushed, woven), COPIES),
        # half the size or shot again they are as unlike as two honest ones
        *product((aligned,), ("the same pixels", "another format", "brighter")),
    ],
)
def test_copies_are_told_and_honest_parts_are_not(
    tmp_path: Path, kind: Callable[[int], Image.Image], change: str
) -> None:
    pictures = {f"{seed:02d}.png": kind(seed) for seed in range(16)}
    pictures |= {f"copy-{seed}.bmp": COPIES[change](kind(seed)) for seed in (3, 7)}
    assert groups(saved(tmp_path, pictures)) == [["03.png", "copy-3.bmp"], ["07.png", "copy-7.bmp"]]


@pytest.mark.parametrize("kind", [brushed, woven, aligned])
def test_mirrored_and_turned_images_are_no_copies(tmp_path: Path, kind: Callable[[int], Image.Image]) -> None:
    pictures = {f"{seed:02d}.png": kind(seed) for seed in range(12)}
    pictures |= {"mirrored.png": kind(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT), "turned.png": kind(1).rotate(90)}
    assert groups(saved(tmp_path, pictures)) == []


def test_what_was_seen_is_kept_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, kept = (
        saved(tmp_path / "good", {f"{seed}.png": brushed(seed) for seed in range(4)}),
        tmp_path / "statistics.npz",
    )
    first = read_statistics(paths, LIMIT, kept)
    (tmp_path / "good" / "0.png").write_bytes((tmp_path / "good" / "3.png").read_bytes())
    monkeypatch.setattr(statistics, "read_image", lambda *_: pytest.fail("was decoded again"))
    again = read_statistics(paths, LIMIT, kept)
    assert [one.pixels for one in again] == [first[place].pixels for place in (3, 1, 2, 3)]
    monkeypatch.undo()
    kept.write_bytes(b"damaged")
    assert [one.pixels for one in read_statistics(paths, LIMIT, kept)] == [one.pixels for one in again]


def test_every_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    paths = saved(tmp_path, {f"{seed}.png": brushed(seed) for seed in range(4)})
    for path in paths[1:3]:
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1\.png cannot.*2\.png cannot"):
        read_statistics(paths, LIMIT)


def plate(root: Path, pictures: dict[str, Image.Image]) -> Layout:
    saved(root / "data" / "plate" / "train" / "good", pictures)
    params = Path(__file__).parents[2] / "params.yaml"
    return Layout(load_settings(params, {"categories": ["plate"]}), "plate", root)


def test_copies_stay_on_one_side_and_count_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures = {f"{seed:02d}.png": brushed(seed) for seed in range(40)}
    before = plate(tmp_path / "before", pictures).split()
    with caplog.at_level("WARNING", logger="flawsmith"):
        after = plate(tmp_path / "after", pictures | {f"x{name}": jpeg(it) for name, it in pictures.items()}).split()
    assert not before.copies
    assert "80 images show only 40 different picture(s) (" in caplog.text
    fit, calibration = ([path.name.lstrip("x") for path in part] for part in (after.fit, after.calibration))
    assert not set(fit) & set(calibration)
    assert len(calibration) == len(set(calibration)) == len(before.calibration) == 8
    assert sorted(fit) == sorted([*set(fit), *set(fit)])


@pytest.mark.parametrize("value", [0, 255])
def test_an_image_of_one_value_is_named_and_refused(tmp_path: Path, value: int) -> None:
    pictures = {f"{seed:02d}.png": brushed(seed) for seed in range(12)}
    layout = plate(tmp_path, pictures | {"05.png": Image.new("L", (SIDE, SIDE), value)})
    with pytest.raises(UserError, match=r"1 image\(s\) show one value all over \(05\.png\).*remove"):
        layout.split()


def test_copies_of_too_few_pictures_are_too_few_normals(tmp_path: Path) -> None:
    layout = plate(tmp_path, {f"{number:02d}.png": brushed(number // 4) for number in range(20)})
    with pytest.raises(UserError, match=r"20 image\(s\) of 5 different pictures, too few.*add 5 or more"):
        layout.split()


def test_a_read_only_project_costs_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(statistics, "atomic_file", refused)
    paths = saved(tmp_path, {"0.png": brushed(0)})
    assert len(read_statistics(paths, LIMIT, tmp_path / "kept.npz")) == 1
