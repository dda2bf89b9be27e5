"""A folder of images without any layout."""

from pathlib import Path

import numpy as np
import pytest

from flawsmith.data.bare import name_folder, open_folder
from flawsmith.data.images import write_png
from flawsmith.errors import UserError


def write_images(folder: Path, count: int = 3) -> None:
    for seed in range(count):
        write_png(folder / f"{seed}.png", np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8))


def test_a_bare_folder_holds_good_images_and_no_test_set(tmp_path):
    write_images(tmp_path / "parts")
    found = open_folder(tmp_path / "parts")
    assert [path.name for path in found.normals()] == ["0.png", "1.png", "2.png"]
    assert found.labelled_test() == ()


def test_a_layout_is_read_as_one(tmp_path):
    for part in ("train/good", "test/good", "test/hole"):
        write_images(tmp_path / part)
    found = open_folder(tmp_path)
    assert {path.parent for path in found.normals()} == {tmp_path / "train/good"}
    assert len(found.labelled_test()) == 6


@pytest.mark.parametrize("made", ["", "empty/notes.txt", "mixed/good/0.png"])
def test_what_cannot_be_used_is_refused_by_name(tmp_path, made):
    folder = tmp_path / (made or "missing").split("/")[0]
    if made.endswith(".png"):
        write_images(tmp_path / Path(made).parent)
    elif made:
        folder.mkdir()
        (tmp_path / made).write_text("no image")
    with pytest.raises(UserError, match=folder.name):
        open_folder(folder).normals()


def test_too_few_images_are_told_of_the_folder_itself(tmp_path):
    write_images(tmp_path / "parts")
    with pytest.raises(UserError, match=r"parts holds 3 image"):
        open_folder(tmp_path / "parts").split(0.2, 0)


def test_a_product_is_named_by_its_folder_not_by_the_layout(tmp_path):
    assert name_folder(tmp_path / "screw") == name_folder(tmp_path / "screw/train/good") == "screw"
    assert name_folder(Path("/")) == "parts"
