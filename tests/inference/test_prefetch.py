"""Decoding beside the model: that it overlaps, keeps the order, stays within its bounds, and ends."""

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Score
from hypothesis import given, settings
from hypothesis import strategies as st
from line_samples import clip, files_of, plate, start, wait_until

from flawsmith.data.images import FloatImage
from flawsmith.errors import UserError
from flawsmith.inference import prefetch
from flawsmith.inference.predictor import Prediction
from flawsmith.inference.prefetch import predict_stream
from flawsmith.inference.sources import Task, Unreadable

WAIT = 60.0  # seconds; only a failing test waits so long


def image_of(pixels: int) -> FloatImage:
    return np.zeros((3, 1, pixels), np.float32)


class Model:
    """Answers with what `work` says about the batch."""

    def __init__(self, work: Callable[[list[FloatImage]], None] = lambda images: None) -> None:
        self.work = work
        self.batches: list[int] = []

    def predict(self, images: list[FloatImage]) -> list[Prediction]:
        self.batches.append(len(images))
        self.work(images)
        return [Prediction(float(image.shape[2]), False, np.zeros((1, 1), np.float32)) for image in images]


def run(tasks: Any, workers: int, model: Model, batch: int = 2) -> list[tuple[str, float | None]]:
    answers = predict_stream(tasks, model, batch, workers)  # type: ignore[arg-type]
    return [(answer.name, answer.prediction and answer.prediction.score) for answer in answers]


def test_decoding_goes_on_while_the_model_works() -> None:
    """The model does not answer on its first batch before an image of the next one has been decoded."""
    decoded = [threading.Event() for _ in range(6)]

    def load(index: int) -> FloatImage:
        decoded[index].set()
        return image_of(1)

    model = Model(lambda images: None if decoded[2].wait(WAIT) else pytest.fail("nothing is decoded meanwhile"))
    tasks = [Task(str(index), lambda: 1, lambda index=index: load(index)) for index in range(6)]  # type: ignore[misc]
    assert len(run(tasks, 1, model)) == 6
    assert model.batches == [2, 2, 2]


def test_as_many_threads_decode_as_are_asked_for() -> None:
    together = threading.Barrier(4, timeout=WAIT)

    def load() -> FloatImage:
        together.wait()  # broken, and an error, unless four are here at once
        return image_of(1)

    assert len(run([Task(str(index), lambda: 1, load) for index in range(8)], 4, Model(), batch=4)) == 8


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from([1, 3, 7, 12, 30, 0, -1]), max_size=25),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(2, 20),
)
def test_order_bounds_and_answers_are_the_same_for_any_number_of_threads(
    sizes: list[int], workers: int, batch: int, limit: int
) -> None:
    """Sizes in pixels; 0: cannot be decoded, -1: known to be unreadable. Never more than the limit and one image."""
    lock = threading.Lock()
    held: list[int] = []
    peak = 0

    def load(size: int) -> FloatImage:
        nonlocal peak
        if size == 0:
            raise UserError("broken")
        with lock:
            held.append(size)
            peak = max(peak, sum(held))
        return image_of(size)

    def tasks() -> Iterator[Task | Unreadable]:
        for index, size in enumerate(sizes):
            if size < 0:
                yield Unreadable(str(index), "known")
            else:
                yield Task(str(index), lambda size=size: size, lambda size=size: load(size))  # type: ignore[misc]

    expected = [(str(index), float(size) if size > 0 else None) for index, size in enumerate(sizes)]
    batches = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefetch, "HELD_PIXELS", limit)
        for count in (1, workers):
            model, peak, found = Model(), 0, []
            for answer in predict_stream(tasks(), model, batch, count):  # type: ignore[arg-type]
                found.append((answer.name, answer.prediction and answer.prediction.score))
                if answer.image is not None:
                    with lock:
                        held.remove(answer.image.shape[2])
            assert found == expected
            assert peak <= limit + max(sizes, default=0)
            assert not held
            batches.append(model.batches)
    assert batches[0] == batches[1]


