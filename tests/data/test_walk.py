"""One rule for what counts as an image, wherever folders are looked at."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flawsmith.data import walk
from flawsmith.data.dataset import Dataset, normal_name
from flawsmith.data.walk import Found, find
from flawsmith.errors import UserError
from flawsmith.inference.sources import find_images


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names(found: Found) -> list[str]:
    return [found.name_of(path) for path in found.images]


def lock(monkeypatch: pytest.MonkeyPatch, *closed: Path) -> None:
    """Folders that nobody may list, for root neither."""
    scan = os.scandir

    def refuse(path: Any = ".") -> Iterator[Any]:
        if Path(path) in closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(walk.os, "scandir", refuse)


def test_what_is_found_and_what_is_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "a.PNG", "2026-11-01/b.jpe", "2026-11-01/deep/c.JFIF", "d.webp", "e.gif", "f.GIF", "readme")
    touch(tmp_path, ".hidden.png", "._a.png", ".git/x.png", "Thumbs.db", "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg")
    os.mkfifo(tmp_path / "pipe.png")
    found = find(tmp_path)
    assert names(found) == ["2026-11-01/b.jpe", "2026-11-01/deep/c.JFIF", "a.PNG"]
    assert str(found) == ("3 images used, 10 passed over (5 hidden, 2 .gif, 1 .webp, 1 no file, 1 without suffix)")
    assert str(find(tmp_path / "missing")) == "0 images used"
    touch(tmp_path / "many", *(f"{kind}{n}.{kind}" for kind in "bcdefghij" for n in range(2)), "scan.heic")
    assert str(find(tmp_path / "many")).endswith("(1 .heic, 2 .b, 2 .c, 2 .d, 2 .e, 2 .f, 2 .g, 2 .h, 2 more)")


def test_linked_folders_are_entered_once_and_loops_are_not(tmp_path: Path) -> None:
    touch(tmp_path, "line/a.png", "line/day/b.png", "nas/c.png", "nas/deep/d.png", "nas/deep/deeper/e.png")
    for link, target in {
        "line/cam2": "../nas",
        "line/latest": "day",  # the same images again
        "line/up": "..",  # holds the folder itself
        "nas/deep/round": "../../nas",
        "line/part.png": "../nas/c.png",
    }.items():
        (tmp_path / link).symlink_to(target)
    found = find(tmp_path / "line")
    assert names(found) == [
        "a.png", "cam2/c.png", "cam2/deep/d.png", "cam2/deep/deeper/e.png", "day/b.png", "part.png",
    ]  # fmt: skip
    assert found.passed_over == {"linked twice": 2, "linked back": 1}
    assert found.linked == (tmp_path / "line" / "cam2",)
    assert names(find(tmp_path / "line", leave_out=tmp_path / "nas")) == ["a.png", "day/b.png", "part.png"]


def test_what_cannot_be_looked_at_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "line/a.png", "line/night/b.png")
    (tmp_path / "line" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "line" / "self").symlink_to("self")
    lock(monkeypatch, tmp_path / "line" / "night")
    given = find_images([tmp_path / "line"])
    assert [file.name for file in given.files] == ["a.png"]
    assert {item.name: item.reason for item in given.unreadable} == {
        "gone.png": "gone.png is a link to nothing",
        "night": "night cannot be listed (Permission denied)",
        "self": "self cannot be looked at (Too many levels of symbolic links)",
    }
    lock(monkeypatch, tmp_path / "line")
    assert [item.name for item in find_images([tmp_path / "line"]).unreadable] == ["."]
    shell = find_images([tmp_path / "line" / "a.png", tmp_path / "line" / "gone.png"])  # as `line/*.png` gives them
    assert (len(shell.files), len(shell.unreadable)) == (1, 1)


def test_training_and_testing_refuse_what_they_cannot_read(tmp_path: Path) -> None:
    touch(tmp_path, "train/good/a.png", "test/good/b.png")
    for place in ("train/good", "test/good"):
        (tmp_path / place / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"good cannot be read as a whole: gone\.png is a link to nothing; mend"):
        Dataset(tmp_path).normals()
    with pytest.raises(UserError, match=r"test cannot be read as a whole: good/gone\.png is a link"):
        Dataset(tmp_path).labelled_test()


def test_images_in_folders_by_date_are_used_and_told_apart(tmp_path: Path) -> None:
    days = [f"train/good/{day}/{n}.png" for day in ("2026-11-01", "2026-11-02") for n in range(4)]
    touch(tmp_path, *days, *(f"train/good/{n}.png" for n in range(4)))
    touch(tmp_path, "test/good/day/1.png", "test/dent/day/1.png", "test/dent/1.png")
    touch(tmp_path, "ground_truth/dent/day/1_mask.png", "ground_truth/dent/1_mask.png")
    dataset = Dataset(tmp_path)
    split = dataset.split(0.25, 0)
    assert len({normal_name(path) for path in (*split.fit, *split.calibration)}) == 12
    assert {path.parent.name for path in split.calibration} != {"good"}
    assert [(image.defect, image.name, image.mask_path) for image in dataset.labelled_test()] == [
        ("dent", "1.png", tmp_path / "ground_truth/dent/1_mask.png"),
        ("dent", "day/1.png", tmp_path / "ground_truth/dent/day/1_mask.png"),
        ("good", "day/1.png", None),
    ]
    touch(tmp_path, "test/dent/night/2.png", "test/dent/night/1.png", "ground_truth/dent/2_mask.png")
    by_name = {image.name: image.mask_path for image in dataset.labelled_test() if image.is_defective}
    assert by_name["night/2.png"] == tmp_path / "ground_truth/dent/2_mask.png"  # no other image is called so
    assert by_name["night/1.png"] is None
    touch(tmp_path, "test/stray.png")
    with pytest.raises(UserError, match=r"stray\.png lies in no folder of a type"):
        dataset.labelled_test()
