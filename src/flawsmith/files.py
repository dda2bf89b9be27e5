"""Writing that is never seen half-done, and digests that know nothing of time or place."""

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flawsmith.errors import UserError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it if the block succeeds, and vanishes if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, keep_on: type[BaseException] | tuple[type[BaseException], ...] = ()) -> Iterator[Path]:
    """Yield an empty folder beside `path` that replaces it if the block succeeds, and vanishes if it fails.

    `keep_on` names exceptions after which the folder is put in place all the same (a gate's report must be readable).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # no pid: what a killed run left is cleared by the next one
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    except keep_on:
        _put_in_place(temporary, path)
        raise
    else:
        _put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    temporary.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write sorted, indented JSON; NaN is refused because it is no JSON and hides a failure."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON, or raise a UserError that names the file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
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
    """SHA-256 of a file, or of a folder's relative names and contents (hidden and temporary files left out)."""
    if path.is_file():
        return digest_file(path)
    if not path.is_dir():
        raise UserError(f"{path} does not exist, so it has no digest; run the stage that writes it first.")
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in relative.parts):
            total.update(f"{relative.as_posix()}\0{digest_file(file)}\n".encode())
    return total.hexdigest()


def digest_json(content: Mapping[str, Any]) -> str:
    """SHA-256 of a mapping in canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
