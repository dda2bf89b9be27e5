"""Files appear whole or not at all, and digests know nothing of time or place."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flawsmith.errors import QualityGateError, UserError, refusal
from flawsmith.files import (
    atomic_file,
    atomic_folder,
    digest_file,
    digest_json,
    digest_name,
    digest_path,
    fit_name,
    read_json,
    restore,
    sole_writer,
    write_csv,
    write_json,
)


class BoomError(Exception):
    pass


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.iterdir()}


def tree(folder: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def test_a_file_appears_when_the_block_ends_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "a.txt"
    with atomic_file(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
        assert temporary.parent == target.parent  # same file system, so that the rename is atomic
    assert target.read_text() == "new"
    assert names(target.parent) == ["a.txt"]


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("error", [BoomError, KeyboardInterrupt, QualityGateError])
def test_what_was_there_stays_when_the_block_raises(
    tmp_path: Path, before: str | None, error: type[BaseException]
) -> None:
    if before is not None:
        tree(tmp_path, {"a.txt": b"old", "stage/a.txt": b"old"})
    with pytest.raises(error), atomic_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise error
    with pytest.raises(error), atomic_folder(tmp_path / "stage") as temporary:
        (temporary / "half.txt").write_text("half")
        raise error
    assert names(tmp_path) == ([] if before is None else ["a.txt", "stage"])
    if before is not None:
        assert contents(tmp_path / "stage") == {(tmp_path / "a.txt").read_text()} == {"old"}


def test_a_folder_replaces_all_of_the_old_one_and_clears_what_a_killed_run_left(tmp_path: Path) -> None:
    target = tmp_path / "stage"
    tree(tmp_path, {"stage/stale.txt": b"old", f".{digest_name('stage')}-0123abcd.tmp/half.txt": b"half"})
    with atomic_folder(target) as temporary:
        assert names(temporary) == []
        (temporary / "fresh.txt").write_text("new")
        assert names(target) == ["stale.txt"]
        assert not (tmp_path / f".{digest_name('stage')}-0123abcd.tmp").exists()
    assert names(target) == ["fresh.txt"]
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


# Replaces results/ and kills itself with SIGKILL just before it renames, or takes away, something for the n-th time.
KILLED = """
import os, signal, sys
from pathlib import Path
from flawsmith.files import atomic_folder
done = []
def watch(event, arguments):
    if event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        done.append(event)
        if len(done) == {count}:
            os.kill(os.getpid(), signal.SIGKILL)
with atomic_folder(Path("results")) as folder:
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("new")
    sys.addaudithook(watch)
"""


def python(code: str, folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, text=True, stdin=PIPE, stdout=PIPE, stderr=PIPE)


def test_a_kill_at_any_moment_of_a_replacement_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    seen = set()
    for count in range(1, 12):
        shutil.rmtree(tmp_path / "results", ignore_errors=True)
        tree(tmp_path / "results", {"a.txt": b"old", "b.txt": b"old"})
        process = python(KILLED.format(count=count), tmp_path)
        process.communicate()
        restore(tmp_path / "results")  # as whoever reads it next does
        assert names(tmp_path / "results") == ["a.txt", "b.txt"]
        (content,) = contents(tmp_path / "results")
        seen.add((process.returncode, content))
        with sole_writer(tmp_path / "results"):  # as whoever writes it next does
            pass
        assert names(tmp_path) == ["results"]
        if process.returncode == 0:
            break
    assert seen == {(-signal.SIGKILL, "old"), (-signal.SIGKILL, "new"), (0, "new")}


@pytest.mark.parametrize("made", [None, "empty"])
def test_whoever_reads_or_writes_next_finds_what_was_moved_aside(tmp_path: Path, made: str | None) -> None:
    def kill() -> None:
        tree(tmp_path / f".{digest_name('results')}.old.tmp", {"a.json": b"{}"})
        if made:
            (tmp_path / "results").mkdir()

    path = tmp_path / "results" / "a.json"
    for read in (read_json, digest_path):
        kill()
        assert read(path) in ({}, digest_file(path))
        shutil.rmtree(tmp_path / "results")
    kill()
    with pytest.raises(BoomError), atomic_folder(tmp_path / "results"):
        raise BoomError
    assert names(tmp_path / "results") == ["a.json"]


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    holds = (
        "from pathlib import Path\nfrom flawsmith.files import atomic_folder\n"
        "with atomic_folder(Path('results')) as folder:\n"
        "    (folder / 'a.txt').write_text('first')\n    print('in', flush=True)\n    input()\n"
    )
    process = python(holds, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    with pytest.raises(UserError, match=r"Another run writes .*results now"), atomic_folder(tmp_path / "results"):
        pass
    with atomic_folder(tmp_path / "other") as folder:
        (folder / "b.txt").write_text("other")
    process.communicate("\n")
    assert contents(tmp_path / "results") == {"first"}
    with atomic_folder(tmp_path / "results") as folder, sole_writer(tmp_path / "results"):
        (folder / "a.txt").write_text("second")
    assert contents(tmp_path / "results") == {"second"}
    assert names(tmp_path) == ["other", "results"]


@pytest.fixture(params=["mounted", "looks mounted", "hidden mount", "parent is read-only"])
def fixed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that cannot be renamed, with earlier results."""
    folder = tmp_path / "results"
    folder.mkdir()
    if request.param == "mounted":
        if subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True, check=False).returncode:
            pytest.skip("file systems may not be mounted here")
    elif request.param == "looks mounted":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder)
    elif request.param == "hidden mount":
        rename = Path.rename

        def refuse(self: Path, target: Path) -> Path:
            if self == folder:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self), None, str(target))
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", refuse)
    else:  # rights do not bind root
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    tree(
        folder,
        {"a.txt": b"old", "gone/b.txt": b"old", "was-folder/c.txt": b"old", "was-file": b"old", "lost+found": b""},
    )
    yield folder
    if request.param == "mounted":
        subprocess.run(["umount", folder], check=True)


