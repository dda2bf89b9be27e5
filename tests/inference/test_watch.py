"""A hot folder: slow copies, renames, restarts, kills, broken files, signals. One watch is a real process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from line_samples import BRIGHT, DARK, environment, files_of, json_lines, plate, start, wait_until
from PIL import Image

import flawsmith.inference.journal as journal_module
import flawsmith.inference.watch as watch_module
from flawsmith.data.images import Reading
from flawsmith.errors import UserError
from flawsmith.inference.folder import predict_folder
from flawsmith.inference.journal import FORGET, Journal
from flawsmith.inference.options import PredictOptions, PredictReport
from flawsmith.inference.predictor import Predictor
from flawsmith.inference.watch import watch_folder

POLL = 0.05
SHORT = PredictOptions(poll=0.01, seconds=0.1)
Once = Callable[..., PredictReport]


@pytest.fixture
def line(tmp_path: Path) -> Path:
    folder = tmp_path / "line"
    folder.mkdir()
    return folder


@contextmanager
def watching(model: Path, line: Path, out: Path) -> Iterator[threading.Thread]:
    """A watch in a thread, until the block ends."""
    stop, options = threading.Event(), PredictOptions(poll=POLL)
    thread = threading.Thread(target=watch_folder, args=(Predictor(model), line, out, options, stop))
    thread.start()
    try:
        wait_until(lambda: (out / "results.jsonl").exists() or not thread.is_alive(), "the watch to begin")
        yield thread
    finally:
        stop.set()
        thread.join()


@contextmanager
def watch_process(model: Path, line: Path, out: Path, *options: object) -> Iterator["subprocess.Popen[str]"]:
    """A watch in a process of its own, killed at the end of the block if it still runs."""
    process = start(model, "--watch", line, "--out", out, "--poll", POLL, *options)
    try:
        wait_until(lambda: (out / "results.jsonl").exists() or process.poll() is not None, "the watch to begin")
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def once(model: Path, line: Path, out: Path) -> Once:
    """Watch until nothing new has come for a moment."""

    def call(**options: Any) -> PredictReport:
        return watch_folder(Predictor(model), line, out, PredictOptions(**{"poll": 0.02, "idle": 0.3, **options}))

    return call


def verdicts(out: Path) -> list[tuple[str, str]]:
    return [(row["file"], row["verdict"]) for row in json_lines(out / "results.jsonl")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_images_are_scored_as_they_arrive_once_each(model: Path, line: Path, number: signal.Signals, out: Path) -> None:
    plate(line / "before.png")
    with watch_process(model, line, out, "--masks", "--jsonl", "-") as process:
        wait_until(lambda: len(verdicts(out)) == 1, "the image that lay there")
        plate(line / "shift1" / "a.png", bright=True)
        (line / "notes.txt").write_text("passed over")
        plate(line / ".hidden" / "b.png")
        wait_until(lambda: len(verdicts(out)) == 2, "the image that came")
        time.sleep(5 * POLL)  # looks that find nothing new
        os.utime(line / "before.png")  # touched, not changed
        time.sleep(5 * POLL)
        process.send_signal(number)
        followed, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "Traceback" not in err
    assert verdicts(out) == [("before.png", "good"), ("shift1/a.png", "defective")]
    assert [json.loads(row) for row in followed.splitlines()] == json_lines(out / "results.jsonl")
    assert "2 images used, 2 passed over (1 hidden, 1 .txt): 1 good, 1 defective." in err
    pictures = {f"{kind}/{name}.png" for kind in ("overlays", "masks") for name in ("before.png", "shift1/a.png")}
    assert files_of(out).keys() - {".lock"} == {"results.jsonl", "model.json", *pictures}
    row = json_lines(out / "results.jsonl")[1]
    assert (row["overlay"], row["mask"]) == ("overlays/shift1/a.png.png", "masks/shift1/a.png.png")
    with Image.open(out / row["mask"]) as mask:
        pixels = np.asarray(mask)
    assert pixels.shape == (48, 64)
    assert set(np.unique(pixels)) == {0, 255}
    (region,) = row["regions"]
    assert (pixels > 0).sum() == pytest.approx(region["area"])


def test_a_slow_copy_is_waited_for_and_a_rename_is_not_missed(
    model: Path, line: Path, tmp_path: Path, out: Path
) -> None:
    noise = np.random.default_rng(0).integers(DARK, DARK + 9, (300, 400, 3), np.uint8)
    noise[:40] = BRIGHT
    Image.fromarray(noise).save(tmp_path / "big.png")
    content = (tmp_path / "big.png").read_bytes()
    with watching(model, line, out):
        with (line / "slow.png").open("wb") as stream:
            for begin in range(0, len(content), len(content) // 25):
                stream.write(content[begin : begin + len(content) // 25])
                stream.flush()
                time.sleep(POLL / 2)
                assert not any(name == "slow.png" for name, _ in verdicts(out))
        (line / ".part").write_bytes(content)
        (line / ".part").rename(line / "renamed.png")
        wait_until(lambda: len(verdicts(out)) == 2, "both")
    assert sorted(verdicts(out)) == [("renamed.png", "defective"), ("slow.png", "defective")]


def test_a_stalled_copy_is_not_called_broken(
    line: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: Path, once: Once
) -> None:
    """It looks complete for a while, cannot be read, and is left alone until it has been still for longer."""
    monkeypatch.setattr(watch_module, "GRACE", 3.0)
    content = plate(tmp_path / "a.png", size=(200, 200)).read_bytes()
    (line / "a.png").write_bytes(content[: len(content) // 2])
    read: list[str] = []
    load = watch_module.read_image

    def seen(path: Path, reading: Reading) -> Any:
        read.append(path.name)
        if len(read) == 1:
            threading.Timer(0.5, lambda: (line / "a.png").write_bytes(content)).start()
        return load(path, reading)

    monkeypatch.setattr(watch_module, "read_image", seen)
    report = once(poll=0.05, idle=1.0)
    assert (report.good, report.unreadable) == (1, 0)
    assert verdicts(out) == [("a.png", "good")]
    assert len(read) == 2


def test_a_broken_file_gets_one_line_and_the_watch_goes_on(model: Path, line: Path, out: Path) -> None:
    with watching(model, line, out):
        (line / "bad.png").write_bytes(b"no image")
        (line / "empty.jpg").touch()
        plate(line / "good.png")
        wait_until(lambda: len(verdicts(out)) == 3, "three lines")
        plate(line / "bad.png", bright=True)  # repaired under the same name
        wait_until(lambda: len(verdicts(out)) == 4, "the repaired one")
    assert verdicts(out)[0] == ("good.png", "good")
    assert sorted(verdicts(out)[1:3]) == [("bad.png", "unreadable"), ("empty.jpg", "unreadable")]
    assert verdicts(out)[3] == ("bad.png", "defective")
    for row in json_lines(out / "results.jsonl")[1:3]:
        assert row["error"].startswith(f"{row['file']} cannot be read as an image")


def test_linked_folders_are_watched_and_links_to_nothing_told(
    line: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, out: Path, once: Once
) -> None:
    plate(tmp_path / "nas" / "c.png")
    (line / "cam2").symlink_to(tmp_path / "nas")
    (line / "gone.png").symlink_to("nowhere.png")
    (line / "d.gif").touch()
    report = once()
    assert verdicts(out) == [("cam2/c.png", "good")]
    assert (report.good, report.unreadable, report.passed_over) == (1, 1, {".gif": 1})
    assert report.exit_code() == 0
    assert caplog.text.count("gone.png is a link to nothing; the rest is watched.") == 1


def test_a_restart_neither_repeats_nor_loses(line: Path, out: Path, once: Once) -> None:
    for name in "abc":
        plate(line / f"{name}.png")
    assert once().total == 3
    assert [name for name, _ in verdicts(out)] == ["a.png", "b.png", "c.png"]
    before = (out / "results.jsonl").read_bytes()
    assert once().total == 0
    assert (out / "results.jsonl").read_bytes() == before
    plate(line / "d.png")  # what came while nobody watched, ...
    old = (line / "a.png").stat()
    (line / "b.png").unlink()
    plate(line / "b.png", bright=True)  # ... what was replaced by something else, ...
    content = (line / "c.png").read_bytes()
    (line / "c.png").unlink()
    (line / "c.png").write_bytes(content)  # ... or by itself, ...
    plate(line / "a.png", shade=DARK + 1)
    os.utime(line / "a.png", ns=(old.st_atime_ns, old.st_mtime_ns))  # ... or with its old time
    assert once().exit_code(fail_on_defect=True) == 3
    assert (out / "results.jsonl").read_bytes().startswith(before)
    assert sorted(verdicts(out)[3:]) == [("a.png", "good"), ("b.png", "defective"), ("d.png", "good")]


def test_a_kill_in_the_middle_loses_and_doubles_no_line(model: Path, line: Path, out: Path, once: Once) -> None:
    """Killed with -9 twice, at whatever it was doing; a torn last line is taken back."""
    names = [f"{index:03}.png" for index in range(60)]
    for index, name in enumerate(names):
        plate(line / name, bright=index % 7 == 0, shade=DARK + index)
    for kill in range(2):
        before = len(json_lines(out / "results.jsonl"))
        with watch_process(model, line, out, "--batch", 4, "--masks") as process:
            wait_until(lambda seen=before: len(json_lines(out / "results.jsonl")) >= seen + 5, "some lines")  # type: ignore[misc]
        assert process.returncode == -signal.SIGKILL
        if kill:
            with (out / "results.jsonl").open("ab") as stream:
                stream.write(b'{"file": "torn.png", "verd')
    once(masks=True)
    rows = json_lines(out / "results.jsonl")
    assert sorted(row["file"] for row in rows) == names
    assert {row["file"] for row in rows if row["verdict"] == "defective"} == set(names[::7])
    assert b"torn" not in (out / "results.jsonl").read_bytes()
    assert files_of(out / "masks").keys() == files_of(out / "overlays").keys() == {f"{name}.png" for name in names}


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(
    line: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: Path, once: Once
) -> None:
    plate(line / "a.png")
    load = watch_module.read_image
    read: list[Path] = []

    def replaced(path: Path, reading: Reading) -> Any:
        read.append(path)
        image = load(path, reading)
        if len(read) == 1:
            plate(tmp_path / "new.png", bright=True).replace(path)
        return image

    monkeypatch.setattr(watch_module, "read_image", replaced)
    once(poll=0.05, idle=0.5)
    assert verdicts(out) == [("a.png", "defective")]  # the first content was never whole to us


def test_a_file_that_is_taken_away_leaves_no_line(
    line: Path, monkeypatch: pytest.MonkeyPatch, out: Path, once: Once
) -> None:
    plate(line / "a.png")
    plate(line / "b.png")
    digest = watch_module.digest_file

    def taken(path: Path) -> str:
        (line / "a.png").unlink(missing_ok=True)
        return digest(path)

    monkeypatch.setattr(watch_module, "digest_file", taken)
    report = once(poll=0.05, idle=0.5)
    assert report.total == 1
    assert verdicts(out) == [("b.png", "good")]


def test_the_folder_may_vanish_and_come_back(model: Path, line: Path, out: Path) -> None:
    with watching(model, line, out) as thread:
        shutil.rmtree(line)
        time.sleep(5 * POLL)
        assert thread.is_alive()
        plate(line / "a.png")
        wait_until(lambda: len(verdicts(out)) == 1, "the folder's return")


def test_it_ends_after_its_time_with_results_inside_the_watched_folder(model: Path, line: Path, out: Path) -> None:
    plate(line / "a.png")
    watch_folder(Predictor(model), line, line / "out", PredictOptions(poll=POLL, seconds=1.0))
    assert verdicts(line / "out") == [("a.png", "good")]  # overlays are no arrivals


@pytest.mark.slow
def test_waiting_costs_next_to_nothing(model: Path, line: Path) -> None:
    for index in range(200):
        (line / f"{index}.txt").touch()
    # In a process of its own: the time of threads that other tests left behind is none of the watch's cost.
    code = (
        "import sys, time; from pathlib import Path\n"
        "from flawsmith.inference.options import PredictOptions\n"
        "from flawsmith.inference.predictor import Predictor; from flawsmith.inference.watch import watch_folder\n"
        "predictor, line, out = Predictor(Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3])\n"
        "began = time.process_time(); watch_folder(predictor, line, out, PredictOptions(poll=0.2, seconds=4))\n"
        "print(time.process_time() - began)"
    )
    arguments = [sys.executable, "-c", code, model, line, out]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.6  # 0.1 on the machine this was written on


def test_two_watches_never_share_their_results(model: Path, line: Path, out: Path, once: Once) -> None:
    with (
        watching(model, line, out),
        pytest.raises(UserError, match="Another watch writes into"),
    ):
        once()


def test_results_of_something_else_are_left_alone(
    model: Path, write_model: Callable[..., Path], line: Path, tmp_path: Path, out: Path, once: Once
) -> None:
    plate(line / "a.png")
    once(poll=0.01, idle=0.1)
    lines = (out / "results.jsonl").read_bytes()
    other = Predictor(write_model(detector_digest="cd" * 32))
    with pytest.raises(UserError, match="results of another model"):
        watch_folder(other, line, out, SHORT)
    with pytest.raises(UserError, match="another model or threshold"):
        watch_folder(Predictor(model, threshold=0.9), line, out, SHORT)
    with pytest.raises(UserError, match="name a new folder"):  # a plain predict would replace the journal
        predict_folder(other, [line], out, PredictOptions())
    assert (out / "results.jsonl").read_bytes() == lines
    for mine in (line, tmp_path):
        with pytest.raises(UserError, match=r"holds the watched folder"):
            watch_folder(other, line, mine, SHORT)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"no results of a watch \(such as thesis\.tex\)"):
        watch_folder(other, line, tmp_path / "docs", SHORT)
    with pytest.raises(UserError, match="is no folder"):
        watch_folder(other, tmp_path / "nowhere", tmp_path / "new", SHORT)
    assert not (tmp_path / "new").exists()


def test_a_watch_goes_on_where_the_model_computes_elsewhere(model: Path, line: Path, out: Path, once: Once) -> None:
    plate(line / "a.png")
    once(poll=0.01, idle=0.1)
    known = json.loads((out / "model.json").read_text())
    (out / "model.json").write_text(json.dumps(known | {"provider": "cuda"}))
    report = once(poll=0.01, idle=0.1)
    assert report.total == 0
    assert json.loads((out / "model.json").read_text()) == known


def test_a_damaged_journal_is_named_and_not_touched(model: Path, line: Path, out: Path, once: Once) -> None:
    plate(line / "a.png")
    once(poll=0.01, idle=0.1)
    content = b"\x00\x00\n" + (out / "results.jsonl").read_bytes() + b"torn"
    (out / "results.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"results\.jsonl is damaged in line 1"):
        watch_folder(Predictor(model), line, out, SHORT)
    assert (out / "results.jsonl").read_bytes() == content


def test_odd_names_are_written_and_known_again(line: Path, tmp_path: Path, out: Path, once: Once) -> None:
    odd = os.fsdecode(b"odd\xff \n.png")
    plate(tmp_path / "a.png").rename(line / odd)
    for _ in range(2):
        once(poll=0.01, idle=0.1, overlays=False)
        assert verdicts(out) == [(odd, "good")]
    journal = Journal(out / "results.jsonl")
    assert set(journal.known) == {odd}
    journal.close()


def test_memory_follows_the_folder_and_forgives_an_absence(line: Path, out: Path, once: Once) -> None:
    for name in ("kept.png", "taken.png", "away.png"):
        plate(line / name)
    once(poll=0.01, idle=0.1, overlays=False)
    journal = Journal(out / "results.jsonl")
    journal.forget({"kept.png"}, now=0.0)
    journal.forget({"kept.png", "away.png"}, now=FORGET - 1)
    assert set(journal.known) == {"kept.png", "taken.png", "away.png"}
    journal.forget({"kept.png"}, now=FORGET)
    assert set(journal.known) == {"kept.png", "away.png"}  # away.png was seen meanwhile: its hour began anew
    journal.close()


def test_a_file_that_comes_back_after_it_was_forgotten_is_a_new_arrival(
    line: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: Path, once: Once
) -> None:
    elsewhere = tmp_path / "a.png"
    plate(line / "a.png")
    once(poll=0.01, idle=0.1, overlays=False)
    (line / "a.png").rename(elsewhere)
    monkeypatch.setattr(journal_module, "FORGET", 0.05)

    def put_back() -> None:
        elsewhere.rename(line / "a.png")

    timer = threading.Timer(0.5, put_back)
    timer.start()
    once(poll=0.01, idle=2.0, overlays=False)
    timer.join()
    assert verdicts(out) == [("a.png", "good"), ("a.png", "good")]
