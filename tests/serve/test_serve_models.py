"""How a slot follows its source."""

import time
from pathlib import Path
from typing import Any

import pytest
from toy_onnx import write_toy

from flawsmith.errors import UserError
from flawsmith.files import digest_file
from flawsmith.inference.predictor import Predictor
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
        return Loaded(self.predictor, mark)


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
    assert loaded.predictor.digest == expected
