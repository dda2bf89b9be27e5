import csv
import errno
import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from line_samples import Score, files_of, plate
from PIL import Image

import flawsmith.inference.prefetch as prefetch_module
import flawsmith.inference.writers as writers_module
from flawsmith import errors
from flawsmith.data.images import read_image, write_png
from flawsmith.errors import UserError
from flawsmith.files import digest_name
from flawsmith.inference.folder import predict_folder
from flawsmith.inference.options import PredictOptions, PredictReport
from flawsmith.inference.predictor import Predictor
from flawsmith.inference.sources import Unreadable, find_images


def rows(out: Path) -> dict[str, dict[str, str]]:
    with (out / "results.csv").open(newline="") as stream:
        return {row["file"]: row for row in csv.DictReader(stream)}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Every kind of file a user's folder may hold."""
    root = tmp_path / "parts"
    plate(root / "a_good.png")
    plate(root / "b_defect.jpg", bright=True, quality=95)
    plate(root / "deep" / "er" / "c_gray.bmp", bright=True, mode="L")
    plate(root / "d_cmyk.jpg", mode="CMYK")
    plate(root / "e_alpha.png", bright=True, mode="RGBA")
    plate(root / "f_palette.tif", mode="P")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    plate(root / "g_rotated.jpg", bright=True, size=(80, 40), exif=exif)
    Image.fromarray(np.full((20, 30), 200 * 257, np.uint16)).save(root / "h_deep.png")
    (root / "i_empty.png").touch()
    (root / "j_text.jpg").write_text("no image")
    whole = plate(root / "k_cut.png", size=(200, 200)).read_bytes()
    (root / "k_cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "notes.txt").write_text("passed over")
    plate(root / ".hidden" / "x.png")
    return root


def test_every_image_of_a_mixed_folder_gets_its_verdict(score: Score, mixed: Path, tmp_path: Path) -> None:
    report = score(mixed, batch=3)
    found = rows(tmp_path / "out")
    assert {name: row["verdict"] for name, row in found.items()} == {
        "a_good.png": "good",
        "b_defect.jpg": "defective",
        "d_cmyk.jpg": "good",
        "deep/er/c_gray.bmp": "defective",
        "e_alpha.png": "defective",
        "f_palette.tif": "good",
        "g_rotated.jpg": "defective",
        "h_deep.png": "defective",
        "i_empty.png": "unreadable",
        "j_text.jpg": "unreadable",
        "k_cut.png": "unreadable",
    }
    assert list(found) == sorted(found)
    assert float(found["h_deep.png"]["score"]) == pytest.approx(200 / 255, abs=1e-5)
    assert (found["g_rotated.jpg"]["width"], found["g_rotated.jpg"]["height"]) == ("40", "80")
    assert (report.good, report.defective, report.unreadable, report.total) == (3, 5, 3, 11)
    for bad in report.skipped:
        assert bad.reason.startswith(bad.name)
        assert str(tmp_path) not in bad.reason
        assert found[bad.name]["error"] == bad.reason
        assert found[bad.name]["score"] == ""


def test_each_overlay_lies_in_its_folder_and_has_its_images_size(score: Score, mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    score(mixed, out=out)
    readable = [name for name, row in rows(out).items() if row["verdict"] != "unreadable"]
    assert files_of(out / "overlays").keys() == {str(Path(name).with_suffix(".png")) for name in readable}
    for name in readable:
        with Image.open((out / "overlays" / name).with_suffix(".png")) as overlay:
            assert overlay.size == read_image(mixed / name).shape[:0:-1]


def test_the_json_tells_where_the_defect_is(score: Score, tmp_path: Path) -> None:
    plate(tmp_path / "in" / "part.png", bright=True, size=(96, 64))
    score()
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["model"]["category"] == "plate"
    assert content["model"]["threshold"] == 0.5
    (image,) = content["images"]
    assert (image["file"], image["verdict"], image["region_count"]) == ("part.png", "defective", 1)
    (region,) = image["regions"]
    # the bright field: x 0-48, y 16-32, seen through a map whose pixels are 3 x 2
    assert region["x"] == 0
    assert abs(region["y"] - 16) <= 2
    assert abs(region["width"] - 48) <= 3
    assert abs(region["height"] - 16) <= 4
    assert 16 <= image["peak_y"] < 32
    assert image["peak_x"] < 48


def test_the_same_folder_gives_the_same_bytes_whatever_the_batch(score: Score, mixed: Path, tmp_path: Path) -> None:
    outs = [tmp_path / "one", tmp_path / "two"]
    for out, batch in zip(outs, (1, 8), strict=True):
        score(mixed, out=out, batch=batch)
    assert files_of(outs[0]) == files_of(outs[1])


def test_a_folder_without_an_image_and_a_missing_one_are_refused(score: Score, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").touch()
    with pytest.raises(UserError, match="holds no image"):
        score()
    with pytest.raises(UserError, match="nowhere does not exist"):
        score(tmp_path / "nowhere")
    with pytest.raises(UserError, match="No input"):
        find_images([])
    assert not (tmp_path / "out").exists()


def test_names_are_relative_to_what_holds_all_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = plate(tmp_path / "a" / "1.png"), plate(tmp_path / "b" / "1.png")
    odd = tmp_path / "odd.dat"
    odd.write_bytes(first.read_bytes())

    def names(*inputs: Path) -> list[str]:
        return [file.name for file in find_images(inputs).files]

    assert names(tmp_path / "a") == ["1.png"]
    assert names(first) == ["1.png"]
    assert names(tmp_path / "b", tmp_path / "a") == ["a/1.png", "b/1.png"]
    assert names(first, tmp_path / "a", second) == ["a/1.png", "b/1.png"]  # each once
    assert names(odd) == ["odd.dat"]  # named explicitly, so it is tried
    monkeypatch.chdir(tmp_path / "a")
    assert names(Path()) == names(Path("../a")) == ["1.png"]
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "part.png").symlink_to(first)
    assert names(tmp_path / "linked") == ["part.png"]


def test_files_that_differ_in_their_suffix_alone_get_an_overlay_each(score: Score, tmp_path: Path) -> None:
    for name in ("1.png", "1.jpg", "2.jpg"):
        plate(tmp_path / "in" / name)
    score()
    assert files_of(tmp_path / "out" / "overlays").keys() == {"1.png.png", "1.jpg.png", "2.png"}


@pytest.mark.parametrize(
    "names",
    [
        ("Part.jpg", "part.png", "part.jpg", "part.jpg.png"),
        ("\u00e4.png", "a\u0308.png", "A\u0308.jpg"),  # one letter or two code points
        ("stra\u00dfe.png", "STRASSE.png"),
        ("A/1.png", "a/1.png"),
        ("x" * 251 + ".jpg", "x" * 251 + ".png", "\u68c0" * 83 + ".png", "x" * 250 + ".tif"),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_pictures_get_names_that_fit_and_differ_on_every_file_system(
    score: Score, tmp_path: Path, names: tuple[str, ...], is_stream: bool
) -> None:
    for name in names:
        plate(tmp_path / "in" / name)
    if is_stream:
        reader, writer = os.pipe()
        os.write(writer, "".join(f"{tmp_path / 'in' / name}\n" for name in names).encode())
        os.close(writer)
        report = score(Path("-"), stdin=reader)
        os.close(reader)
    else:
        report = score()
    assert report.total == report.good == len(names)
    pictures = set(files_of(tmp_path / "out" / "overlays"))
    assert len(pictures) == len(names)
    assert all(len(part.encode()) <= 255 for name in pictures for part in Path(name).parts)
    if not is_stream:  # what comes later is not known beforehand: there the file system is asked
        assert len({unicodedata.normalize("NFC", name).casefold() for name in pictures}) == len(names)
    images = json.loads((tmp_path / "out" / "results.json").read_text())["images"]
    assert {image["overlay"].removeprefix("overlays/") for image in images} == pictures


@pytest.mark.parametrize("is_folding", [False, True])
def test_a_picture_that_cannot_be_written_under_its_name_gets_another(
    score: Score, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_folding: bool
) -> None:
    """A file system with a lower limit, a folder of that name, or another file where case counts for nothing."""
    for name in ("a.png", "b.png", "c.png"):
        plate(tmp_path / "in" / name)
    write = writers_module.write_png

    def refuse(path: Path, pixels: Any) -> None:
        if path.name == "b.png" and not is_folding:
            raise OSError(errno.ENAMETOOLONG, "File name too long")
        write(path, pixels)

    if is_folding:
        exists = Path.exists
        monkeypatch.setattr(Path, "exists", lambda path: path.name == "b.png" or exists(path))
        (tmp_path / "out" / "overlays").mkdir(parents=True)
        monkeypatch.setattr(writers_module.os, "listdir", lambda _: ["overlays"])
    monkeypatch.setattr(writers_module, "write_png", refuse)
    report = score(batch=1)
    assert report.good == 3
    assert files_of(tmp_path / "out" / "overlays").keys() == {"a.png", f"{digest_name('b.png')}.png", "c.png"}


def test_one_picture_that_cannot_be_written_at_all_does_not_end_the_batch(
    score: Score, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.png", "b.png"):
        plate(tmp_path / "in" / name)
    write, failed = writers_module.write_png, []

    def refuse(path: Path, pixels: Any) -> None:
        if len(failed) < 2:
            failed.append(path)
            raise OSError(errno.EINVAL, "Invalid argument")
        write(path, pixels)

    monkeypatch.setattr(writers_module, "write_png", refuse)
    with caplog.at_level("WARNING"):
        assert score(batch=1).good == 2
    assert "a.png is not in overlays (Invalid argument)" in caplog.text
    assert files_of(tmp_path / "out" / "overlays").keys() == {"b.png"}


def test_earlier_results_are_replaced_and_never_taken_for_inputs(score: Score, tmp_path: Path) -> None:
    plate(tmp_path / "a.png")
    old = plate(tmp_path / "b.png")
    for _ in range(2):
        report = score(tmp_path)
        assert report.total == 2
    old.unlink()
    score(tmp_path)
    assert files_of(tmp_path / "out").keys() == {"results.csv", "results.json", "overlays/a.png"}


def test_a_folder_of_the_users_own_files_is_never_overwritten(score: Score, tmp_path: Path) -> None:
    image = plate(tmp_path / "in" / "a.png")
    for out in (tmp_path / "in", tmp_path, image):
        with pytest.raises(UserError, match=r"name a (new )?folder"):
            score(out=out)
    overlays = tmp_path / "out" / "overlays"
    score(image)
    with pytest.raises(UserError, match="name a new folder"):  # scoring overlays into the folder they lie in
        score(overlays / "a.png")
    assert image.is_file()
    assert (overlays / "a.png").is_file()


def test_results_can_go_where_a_link_points(score: Score, tmp_path: Path) -> None:
    plate(tmp_path / "in" / "a.png")
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for _ in range(2):
        score()
    assert (tmp_path / "out").is_symlink()
    assert files_of(tmp_path / "disk").keys() == {"results.csv", "results.json", "overlays/a.png"}


def test_a_failure_half_way_leaves_the_earlier_results(
    score: Score, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        plate(tmp_path / "in" / f"{name}.png")
    out = tmp_path / "out"
    score(out=out)
    before = files_of(out)
    written: list[Path] = []

    def full_disk(path: Path, pixels: object) -> None:
        if written:
            raise OSError("No space left on device")
        written.append(path)

    monkeypatch.setattr(writers_module, "write_png", full_disk)
    with pytest.raises(OSError, match="No space left"):
        score(out=out, batch=1)
    assert files_of(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "model.onnx", "out"]


def test_memory_holds_one_batch_at_a_time(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(10):
        plate(tmp_path / "in" / f"{index}.png", size=(20, 20))
    predictor = Predictor(model)
    sizes: list[int] = []
    answer = predictor.predict

    def counted(images: Any) -> Any:
        sizes.append(len(images))
        return answer(images)

    monkeypatch.setattr(predictor, "predict", counted)
    predict_folder(predictor, [tmp_path / "in"], tmp_path / "out", PredictOptions(batch=4))
    assert sizes == [4, 4, 2]
    sizes.clear()
    monkeypatch.setattr(prefetch_module, "HELD_PIXELS", 1600)  # a batch may have half: two originals of 20 x 20
    predict_folder(predictor, [tmp_path / "in"], tmp_path / "out", PredictOptions(batch=4))
    assert sizes == [2] * 5


def test_a_map_hot_all_over_lists_no_more_regions_than_are_of_use(score: Score, tmp_path: Path) -> None:
    dots = np.zeros((32, 32, 3), np.uint8)
    dots[::2, ::2] = 255
    write_png(tmp_path / "in" / "dots.png", dots)
    score()
    (image,) = json.loads((tmp_path / "out" / "results.json").read_text())["images"]
    assert image["region_count"] == 256
    assert len(image["regions"]) == 100


def test_an_image_over_the_size_limit_is_reported(score: Score, tmp_path: Path) -> None:
    plate(tmp_path / "in" / "a.png")
    report = score(max_pixels=100)
    assert "over the limit" in report.skipped[0].reason
    assert (tmp_path / "out" / "results.csv").is_file()


@pytest.mark.parametrize("name", ["batch", "workers", "every"])
def test_options_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is 0"):
        PredictOptions(**{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("defective", "bad", "strict", "code"),
    [(0, 0, True, 0), (2, 0, False, 0), (2, 0, True, 3), (0, 1, True, 2), (2, 1, False, 2), (2, 1, True, 3)],
)
def test_the_exit_status_tells_unreadable_files_and_defects(defective: int, bad: int, strict: bool, code: int) -> None:
    report = PredictReport(Path("out"), 5, defective, bad, skipped=(Unreadable("a.png", "a.png is empty"),) * bad)
    assert report.exit_code(fail_on_defect=strict) == code


def test_images_that_stretching_harms_are_told_in_one_sentence(
    tmp_path: Path, score: Score, caplog: pytest.LogCaptureFixture
) -> None:
    errors._told.clear()
    for name in ("a.png", "b.png"):
        write_png(tmp_path / "in" / name, np.zeros((30, 300, 3), np.uint8))
    score()
    (said,) = caplog.messages
    assert "a.png loses detail" in said
    assert "docs/tiles.md" in said
