"""The journal of a watched folder, results.jsonl: one line an image, and the only record of what is done.

A file is known by its name and content (SHA-256), so a restart repeats nothing and loses nothing. A line torn by a
crash is taken back at the next start, and its image is scored again.
"""

import json
import os
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from flawsmith.errors import UserError
from flawsmith.files import is_ours, read_json, write_json
from flawsmith.inference.mqtt import SPOOL
from flawsmith.inference.options import LINES
from flawsmith.inference.predictor import Predictor
from flawsmith.inference.writers import MASKS, OVERLAYS, Row, check_out, describe_model, json_line

FORGET = 3600.0  # seconds a file must be gone to be forgotten: a share may be away for some time and come back
MODEL, LOCK = "model.json", ".lock"

Signature = tuple[int, ...]  # size, mtime and ctime in ns, inode: as long as it is the same, so is the content


@dataclass(frozen=True)
class Known:
    """A file that has its line."""

    signature: Signature
    digest: str


class Journal:
    """results.jsonl, opened for appending, and the files that it knows by name.

    Raises:
        UserError: a line is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.known: dict[str, Known] = {}
        self._gone: dict[str, float] = {}  # known files that are not in the folder: since when
        self._stream = path.open("a+b")
        end = 0
        self._stream.seek(0)
        for number, line in enumerate(self._stream, start=1):
            if not line.endswith(b"\n"):
                break  # torn by a crash
            try:
                row = json.loads(line)
                self.known[row["file"]] = Known(tuple(row["stat"]), row["sha256"])
            except (ValueError, KeyError, TypeError) as error:
                self._stream.close()
                raise UserError(
                    f"{path} is damaged in line {number}; mend or remove that line, or name a new folder for --out."
                ) from error
            end += len(line)
        self._stream.truncate(end)
        os.fsync(self._stream.fileno())

    def add(self, row: Row) -> None:
        """Append a row with the `sha256` and `stat` that tell its file again. It is on the disk when this returns."""
        self._stream.write(f"{json_line(row)}\n".encode())
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.known[row["file"]] = Known(tuple(row["stat"]), row["sha256"])

    def is_known(self, name: str, signature: Signature) -> bool:
        """Whether the file has its line, and has not been touched since."""
        known = self.known.get(name)
        return known is not None and known.signature == signature

    def touch(self, name: str, signature: Signature) -> None:
        """Remember a new signature of the same content, in memory alone: a restart finds it out again."""
        self.known[name] = replace(self.known[name], signature=signature)

    def forget(self, present: Collection[str], now: float) -> None:
        """Drop the known files that have not been among those `present` in the folder for FORGET seconds.

        So memory follows the folder and not the years. A file that comes back after that is a new arrival.
        """
        self._gone = {name: self._gone.get(name, now) for name in self.known.keys() - present}
        for name in [name for name, since in self._gone.items() if now - since >= FORGET]:
            del self.known[name], self._gone[name]

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


@contextmanager
def open_journal(folder: Path, out: Path, predictor: Predictor) -> Iterator[Journal]:
    """Open the journal in `out`, which is made if need be, and keep other watches from it meanwhile.

    Raises:
        UserError: `out` holds something else, the results of another model, or the watched folder; or another watch
            uses it.
    """
    if folder.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out} holds the watched folder; name another folder for --out.")
    is_watch = (out / MODEL).exists()  # `predict` without --watch may leave lines too, but no model.json
    ours = {OVERLAYS, MASKS, MODEL, LOCK, SPOOL, *([LINES] if is_watch else [])}
    check_out(out.resolve(), out, (), ours, "results of a watch")
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"Another watch writes into {out}; end it first, or name a new folder for --out.") from error
    try:
        for path in (*out.glob(".*.tmp"), *(out / OVERLAYS).rglob(".*.tmp"), *(out / MASKS).rglob(".*.tmp")):
            if is_ours(path.name) and path.is_file():  # `atomic_file` had not put it in place when it was killed
                path.unlink()
        model = json.loads(json.dumps(describe_model(predictor)))
        if (out / MODEL).exists() and read_json(out / MODEL) | {"provider": predictor.provider} != model:
            raise UserError(f"{out} holds results of another model or threshold; name a new folder for --out.")
        write_json(out / MODEL, model)
        with closing(Journal(out / LINES)) as journal:
            _sync_folder(out)
            yield journal
    finally:
        lock.release()


def _sync_folder(folder: Path) -> None:
    """So that a file new in it survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