def test_an_error_of_one_file_is_its_own_and_a_fault_ends_the_run() -> None:
    def broken(error: BaseException) -> Callable[[], FloatImage]:
        def load() -> FloatImage:
            raise error

        return load

    tasks = [Task("a", lambda: 1, broken(UserError("bad"))), Task("b", lambda: 1, lambda: image_of(1))]
    assert run(tasks, 2, Model()) == [("a", None), ("b", 1.0)]
    with pytest.raises(MemoryError):
        run([*tasks, Task("c", lambda: 1, broken(MemoryError()))], 2, Model())

    def odd_size() -> int:
        raise ValueError("no header")

    assert run([Task("a", odd_size, lambda: image_of(2)), *tasks], 1, Model())[0] == ("a", 2.0)

    def source() -> Iterator[Task]:
        yield tasks[1]
        raise OSError("the share is gone")

    with pytest.raises(OSError, match="share"):
        run(source(), 2, Model())


def test_leaving_early_ends_all_threads_and_the_source() -> None:
    closed = threading.Event()

    def source() -> Iterator[Task]:
        try:
            for index in range(10**9):
                yield Task(str(index), lambda: 1, lambda: image_of(1))
        finally:
            closed.set()

    before = threading.active_count()
    answers = predict_stream(source(), Model(), 5, 3)  # type: ignore[arg-type]
    assert next(answers).name == "0"
    answers.close()
    assert closed.is_set()
    assert threading.active_count() == before


def test_a_live_source_gets_its_answer_without_a_full_batch() -> None:
    answered = threading.Event()

    def source() -> Iterator[Task | None]:
        yield None
        yield Task("a", lambda: 1, lambda: image_of(1))
        yield None  # nothing more for now
        assert answered.wait(WAIT)
        yield Task("b", lambda: 1, lambda: image_of(1))

    model = Model(lambda images: answered.set())
    assert run(source(), 1, model, batch=8) == [("a", 1.0), ("b", 1.0)]
    assert model.batches == [1, 1]


def test_a_long_source_is_not_walked_through_ahead_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of a video are held as soon as the source gives them, decoded or not."""
    given = answered = most = 0

    def source() -> Iterator[Task]:
        nonlocal given, most
        for index in range(200):
            given += 1
            most = max(most, given - answered)
            yield Task(str(index), lambda: 100, lambda: image_of(100))

    monkeypatch.setattr(prefetch, "HELD_PIXELS", 300)
    for _ in predict_stream(source(), Model(), 4, 3):  # type: ignore[arg-type]
        answered += 1
    assert answered == given == 200
    assert most <= 2 * 300 // 100 + 2


def test_files_are_the_same_for_any_number_of_workers(score: Score, tmp_path: Path) -> None:
    for index in range(20):
        plate(tmp_path / "in" / f"{index:02}.png", bright=index % 3 == 0, size=(20 + index, 30))
    (tmp_path / "in" / "05.png").write_bytes(b"broken")
    film = clip(tmp_path / "in" / "film.avi", 9, bright=lambda index: index == 4)
    outs = []
    for workers in (1, 2, 5):
        out = tmp_path / f"out{workers}"
        formats = ("csv", "json", "jsonl")
        report = score(tmp_path / "in", film, out=out, workers=workers, batch=3, masks=True, formats=formats)
        assert (report.total, report.unreadable) == (29, 1)
        outs.append(files_of(out))
    assert outs[0] == outs[1] == outs[2]
    assert len(outs[0]) == 3 + 2 * 28


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_half_written(
    model: Path, score: Score, tmp_path: Path, number: signal.Signals
) -> None:
    """In the middle of a stream that does not end, with earlier results in place."""
    image = plate(tmp_path / "a.png")
    score(image)
    before = files_of(tmp_path / "out")
    process = start(model, "-", "--out", "out", "--jsonl", "-", "--workers", 3, cwd=tmp_path, stdin=-1)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("a.png\n")
    process.stdin.flush()
    assert "a.png" in process.stdout.readline()
    wait_until(lambda: any(tmp_path.glob(".*.tmp/overlays")), "an overlay")
    with pytest.raises(UserError, match=r"Another run writes .*out now"):
        score(image)
    process.send_signal(number)
    assert process.wait(60) == (130 if number == signal.SIGINT else 143)
    assert "Traceback" not in process.stderr.read()  # type: ignore[union-attr]
    for stream in (process.stdin, process.stdout, process.stderr):
        stream.close()  # type: ignore[union-attr]
    assert files_of(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "model.onnx", "out"]
