"""Writing that is never seen half-done, and digests that know nothing of time or place.

What is not in place yet has a short hidden name that ends in `.tmp`, which ignore files pass over. The name holds a
digest of the final one, so that long names fit too.
"""

import csv
import hashlib
import json
import os
import secrets
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flawsmith.data.walk import FILE, UNREADABLE, entries
from flawsmith.errors import UserError, name_file

LONGEST_NAME = 255  # bytes; all common file systems take so many
LOCK_SECONDS = 0.3  # a writer that is just ending is waited for


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it if the block succeeds, and vanishes if it fails."""
    temporary = path.parent / _temporary_name(path.name)
    with name_file(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, keep_on: type[BaseException] | tuple[type[BaseException], ...] = ()) -> Iterator[Path]:
    """Yield an empty folder that replaces `path` if the block succeeds, and vanishes if it fails.

    `keep_on` names exceptions after which the folder is put in place all the same (a gate's report must be readable).
    If `path` is a link, its target is replaced. A mount point, or a folder in a read-only parent, cannot be exchanged
    as a whole: it is filled file by file, and old files go when all new ones are in place.

    Raises:
        UserError: another run writes `path` now.
    """
    with sole_writer(path) as place:
        temporary = place.room / _temporary_name(place.target.name)
        with name_file(place.target, temporary):
            temporary.mkdir()
            try:
                yield temporary
            except keep_on:
                place.put(temporary)
                raise
            else:
                place.put(temporary)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def sole_writer(path: Path) -> Iterator["_Place"]:
    """Keep others from writing the folder `path` while the block runs; the thread that holds it may enter again.

    First, what a killed run left there is removed, and what it had moved aside is put back.

    Raises:
        UserError: another run writes it now.
    """
    place = _Place.of(path)
    held: set[Path] = _held.__dict__.setdefault("targets", set())
    if place.target in held:
        yield place
        return
    with name_file(place.target, place.lock):
        place.room.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place.lock, timeout=LOCK_SECONDS)
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(
                f"Another run writes {path} now; wait until it has ended, or name another folder."
            ) from error
        except OSError:  # no locks here
            place.lock.unlink(missing_ok=True)
            raise
    held.add(place.target)
    try:
        place.recover()
        yield place
    finally:
        held.remove(place.target)
        with suppress(OSError):
            place.lock.unlink()  # while we hold it: whoever waits for it sees that it is gone, and makes a new one
        lock.release()


def restore(path: Path) -> None:
    """Put the folder `path`, or its parent, back if a run was killed between moving the old one aside and putting the
    new one in. For readers that do not find it."""
    for folder in (path, path.parent):
        if _Place.of(folder).is_away():
            with suppress(UserError), sole_writer(folder):  # whoever writes it now has put it back
                pass


_held = threading.local()


@dataclass(frozen=True)
class _Place:
    """A folder to be replaced, and the `room` for temporary files: its parent, or itself where it cannot be renamed."""

    target: Path
    room: Path

    @classmethod
    def of(cls, path: Path) -> "_Place":
        """Choose the room for a folder that need not exist yet."""
        target = path.resolve()
        is_fixed = target.is_dir() and (os.path.ismount(target) or not os.access(target.parent, os.W_OK | os.X_OK))
        return cls(target, target if is_fixed else target.parent)

    @property
    def lock(self) -> Path:
        """The lock file of writers."""
        return self.room / f".{digest_name(self.target.name)}.lock.tmp"

    @property
    def aside(self) -> Path:
        """Where the old folder lies while the new one is put in."""
        return self.room / f".{digest_name(self.target.name)}.old.tmp"

    def is_away(self) -> bool:
        """Whether the target lies aside, with nothing in its place but an empty folder that somebody may have made."""
        is_empty = self.target.is_dir() and not any(self.target.iterdir())
        return self.aside.exists() and (is_empty or not self.target.exists())

    def recover(self) -> None:
        """Undo what a killed run left half-done. The caller holds the lock."""
        if self.is_away():
            self.aside.replace(self.target)  # also where an empty folder is
        for left in (self.aside, *self.room.glob(f".{digest_name(self.target.name)}-*.tmp")):
            shutil.rmtree(left, ignore_errors=True)

    def put(self, folder: Path) -> None:
        """Replace the target by `folder`: the old one aside, the new one in, the old one away."""
        if self.room == self.target:
            _fill(self.target, folder)
            return
        try:
            if self.target.exists():
                self.target.rename(self.aside)
            folder.rename(self.target)
        except BaseException as error:
            if self.aside.exists() and not self.target.exists():
                self.aside.rename(self.target)
            if not isinstance(error, OSError) or not self.target.is_dir():
                raise
            _fill(self.target, folder)  # a mount that does not look like one, or a folder of somebody else
        shutil.rmtree(self.aside, ignore_errors=True)


def _fill(target: Path, folder: Path) -> None:
    """Move all of `folder` into `target`, then remove whatever else `target` held.

    Files of the top folder come last, for they name those in its subfolders.
    """
    new = [path.relative_to(folder) for path in folder.rglob("*")]
    for part in sorted(part for part in new if (folder / part).is_dir()):
        if not (target / part).is_dir():
            (target / part).unlink(missing_ok=True)
            (target / part).mkdir()
    for part in sorted(
        (part for part in new if not (folder / part).is_dir()), key=lambda part: (-len(part.parts), part)
    ):
        if (target / part).is_dir():
            shutil.rmtree(target / part)
        with atomic_file(target / part) as temporary:
            shutil.move(folder / part, temporary)
    kept = {folder.name, LOST, *(f".{digest_name(target.name)}.{kind}.tmp" for kind in ("lock", "old"))}
    for path in sorted(target.rglob("*"), reverse=True):
        part = path.relative_to(target)
        if part in new or part.parts[0] in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()


LOST = "lost+found"  # in each ext4 file system's top folder


def is_ours(name: str) -> bool:
    """Whether this is the name of something not in place yet, or left by a killed run."""
    return name.startswith(".") and name.endswith(".tmp")


def fit_name(name: str, longest: int = LONGEST_NAME) -> str:
    """Shorten a name with too many bytes for a file system to its beginning, a digest of the whole, and its suffix."""
    raw = os.fsencode(name)
    if len(raw) <= longest:
        return name
    end = f"~{digest_name(name)}{Path(name).suffix if len(os.fsencode(Path(name).suffix)) < 16 else ''}"
    return raw[: longest - len(os.fsencode(end))].decode(errors="ignore") + end


def digest_name(name: str) -> str:
    """12 hex digits that stand for a name."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:12]


def _temporary_name(name: str) -> str:
    return f".{digest_name(name)}-{secrets.token_hex(4)}.tmp"


def write_json(path: Path, content: Any) -> None:
    """Write sorted, indented JSON; NaN is refused because it is no JSON and hides a failure."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON, or raise a UserError that names the file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        restore(path)
        if path.exists():
            return read_json(path)
        raise UserError(f"{path} does not exist; run the stage that writes it first (`dvc repro`).") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); remove it and run its stage again.") from error


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file; floats keep 7 significant digits so that the text is stable and short."""
    with atomic_file(path) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            writer.writerow([f"{value:.7g}" if isinstance(value, float) else value for value in row])


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_path(path: Path) -> str:
    """SHA-256 of a file, or of a folder's relative names and contents, linked ones too (hidden files left out).

    Raises:
        UserError: it does not exist, or a part of it cannot be read.
    """
    if not path.exists():
        restore(path)
    if path.is_file():
        return digest_file(path)
    if not path.is_dir():
        raise UserError(f"{path} does not exist, so it has no digest; run the stage that writes it first.")
    total = hashlib.sha256()
    for entry in sorted(entries(path), key=lambda entry: entry.name.split("/")):
        if entry.kind == UNREADABLE:
            raise UserError(f"{path}: {entry.name} {entry.why}, so the folder has no digest; mend or remove it.")
        if entry.kind == FILE:
            total.update(os.fsencode(f"{entry.name}\0{digest_file(Path(entry.path))}\n"))
    return total.hexdigest()


def digest_json(content: Mapping[str, Any]) -> str:
    """SHA-256 of a mapping in canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
