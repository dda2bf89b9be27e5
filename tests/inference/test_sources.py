"""Where images come from: patterns, videos, and paths on a stream."""

import importlib.util
import json
import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from line_samples import Score, clip, json_lines, plate, start

from flawsmith.data.images import READING
from flawsmith.data.walk import SUFFIXES
from flawsmith.errors import UserError
from flawsmith.inference import video
from flawsmith.inference.sources import InputFile, Unreadable, find_images, read_stream, tasks_of
from flawsmith.inference.video import read_frames


def names(*inputs: Path, leave_out: Path | None = None) -> list[str]:
    return [file.name for file in find_images(inputs, leave_out).files]


def results(out: Path) -> dict[str, dict[str, Any]]:
    images = json.loads((out / "results.json").read_text())["images"]
    assert len({image["file"] for image in images}) == len(images)
    return {image["file"]: image for image in images}


def test_a_pattern_counts_as_its_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.png", "a/2.jpg", "b/1.png", "b/deep/3.bmp", ".hid/4.png"):
        plate(tmp_path / name)
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / "a" / "raw.dat").touch()
    monkeypatch.chdir(tmp_path)
    assert names(Path("*/1.png")) == ["a/1.png", "b/1.png"]
    assert names(tmp_path / "*" / "1.png") == ["a/1.png", "b/1.png"]
    assert names(Path("a/*")) == ["1.png", "2.jpg"]  # what is no image is passed over ...
    assert names(Path("a/*.*")) == ["1.png", "2.jpg"]
    assert names(Path("a/*.dat")) == ["raw.dat"]  # ... unless its suffix is asked for
    assert names(Path("b/**/*.bmp")) == ["3.bmp"]
    assert names(Path("*")) == ["a/1.png", "a/2.jpg", "b/1.png", "b/deep/3.bmp"]  # folders are searched
    assert names(Path("**/*.png"), Path("a/2.jpg")) == ["a/1.png", "a/2.jpg", "b/1.png"]
    assert names(Path("[ab]/?.png"), leave_out=Path("b")) == ["1.png"]
    with pytest.raises(UserError, match=r"c/\*\.png matches no image"):
        names(Path("c/*.png"))


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    plate(tmp_path / "1.png")
    plate(tmp_path / "[1].png")
    assert names(tmp_path / "[1].png") == ["[1].png"]


def stream_of(content: bytes) -> int:
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    return reading


def streamed(descriptor: int, leave_out: Path | None = None) -> list[InputFile | Unreadable]:
    return [item for item in read_stream(descriptor, leave_out, threading.Event(), Counter()) if item is not None]


def test_paths_on_a_stream_are_read_to_the_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plate(tmp_path / "parts" / "2.png")
    plate(tmp_path / "parts" / "1.png")
    (tmp_path / "empty").mkdir()
    odd = os.fsdecode(b"odd\xff.png")
    reading = stream_of(b"a.png\r\n\n  \n./b/../c.png\nparts\nempty\nout/overlays/x.png\nodd\xff.png\n/last.png")
    found = streamed(reading, Path("out"))
    os.close(reading)
    assert [item.name if isinstance(item, InputFile) else item for item in found] == [
        "a.png",
        "c.png",
        "parts/1.png",
        "parts/2.png",
        Unreadable("empty", f"empty is a folder that holds no image ({', '.join(SUFFIXES)})."),
        Unreadable("out/overlays/x.png", "out/overlays/x.png lies in the folder of the results; name another folder "
                   "for --out."),
        odd,
        "/last.png",
    ]  # fmt: skip


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_a_list_may_begin_with_a_mark_and_come_in_pieces(coding: str) -> None:
    mark = "\ufeff" if coding == "utf-16-be" else ""
    content = f"{mark}Größe/a.png\r\nb.png\r\n".encode(coding)
    reading, writing = os.pipe()

    def write() -> None:
        for byte in content:
            os.write(writing, bytes([byte]))
            time.sleep(0.001)
        os.close(writing)

    writer = threading.Thread(target=write)
    writer.start()
    found = [item.name for item in streamed(reading)]
    writer.join()
    os.close(reading)
    assert found == ["Größe/a.png", "b.png"]


@pytest.mark.parametrize("content", [b"a.png\0b.png\0", "a.png\nb.png\n".encode("utf-16-le")])
def test_a_list_that_no_line_ends_is_told_in_a_sentence(content: bytes) -> None:
    reading = stream_of(content)
    (only,) = streamed(reading)
    os.close(reading)
    assert isinstance(only, Unreadable)
    assert "holds NUL bytes; send one path a line" in only.reason


