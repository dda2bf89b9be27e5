"""How a slot follows its source, and how places are counted."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_onnx import write_toy

from flawsmith.errors import UserError
from flawsmith.files import digest_file
from flawsmith.inference.predictor import Predictor
from flawsmith.serve.app import Gate
from flawsmith.serve.models import FileSource, Loaded, ModelSlot


class Scripted:
    """A source whose next mark and model are set by the test."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.mark = "1"
        self.broken = False
        self.loads = 0

    def newest(self) -> str:
        if self.mark == "gone":
            raise ConnectionError("no store")
        return self.mark

    def load(self, mark: str) -> Loaded:
        self.loads += 1
        if self.broken:
            raise UserError(f"{mark} is damaged.")
        return Loaded(self.predictor, mark, "ab")


@pytest.fixture
def source(tmp_path: Path) -> Scripted:
    return Scripted(Predictor(write_toy(tmp_path / "model.onnx")))


def test_a_model_is_loaded_once_a_mark(source: Scripted) -> None:
    changes: list[Loaded | None] = []
    slot = ModelSlot(source, 60, changes.append)
    assert slot.current is None
    assert [slot.refresh(), slot.refresh()] == [True, False]
    source.mark = "2"
    assert slot.refresh()
    assert slot.current is not None
    assert slot.current.version == "2"
    assert source.loads == 2
    assert [change.version for change in changes if change] == ["1", "2"]


def test_what_cannot_be_used_leaves_the_present_one_and_is_complained_of_once(source: Scripted) -> None:
    changes: list[Loaded | None] = []
    slot = ModelSlot(source, 0.01, changes.append)
    slot.start()
    try:
        source.broken, source.mark = True, "2"
        end = time.monotonic() + 20
        while source.loads < 5:  # tried again and again
            assert time.monotonic() < end
            time.sleep(0.01)
        assert slot.current is not None
        assert slot.current.version == "1"
        assert changes[1:] == [None]
        source.mark = "gone"  # the store itself is away
        while len(changes) < 3:
            assert time.monotonic() < end
            time.sleep(0.01)
        source.broken, source.mark = False, "3"
        while slot.current.version != "3":
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        slot.stop()


def test_a_first_model_that_cannot_be_used_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        ModelSlot(FileSource(tmp_path / "model.onnx"), 60).start()


@given(st.integers(1, 5), st.lists(st.booleans(), max_size=40))
def test_places_are_never_more_than_there_are(places: int, steps: list[bool]) -> None:
    told: list[int] = []
    gate, inside = Gate(places, told.append), 0
    for comes in steps:
        if comes:
            assert gate.enter() == (inside < places)
            inside = min(places, inside + 1)
        elif inside:
            gate.leave()
            inside -= 1
    assert all(0 <= count <= places for count in told)
    assert told[-1:] == ([inside] if told else [])


def test_places_are_counted_across_threads() -> None:
    gate = Gate(3)
    most: list[int] = []
    inside, lock = [0], threading.Lock()

    def visitor() -> None:
        for _ in range(200):
            if gate.enter():
                with lock:
                    inside[0] += 1
                    most.append(inside[0])
                with lock:
                    inside[0] -= 1
                gate.leave()

    threads = [threading.Thread(target=visitor) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) <= 3
    assert gate.enter()


def test_the_digest_is_that_of_the_model_that_answers_though_another_file_follows_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_toy(tmp_path / "model.onnx")
    expected, real = digest_file(path), Predictor.__init__

    def then_exchanged(self: Predictor, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        write_toy(path, gain=2.0)

    monkeypatch.setattr(Predictor, "__init__", then_exchanged)
    loaded = FileSource(path).load("")
    assert digest_file(path) != expected
    assert loaded.digest == loaded.predictor.digest == expected
