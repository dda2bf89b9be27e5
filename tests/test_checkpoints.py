"""A checkpoint restores a training as it was, or it is named, ignored, and nothing has changed."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flawsmith.training import ResumePoint


def parts(width: int = 4, name: str = "model") -> dict[str, Any]:
    torch.manual_seed(width)
    module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, width))
    return {name: module, "optimizer": torch.optim.AdamW(module.parameters())}


def saved(folder: Path) -> tuple[ResumePoint, dict[str, Any]]:
    point, left = ResumePoint(folder, "a"), parts()
    with torch.no_grad():
        for value in left["model"].parameters():
            value += 1
    point.save(left, 2, [[0, 0.5], [1, 0.25]])
    return point, left


def is_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    pairs = zip(one["model"].state_dict().values(), other["model"].state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    point, left = saved(tmp_path)
    found = parts()
    assert not is_same(found, left)
    assert point.load(found) == (2, [[0, 0.5], [1, 0.25]])
    assert is_same(found, left)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("identity", None),
        ("identity", "other"),
        ("step", None),
        ("step", "2"),
        ("step", 3),
        ("rows", None),
        ("rows", 7),
        ("rows", [["a"], ["b"]]),
        ("parts", None),
        ("parts", {"model": {}}),
        ("parts", {"model": parts()["model"].state_dict(), "optimizer": {"state": {}, "param_groups": []}}),
        ("parts", {"model": parts(5)["model"].state_dict(), "optimizer": parts()["optimizer"].state_dict()}),
        ("parts", {"model": parts()["model"].state_dict(), "optimizer": parts()["model"].state_dict()}),
        ("file", b""),
        ("file", b"no checkpoint"),
    ],
)
def test_a_damaged_checkpoint_starts_from_zero_and_leaves_the_parts_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str, value: Any
) -> None:
    point, _ = saved(tmp_path)
    path = tmp_path / "checkpoint.pt"
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        state = torch.load(path, weights_only=True)
        torch.save({name: part for name, part in {**state, key: value}.items() if part is not None}, path)
    found = parts()
    before = deepcopy(found)
    assert point.load(found) == (0, [])
    assert is_same(found, before)
    assert len(caplog.messages) == 1
    assert "training starts from zero" in caplog.text


@pytest.mark.parametrize("other", [parts(5), parts(name="network") | {"model": nn.Linear(3, 5)}])
def test_a_checkpoint_of_another_network_starts_from_zero(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, other: dict[str, Any]
) -> None:
    point, _ = saved(tmp_path)
    assert point.load(other) == (0, [])
    assert "another network" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has a disk that is always full")
def test_a_full_disk_is_told_with_the_checkpoints_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115 torch closes nothing, the context does
    monkeypatch.setattr(Path, "open", lambda *_: full)
    with pytest.raises(OSError, match="No space left") as caught:
        ResumePoint(tmp_path, "a").save(parts(), 1, [[0, 0.5]])
    assert caught.value.filename == str(tmp_path / "checkpoint.pt")
    assert list(tmp_path.iterdir()) == []