def test_waiting_for_a_line_ends_when_it_shall() -> None:
    reading, writing = os.pipe()
    stop = threading.Event()
    stop.set()
    assert list(read_stream(reading, None, stop, Counter())) == []
    os.close(reading)
    os.close(writing)


def test_results_come_as_lines_come(model: Path, tmp_path: Path) -> None:
    """Each path is sent only when the answer to the one before is there."""
    process = start(model, "-", "--out", "-", "--batch", 8, cwd=tmp_path, stdin=-1)
    assert process.stdin is not None
    assert process.stdout is not None
    for index, name in enumerate(["a.png", "deep/b.png", "missing.png", "c.png"]):
        if name != "missing.png":
            plate(tmp_path / name, bright=index % 2 == 0)
        process.stdin.write(f"{name}\n")
        process.stdin.flush()
        row = json.loads(process.stdout.readline())
        assert row["file"] == name
        assert row["verdict"] == ("unreadable" if name == "missing.png" else "defective" if index % 2 == 0 else "good")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "missing.png does not exist" in err
    assert "3 images used, 1 unreadable: 2 good, 1 defective." in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "c.png", "deep", "model.onnx"]


def test_a_stream_leaves_a_folder_too(score: Score, tmp_path: Path) -> None:
    first, second = plate(tmp_path / "in" / "a.png"), plate(tmp_path / "in" / "a.jpg", bright=True)
    reading = stream_of("".join(f"{path}\n" for path in (first, second, first)).encode())
    out = tmp_path / "out"
    report = score(Path("-"), masks=True, formats=("jsonl", "csv"), stdin=reading)
    os.close(reading)
    assert (report.good, report.defective, report.exit_code(fail_on_defect=True)) == (2, 1, 3)
    rows = json_lines(out / "results.jsonl")
    assert [row["file"] for row in rows] == [str(first), str(second), str(first)]
    for row in rows:
        assert (out / row["overlay"]).is_file()
        assert row["overlay"] == f"overlays{row['file']}.png"
        assert (out / row["mask"]).is_file()


def test_dots_in_a_streams_paths_lead_nowhere_else(
    score: Score, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plate(tmp_path / "a.png")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    reading = stream_of(b"../a.png\n")
    assert score(Path("-"), out=Path("out"), stdin=reading).good == 1
    os.close(reading)
    assert (tmp_path / "sub" / "out" / "overlays" / "__" / "a.png.png").is_file()


def test_every_kth_frame_of_a_video_is_scored(score: Score, tmp_path: Path) -> None:
    film = clip(tmp_path / "clip.mp4", 12, bright=lambda index: index >= 8)
    plate(tmp_path / "clip.png")
    report = score(film, tmp_path / "clip.png", every=4)
    found = results(tmp_path / "out")
    assert list(found) == ["clip.mp4#000000", "clip.mp4#000004", "clip.mp4#000008", "clip.png"]
    assert [row["verdict"] for row in found.values()] == ["good", "good", "defective", "good"]
    assert report.exit_code() == 0
    assert {path.name for path in (tmp_path / "out" / "overlays").iterdir()} == {
        "clip.mp4#000000.png", "clip.mp4#000004.png", "clip.mp4#000008.png", "clip.png",
    }  # fmt: skip


def test_videos_in_a_folder_are_no_images_but_match_a_pattern(tmp_path: Path) -> None:
    clip(tmp_path / "clip.avi", 2, codec="mjpeg")
    plate(tmp_path / "a.png")
    assert names(tmp_path) == ["a.png"]
    assert names(tmp_path / "*") == ["a.png", "clip.avi"]


def test_a_frame_is_upright_and_keeps_16_bits(tmp_path: Path) -> None:
    lying = clip(tmp_path / "clip.mp4", 1, bright=lambda index: True, size=(64, 32), rotation=90)
    (frame,) = read_frames(lying, 1, READING)
    image = frame.convert()  # the bright field was at the left, above the middle: turned left it is at the bottom
    assert image.shape == (3, 64, 32)
    assert image[:, 36:60, 10:14].min() > 0.7
    assert image[:, :28].max() < 0.5
    deep = clip(tmp_path / "deep.mkv", 1, codec="ffv1")
    (frame,) = read_frames(deep, 1, READING)
    levels = np.unique(frame.convert())
    assert levels.dtype == np.float32
    assert 0 < levels.min() < levels.max() < 1
    assert np.abs(levels * 255 - np.rint(levels * 255)).max() > 0.05


def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("clip.avi", "mjpeg", {}),
        ("clip.mp4", "mpeg4", {"movflags": "faststart"}),
        ("clip.mkv", "mpeg4", {}),
        ("clip.mov", "mjpeg", {"movflags": "faststart"}),
    ],
)
def test_frames_before_a_break_count(
    score: Score, tmp_path: Path, name: str, codec: str, options: dict[str, str]
) -> None:
    film = cut(clip(tmp_path / name, 40, codec=codec, options=options, bright=lambda index: index == 3), 0.6)
    report = score(film, overlays=False)
    found = results(tmp_path / "out")
    *frames, last = found
    assert 15 <= len(frames) < 35
    assert frames == [f"{name}#{index:06d}" for index in range(len(frames))]
    assert [key for key in frames if found[key]["verdict"] == "defective"] == [f"{name}#000003"]
    assert last == name
    (bad,) = report.skipped
    assert bad.name == name
    assert bad.reason == found[name]["error"]
    count = len(frames)
    places = (f"after frame {count - 1}", f"at frame {count}", f"{count} of its 40 frames")
    assert any(place in bad.reason for place in places)
    assert str(tmp_path) not in bad.reason
    assert bad.reason.count(". ") == 0
    assert report.exit_code() == 2


