"""Files appear whole or not at all, and digests know nothing of time or place."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flawsmith.errors import QualityGateError, UserError
from flawsmith.files import (
    atomic_file,
    atomic_folder,
    digest_file,
    digest_json,
    digest_path,
    read_json,
    write_csv,
    write_json,
)


class BoomError(Exception):
    pass


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_the_block_ends_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "a.txt"
    with atomic_file(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
        assert temporary.parent == target.parent  # same file system, so that the rename is atomic
    assert target.read_text() == "new"
    assert names(target.parent) == ["a.txt"]


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("error", [BoomError, KeyboardInterrupt, SystemExit])
def test_a_file_stays_as_it_was_when_the_block_raises(
    tmp_path: Path, before: str | None, error: type[BaseException]
) -> None:
    target = tmp_path / "a.txt"
    if before is not None:
        target.write_text(before)
    with pytest.raises(error), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise error
    assert (target.read_text() if target.exists() else None) == before
    assert names(tmp_path) == ([] if before is None else ["a.txt"])


def test_a_folder_replaces_all_of_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "stage"
    target.mkdir()
    (target / "stale.txt").write_text("old")
    with atomic_folder(target) as temporary:
        (temporary / "fresh.txt").write_text("new")
        assert names(target) == ["stale.txt"]
    assert names(target) == ["fresh.txt"]
    assert names(tmp_path) == ["stage"]


@pytest.mark.parametrize("error", [BoomError, KeyboardInterrupt, QualityGateError])
def test_a_folder_stays_as_it_was_when_the_block_raises(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "stage"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with pytest.raises(error), atomic_folder(target) as temporary:
        (temporary / "half.txt").write_text("half")
        raise error
    assert names(target) == ["old.txt"]
    assert names(tmp_path) == ["stage"]


def test_keep_on_puts_the_report_in_place_and_still_raises(tmp_path: Path) -> None:
    target = tmp_path / "validate"
    with pytest.raises(QualityGateError), atomic_folder(target, keep_on=QualityGateError) as temporary:
        (temporary / "verdict.json").write_text("{}")
        raise QualityGateError("critical")
    assert names(target) == ["verdict.json"]
    assert names(tmp_path) == ["validate"]
    with pytest.raises(BoomError), atomic_folder(target, keep_on=QualityGateError) as temporary:
        (temporary / "other.json").write_text("{}")
        raise BoomError
    assert names(target) == ["verdict.json"]


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / ".stage.tmp"
    left.mkdir()
    (left / "half.txt").write_text("half")
    with atomic_folder(tmp_path / "stage") as temporary:
        assert names(temporary) == []
    assert names(tmp_path) == ["stage"]


def test_json_is_sorted_ends_with_a_newline_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": [0.1, None]})
    assert path.read_text().endswith("}\n")
    assert list(json.loads(path.read_text())) == ["a", "b"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": [0.1, None], "b": 1}
    assert names(tmp_path) == ["a.json"]


def test_json_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.json does not exist"):
        read_json(tmp_path / "a.json")
    for content in (b"", b"{", b"\xff\xfe"):
        (tmp_path / "b.json").write_bytes(content)
        with pytest.raises(UserError, match=r"b\.json is not valid JSON"):
            read_json(tmp_path / "b.json")


def test_csv_keeps_seven_digits_and_unix_lines(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ["step", "loss", "name"], [(1, 1 / 3, "a,b"), (2, 1e-12, "c")])
    assert (tmp_path / "a.csv").read_bytes() == b'step,loss,name\n1,0.3333333,"a,b"\n2,1e-12,c\n'

    def rows() -> object:
        yield (1, 2.0, "x")
        raise BoomError

    with pytest.raises(BoomError):
        write_csv(tmp_path / "a.csv", ["step", "loss", "name"], rows())  # type: ignore[arg-type]
    assert (tmp_path / "a.csv").read_text().startswith("step,loss,name\n1,0.3333333")
    assert names(tmp_path) == ["a.csv"]


def tree(folder: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def test_a_folder_digest_depends_on_names_and_bytes_alone(tmp_path: Path) -> None:
    content = {"a.txt": b"1", "sub/b.txt": b"2"}
    first = tree(tmp_path / "one", content)
    second = tree(tmp_path / "elsewhere" / "two", dict(reversed(content.items())))
    os.utime(second / "a.txt", (1, 1))
    digest = digest_path(first)
    assert digest == digest_path(second)
    tree(second, {".hidden": b"x", ".stage.tmp/half": b"x"})
    assert digest == digest_path(second)
    (second / "empty").mkdir()
    assert digest == digest_path(second)
    for changed in ({"a.txt": b"9"}, {"c.txt": b""}):
        third = tree(Path(shutil.copytree(first, tmp_path / f"third-{next(iter(changed))}")), changed)
        assert digest != digest_path(third)
    (first / "sub" / "b.txt").rename(first / "sub" / "c.txt")
    assert digest != digest_path(first)


def test_a_file_digest_is_its_sha256(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest_file(path) == digest_path(path) == known
    with pytest.raises(UserError, match="does not exist, so it has no digest"):
        digest_path(tmp_path / "missing")


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.booleans(), max_size=5))
def test_a_json_digest_ignores_order(content: dict[str, object]) -> None:
    assert digest_json(content) == digest_json(dict(reversed(content.items())))
    assert digest_json(content) != digest_json({**content, "one more": 1})