def test_a_folder_that_cannot_be_renamed_is_filled_and_loses_nothing_before(fixed: Path) -> None:
    old = {path: path.read_text() for path in fixed.rglob("*") if path.is_file()}
    for error in (BoomError, KeyboardInterrupt):
        with pytest.raises(error), atomic_folder(fixed) as folder:
            tree(folder, {"a.txt": b"half"})
            raise error
        assert {path: path.read_text() for path in fixed.rglob("*") if path.is_file()} == old
    with atomic_folder(fixed) as folder:
        tree(folder, {"a.txt": b"new", "new/d.txt": b"new", "was-folder": b"new", "was-file/e.txt": b"new"})
        (folder / "empty").mkdir()
        with pytest.raises(UserError, match="Another run"):
            _run_in_thread(lambda: atomic_folder(fixed).__enter__())
    found = {path.relative_to(fixed).as_posix() for path in fixed.rglob("*")}
    assert found == {"a.txt", "new", "new/d.txt", "was-folder", "was-file", "was-file/e.txt", "empty", "lost+found"}
    assert (fixed / "a.txt").read_text() == "new"
    assert names(fixed.parent) == ["results"]


def _run_in_thread(function: Callable[[], object]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(function).result()


def test_what_a_link_points_to_is_replaced(tmp_path: Path) -> None:
    tree(tmp_path / "disk" / "results", {"a.txt": b"old"})
    (tmp_path / "results").symlink_to(tmp_path / "disk" / "results")
    with atomic_folder(tmp_path / "results") as folder:
        (folder / "b.txt").write_text("new")
    assert names(tmp_path / "disk" / "results") == ["b.txt"]
    assert (tmp_path / "results").is_symlink()
    assert names(tmp_path / "disk") == ["results"]


@pytest.mark.parametrize("name", ["x" * 251 + ".txt", "检" * 83 + ".png", "ä" * 127])
def test_a_name_as_long_as_the_file_system_takes_is_written(tmp_path: Path, name: str) -> None:
    with atomic_file(tmp_path / name) as temporary:
        temporary.write_text("new")
    with atomic_folder(tmp_path / f"d{name[1:]}") as folder:
        (folder / name).write_text("new")
    assert names(tmp_path) == sorted([name, f"d{name[1:]}"])


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "检" * 90 + ".png", "x." + "y" * 300, "short.png"])
def test_a_fitted_name_fits_and_is_another_for_another_name(name: str) -> None:
    fitted = fit_name(name)
    assert len(fitted.encode()) <= 255
    assert fitted != fit_name(f"{name[:-5]}z{name[-4:]}")
    assert fitted.endswith(".png") == name.endswith(".png")
    assert fit_name(fitted) == fitted


def test_an_error_in_writing_names_the_file_that_is_meant(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, atomic_folder(tmp_path / "out") as folder:  # noqa: SIM117
        with atomic_file(folder / "a.bin"):
            raise RuntimeError("Error: I/O error: No space left on device (os error 28)")
    assert caught.value.filename == str(tmp_path / "out" / "a.bin")
    with pytest.raises(OSError, match="a directory") as caught, atomic_file(tmp_path / "out" / "a.bin") as temporary:
        temporary.parent.joinpath("a.bin").mkdir()
        temporary.write_text("x")
    assert caught.value.filename == str(tmp_path / "out" / "a.bin")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EPERM, errno.EROFS, errno.ENOSPC])
def test_a_place_that_cannot_be_written_or_locked_is_told_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught, atomic_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == []
    told = refusal(caught.value)
    assert told is not None
    assert str(told).startswith(f"{tmp_path / 'out'} cannot be ")
    assert os.strerror(number) in str(told)
    assert refusal(ConnectionRefusedError(errno.ECONNREFUSED, "refused")) is None


def test_json_is_sorted_ends_with_a_newline_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": [0.1, None]})
    assert path.read_text().endswith("}\n")
    assert list(json.loads(path.read_text())) == ["a", "b"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": [0.1, None], "b": 1}
    assert names(tmp_path) == ["a.json"]
    with pytest.raises(UserError, match=r"b\.json does not exist"):
        read_json(tmp_path / "b.json")
    for content in (b"", b"{", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.json is not valid JSON"):
            read_json(path)


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


def test_a_folder_digest_covers_what_links_lead_to(tmp_path: Path) -> None:
    share = tree(tmp_path / "share", {"sub/b.txt": b"2", "a.txt": b"1"})
    plain = digest_path(share)
    assert plain == "2b442318ef8271843e195da7273a22a8e4524bbc77fcedfc7e398035540c82aa"  # as it has always been
    linked = tree(tmp_path / "linked", {"a.txt": b"1"})
    (linked / "sub").symlink_to(share / "sub")
    (linked / "up").symlink_to(tmp_path)  # a loop
    assert digest_path(linked) == plain
    (share / "sub" / "b.txt").write_bytes(b"3")
    assert digest_path(linked) != plain
    (linked / "c.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"linked: c\.txt is a link to nothing, so the folder has no digest"):
        digest_path(linked)


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