def test_a_hole_in_a_video_ends_it_there(score: Score, tmp_path: Path) -> None:
    film = clip(tmp_path / "clip.avi", 40, codec="mjpeg")
    content = bytearray(film.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = bytes(3000)
    film.write_bytes(content)
    report = score(film, overlays=False)
    assert report.good > 10
    (bad,) = report.skipped
    assert "clip.avi is damaged" in bad.reason or f"damaged: {report.good} of its 40 frames" in bad.reason


@pytest.mark.parametrize("content", [b"", b"no video", b"\x00\x00\x00\x20ftypisom" + bytes(2000)])
def test_what_is_no_video_is_unreadable(score: Score, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "clip.mp4").write_bytes(content)
    report = score(tmp_path / "clip.mp4", plate(tmp_path / "z.png"))
    assert report.good == 1
    (bad,) = report.skipped
    assert bad.reason.startswith("clip.mp4 cannot be read as a video (")


@pytest.mark.parametrize("length", [3, 200, 406, 700, 900, 1500])
def test_no_cut_takes_the_process_down(tmp_path: Path, length: int) -> None:
    """FFmpeg would crash on a stream without parameters."""
    for name, codec in (("clip.mp4", "libx264"), ("clip.mkv", "libx264"), ("clip.avi", "mjpeg")):
        film = clip(tmp_path / name, 5, codec=codec, options={"movflags": "faststart"} if name == "clip.mp4" else {})
        film.write_bytes(film.read_bytes()[:length])
        with pytest.raises(UserError, match="clip"):
            list(read_frames(film, 1, READING))


def test_whole_videos_of_many_kinds_are_read_to_their_end(tmp_path: Path) -> None:
    for name, codec in (
        ("a.mp4", "libx264"), ("b.mkv", "libx264"), ("c.avi", "mjpeg"), ("d.mov", "mpeg4"), ("e.ts", "libx264"),
        ("f.webm", "libvpx-vp9"), ("g.mkv", "ffv1"),
    ):  # fmt: skip
        assert [frame.index for frame in read_frames(clip(tmp_path / name, 7, codec=codec), 3, READING)] == [0, 3, 6]


def test_frames_over_the_size_limit_are_refused_once(score: Score, tmp_path: Path) -> None:
    report = score(clip(tmp_path / "a.avi", 5), max_pixels=1000)
    (bad,) = report.skipped
    assert "64 x 48 pixels, over the limit of 0.001 megapixels; crop it, or raise --max-megapixels" in bad.reason


def test_without_pyav_a_video_is_refused_before_anything_else(
    score: Score, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film, image = clip(tmp_path / "a.mp4", 2), plate(tmp_path / "a.png")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(video, "find_spec", lambda name: None if name == "av" else find_spec(name))
    with pytest.raises(UserError, match=r"pip install 'flawsmith\[video\]'"):
        score(film, image)
    assert not (tmp_path / "out").exists()
    score(image)
    on_a_stream = [InputFile(film, "a.mp4"), InputFile(image, "a.png")]
    first, second = tasks_of(on_a_stream, 1, READING, threading.Event())
    assert isinstance(first, Unreadable)
    assert "flawsmith[video]" in first.reason
    assert second.name == "a.png"  # type: ignore[union-attr]
