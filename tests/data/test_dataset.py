"""A category folder: what is found, how it is split, and which mistakes of a user are named."""

import hashlib
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flawsmith import errors
from flawsmith.config import load_settings
from flawsmith.data import dataset
from flawsmith.data.config import DataSettings
from flawsmith.data.dataset import (
    GOOD,
    PARTS,
    Dataset,
    LabelledImage,
    Tile,
    even_shares,
    iter_tiles,
    labelled_part,
    load_images,
    load_labelled,
    load_tiles,
    plan_tiles,
)
from flawsmith.data.images import Reading, on_levels, read_image, read_size, resize_image, write_png
from flawsmith.data.tiling import Tiling
from flawsmith.errors import UserError

SIZE = 8


def picture(path: Path, value: int = 100, height: int = SIZE, width: int = SIZE) -> Path:
    write_png(path, np.full((height, width, 3), value, np.uint8))
    return path


def empty_files(folder: Path, names: list[str]) -> None:
    """Listing and splitting look at names alone, so the files need no pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def category(root: Path, normals: int = 10) -> Dataset:
    empty_files(root / "bottle" / "train" / "good", [f"{index:03d}.png" for index in range(normals)])
    return Dataset(root / "bottle")


def labelled(root: Path) -> Dataset:
    bottle = category(root)
    picture(bottle.folder / "test" / "good" / "000.png")
    picture(bottle.folder / "test" / "scratch" / "000.png")
    mask = np.zeros((SIZE, SIZE), np.bool_)
    mask[2:4, 2:4] = True
    write_png(bottle.folder / "ground_truth" / "scratch" / "000_mask.png", mask)
    return bottle


def test_normals_are_images_sorted_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "bottle" / "train" / "good"
    empty_files(
        folder, ["b.JPG", "a.png", "c.jpeg", "d.bmp", "e.tif", "f.TIFF", "notes.txt", ".hidden.png", "Thumbs.db"]
    )
    (folder / "g.png").mkdir()
    bottle = Dataset(tmp_path / "bottle")
    assert [path.name for path in bottle.normals()] == ["a.png", "b.JPG", "c.jpeg", "d.bmp", "e.tif", "f.TIFF"]
    assert bottle.category == "bottle"


@pytest.mark.parametrize("build", [lambda folder: None, lambda folder: folder.mkdir(parents=True)])
def test_no_normals_names_folder_and_remedy(tmp_path: Path, build: object) -> None:
    folder = tmp_path / "bottle" / "train" / "good"
    build(folder)  # type: ignore[operator]
    with pytest.raises(UserError, match=r"train/good holds no image \(\.png.*'bottle'") as caught:
        Dataset(tmp_path / "bottle").normals()
    assert str(folder) in str(caught.value)


def split_names(folder: Path, fraction: float, seed: int) -> tuple[set[str], set[str]]:
    split = Dataset(folder).split(fraction, seed)
    for part in (split.fit, split.calibration):
        assert list(part) == sorted(part)
    return {path.name for path in split.fit}, {path.name for path in split.calibration}


@given(st.integers(3, 60), st.floats(0.01, 0.5), st.integers(0, 5))
def test_the_split_is_deterministic_disjoint_and_complete(
    tmp_path_factory: pytest.TempPathFactory, count: int, fraction: float, seed: int
) -> None:
    root = tmp_path_factory.mktemp("split")
    folder = category(root, count).folder
    expected = max(2, round(count * fraction))
    if count - expected < 8:
        with pytest.raises(UserError, match="too few to learn from"):
            Dataset(folder).split(fraction, seed)
        return
    fit, calibration = split_names(folder, fraction, seed)
    elsewhere = category(tmp_path_factory.mktemp("elsewhere"), count).folder
    assert (fit, calibration) == split_names(elsewhere, fraction, seed)
    assert count < 40 or (fit, calibration) != split_names(folder, fraction, seed + 1)
    assert not fit & calibration
    assert len(fit | calibration) == count
    assert len(calibration) == expected


@given(st.integers(16, 40), st.text("abcdefgh", min_size=1, max_size=8), st.integers(0, 5))
def test_adding_an_image_moves_at_most_one_other(
    tmp_path_factory: pytest.TempPathFactory, count: int, name: str, seed: int
) -> None:
    folder = category(tmp_path_factory.mktemp("grow"), count).folder
    fit, calibration = split_names(folder, 0.2, seed)
    (folder / "train" / "good" / f"{name}.png").touch()
    fit_after, calibration_after = split_names(folder, 0.2, seed)
    assert len(fit & calibration_after) + len(calibration & fit_after) <= 1


def test_the_labelled_test_set(tmp_path: Path) -> None:
    bottle = labelled(tmp_path)
    found = bottle.labelled_test()
    assert [(item.path.name, item.defect, item.is_defective) for item in found] == [
        ("000.png", "good", False),
        ("000.png", "scratch", True),
    ]
    assert found[0].mask_path is None
    assert found[1].mask_path == bottle.folder / "ground_truth" / "scratch" / "000_mask.png"
    image, mask = load_labelled(found[0], Tiling((SIZE, SIZE)))
    assert image.shape == (3, SIZE, SIZE)
    assert not mask.any()
    _, mask = load_labelled(found[1], Tiling((SIZE, SIZE)))
    assert mask.sum() == 4
    _, mask = load_labelled(found[1], Tiling((SIZE // 2, SIZE // 2)))
    assert mask.sum() == 1


def images_of(counts: dict[str, int]) -> list[LabelledImage]:
    return [
        LabelledImage(Path("test") / defect / f"{index:03d}.png", defect, None)
        for defect, count in counts.items()
        for index in range(count)
    ]


@given(st.dictionaries(st.sampled_from([GOOD, "dent", "scratch", "oil"]), st.integers(1, 30)), st.randoms())
def test_the_halves_share_nothing_lose_nothing_and_halve_every_type(counts: dict[str, int], random: Random) -> None:
    images = images_of(counts)
    research, report = (labelled_part(images, part) for part in ("research", "report"))
    assert labelled_part(images, "all") == tuple(images)
    assert not set(research) & set(report)
    assert sorted(research + report, key=images.index) == images
    for half in (research, report):
        assert list(half) == sorted(half, key=images.index)
    for defect, count in counts.items():
        assert sum(image.defect == defect for image in research) == (count + 1) // 2
    shuffled = random.sample(images, len(images))
    assert set(labelled_part(shuffled, "report")) == set(report)


@given(st.integers(1, 20), st.integers(0, 20))
def test_a_half_does_not_depend_on_other_types(good: int, dents: int) -> None:
    alone = labelled_part(images_of({GOOD: good}), "report")
    beside = labelled_part(images_of({GOOD: good, "dent": dents}), "report")
    assert alone == tuple(image for image in beside if image.defect == GOOD)


def test_the_rule_of_the_halves_is_the_documented_one() -> None:
    images = images_of({"dent": 5})
    ranked = sorted(images, key=lambda image: hashlib.sha256(f"dent/{image.path.stem}".encode()).hexdigest())
    assert set(labelled_part(images, "research")) == set(ranked[::2])
    assert set(labelled_part(images, "report")) == set(ranked[1::2])
    twins = [LabelledImage(Path("test/dent") / name, "dent", None) for name in ("a.jpg", "a.png")]
    assert labelled_part(twins, "research") + labelled_part(twins, "report") == tuple(twins)
    with pytest.raises(ValueError, match="'half'"):
        labelled_part(twins, "half")


def test_settings_know_the_same_parts(params_path: Path) -> None:
    for part in PARTS:
        assert load_settings(params_path, {"evaluate.part": part}).evaluate.part == part
    with pytest.raises(UserError, match=f"must be one of {', '.join(PARTS)}"):
        load_settings(params_path, {"evaluate.part": "half"})


def test_no_test_folder_is_no_labelled_test_set(tmp_path: Path) -> None:
    bottle = category(tmp_path)
    assert bottle.labelled_test() == ()
    (bottle.folder / "test" / "good").mkdir(parents=True)
    assert bottle.labelled_test() == ()


def test_an_image_without_a_mask_has_a_verdict_alone(tmp_path: Path) -> None:
    bottle = labelled(tmp_path)
    (bottle.folder / "ground_truth" / "scratch" / "000_mask.png").unlink()
    good, bad = bottle.labelled_test()
    assert (good.has_pixel_labels, bad.is_defective, bad.has_pixel_labels) == (True, True, False)
    assert not load_labelled(bad, Tiling((SIZE, SIZE)))[1].any()


@pytest.mark.parametrize("folder", ["OK", "ok", "Good", "normal", "PASS"])
def test_good_parts_have_many_names(tmp_path: Path, folder: str) -> None:
    bottle = labelled(tmp_path)
    (bottle.folder / "test" / "good").rename(bottle.folder / "test" / folder)
    found = {item.shown_name: item.defect for item in bottle.labelled_test()}
    assert found == {f"{folder}/000.png": GOOD, "scratch/000.png": "scratch"}


@pytest.mark.parametrize(
    "name",
    [
        "000_mask.bmp",
        "000_mask.PNG",
        "000.png",
        "000.TIF",
        "000_label.bmp",
        "000_GT.png",
        "000_Mask.jpg",
        "000-mask.png",
    ],
)
def test_masks_are_found_by_common_names_in_any_case(tmp_path: Path, name: str) -> None:
    bottle = labelled(tmp_path)
    folder = bottle.folder / "ground_truth" / "scratch"
    (folder / "000_mask.png").rename(folder / name)
    assert bottle.labelled_test()[1].mask_path == folder / name


def test_masks_of_no_image_are_refused_or_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    errors._told.clear()
    bottle = labelled(tmp_path)
    folder = bottle.folder / "ground_truth" / "scratch"
    (folder / "000_mask.png").rename(folder / "mask_of_000.png")
    with pytest.raises(UserError, match=r"mask_of_000\.png is the mask of no image in test \(1 such in all\)"):
        bottle.labelled_test()
    picture(folder / "000_mask.png", 255)
    assert bottle.labelled_test()[1].mask_path == folder / "000_mask.png"
    assert "mask_of_000.png is the mask of no image" in caplog.text
    (folder / "001_mask.gif").touch()
    bottle.labelled_test()
    assert "1 passed over (1 .gif); a mask is one of .png, " in caplog.text


@pytest.mark.parametrize(("removed", "missing"), [("good", "test/good"), ("scratch", "test/<defect>")])
def test_a_one_sided_test_set_is_refused(tmp_path: Path, removed: str, missing: str) -> None:
    bottle = labelled(tmp_path)
    (bottle.folder / "test" / removed / "000.png").unlink()
    with pytest.raises(UserError, match=f"without any image in {missing}"):
        bottle.labelled_test()


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (np.zeros((SIZE, SIZE), np.bool_), r"000_mask\.png marks no pixel; correct it, or remove it"),
        (np.ones((4, 6), np.bool_), "is 6 x 4 pixels but its image is 8 x 8"),
    ],
)
def test_an_empty_mask_or_one_of_another_shape_is_refused(tmp_path: Path, mask: np.ndarray, said: str) -> None:
    bottle = labelled(tmp_path)
    write_png(bottle.folder / "ground_truth" / "scratch" / "000_mask.png", mask)
    with pytest.raises(UserError, match=said):
        load_labelled(bottle.labelled_test()[1], Tiling((SIZE, SIZE)))


def test_a_mask_of_the_same_proportions_is_scaled_and_what_is_odd_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    errors._told.clear()
    bottle = labelled(tmp_path)
    half = np.full((SIZE // 2, SIZE // 2), 2, np.uint8)
    half[0] = 0
    write_png(bottle.folder / "ground_truth" / "scratch" / "000_mask.png", half)
    expected = np.ones((SIZE, SIZE), np.bool_)
    expected[:2] = False
    for _ in range(2):
        np.testing.assert_array_equal(load_labelled(bottle.labelled_test()[1], Tiling((SIZE, SIZE)))[1], expected)
    assert len(caplog.messages) == 3
    for words in ("every value but 0 marks a defect", "has not its image's size", "marks 75% of its image"):
        assert words in caplog.text


def test_images_of_mixed_sizes_come_to_one(tmp_path: Path) -> None:
    paths = [picture(tmp_path / "a.png", 10, 5, 9), picture(tmp_path / "b.png", 20, 16, 16)]
    images = load_images(paths, (SIZE, SIZE))
    assert images.shape == (2, 3, SIZE, SIZE)
    np.testing.assert_allclose(images[0], 10 / 255, atol=1e-6)
    np.testing.assert_array_equal(images[1], load_images(paths[1:], (SIZE, SIZE))[0])


def test_the_size_limit_reaches_every_reader(tmp_path: Path) -> None:
    bottle = labelled(tmp_path)
    for item in bottle.labelled_test():
        with pytest.raises(UserError, match="over the limit of 6"):
            load_labelled(item, Tiling((SIZE, SIZE)), reading=Reading(63))
    with pytest.raises(UserError, match="over the limit of 6"):
        load_images([bottle.labelled_test()[0].path], (SIZE, SIZE), reading=Reading(63))
    for scale in (0.0, 0.5):
        data = tiled_data(scale, max_megapixels=63e-6)
        with pytest.raises(UserError, match="over the limit of 6"):
            list(iter_tiles(plan_tiles([bottle.labelled_test()[0].path], data), data))


def tiled_data(scale: float, **changes: object) -> DataSettings:
    """Settings with tiles that are smaller, and so quicker to cut, than params.yaml allows."""
    data = DataSettings(scale=scale)
    data.__dict__.update({"image_size": 32, "tile_overlap": 8, "max_tiles": 100, **changes})
    return data


def drawn(path: Path, height: int, width: int, seed: int) -> Path:
    write_png(path, np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))
    return path


def test_without_a_scale_each_image_is_one_stretched_tile(tmp_path: Path) -> None:
    paths = [drawn(tmp_path / f"{index}.png", 20 + index, 90, index) for index in range(3)]
    data = tiled_data(0.0, max_tiles=2)  # decides nothing without tiles
    tiles = plan_tiles(paths, data)
    assert tiles == tuple(Tile(path) for path in paths)
    stretched = np.rint(load_images(paths, (32, 32)) * 255).astype(np.uint8)
    np.testing.assert_array_equal(load_tiles(tiles, data), stretched)


def test_tiles_are_cut_from_the_scaled_image_and_each_image_is_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [drawn(tmp_path / "a.png", 100, 160, 0), drawn(tmp_path / "b.png", 20, 300, 1)]
    data, decoded = tiled_data(0.5), []
    tiles = plan_tiles(paths, data)
    assert {tile.path for tile in tiles} == set(paths)
    monkeypatch.setattr(
        dataset, "read_image", lambda path, reading: (decoded.append(path), read_image(path, reading))[1]
    )
    for tile, pixels in zip(tiles, iter_tiles(tiles, data), strict=True):
        assert pixels.shape == (3, 32, 32)
        assert tile.place is not None
        height, width = (50, 80) if tile.path == paths[0] else (10, 150)
        whole = on_levels(resize_image(read_image(tile.path), (height, width)))
        inside = whole[:, tile.place[0] :, tile.place[1] :][:, :32, :32]
        np.testing.assert_array_equal(pixels[:, : inside.shape[1], : inside.shape[2]], inside)
    assert decoded == paths


def test_a_cap_takes_tiles_evenly_and_shows_all_parts(tmp_path: Path) -> None:
    paths = [drawn(tmp_path / f"{index}.png", 128, 128, index) for index in range(8)]
    everything = plan_tiles(paths, tiled_data(1.0, max_tiles=1000))
    capped = plan_tiles(paths, tiled_data(1.0, max_tiles=43))
    assert len(capped) == 43
    assert set(capped) <= set(everything)
    assert list(capped) == [tile for tile in everything if tile in set(capped)]
    assert {sum(tile.path == path for tile in capped) for path in paths} == {5, 6}
    assert len({tile.place for tile in capped}) > 20  # of 25; without a shift from image to image 6
    assert plan_tiles(paths, tiled_data(1.0, max_tiles=43)) == capped
    assert len({tile.path for tile in plan_tiles(paths, tiled_data(1.0, max_tiles=3))}) == 3


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(0, 200))
def test_shares_are_even_and_use_all_that_is_allowed(available: list[int], limit: int) -> None:
    shares = even_shares(available, limit)
    assert sum(shares) == min(limit, sum(available))
    assert all(0 <= share <= count for share, count in zip(shares, available, strict=True))
    least = min(
        (share for share, count in zip(shares, available, strict=True) if share < count), default=max(shares, default=0)
    )
    assert max(shares, default=0) <= least + 1


def test_an_image_turned_by_its_camera_is_cut_as_it_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (200, 64)).save(path, exif=exif)
    data = tiled_data(0.5)
    assert read_size(path) == read_image(path).shape[1:] == (200, 64)
    tiles = plan_tiles([path], data)
    assert len(tiles) == 4
    assert len(load_tiles(tiles, data)) == 4


def test_normals_that_stretching_harms_are_told_in_one_sentence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [picture(tmp_path / f"{width}.png", 9, 32, width) for width in (32, 48, 500, 600)]
    dataset.tell_losses(paths, tiled_data(0.0), "bottle")
    dataset.tell_losses(paths, tiled_data(0.5), "bottle")
    (said,) = caplog.messages
    assert said.startswith("bottle: 2 of 4 normal images lose detail, such as 500.png: 500 x 32 pixels become 32 x 32")
