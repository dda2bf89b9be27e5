"""Where images come from: files, folders, patterns, video files, and paths that arrive on a stream line by line.

Each kind ends up as `Task`s: things that can be decoded into one image, in any thread, and have a name in the results.
"""

import glob
import os
import select
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event

from flawsmith.errors import UserError
from flawsmith.images import SUFFIXES, FloatImage, count_pixels, read_image
from flawsmith.inference import video

STREAM = Path("-")  # as an input: paths come on standard input
STOP_LOOK = 0.1  # seconds between looks whether a wait for lines should end


@dataclass(frozen=True)
class InputFile:
    """A file to score: where it lies, and its name in the results (relative, with forward slashes)."""

    path: Path
    name: str


@dataclass(frozen=True)
class Unreadable:
    """A file that could not be scored, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Task:
    """One image to decode: `load` decodes it or raises a UserError, `pixels` tells its size beforehand (0: unknown)."""

    name: str
    pixels: Callable[[], int]
    load: Callable[[], FloatImage]
    is_frame: bool = False


def find_images(inputs: Sequence[Path], leave_out: Path | None = None) -> list[InputFile]:
    """List the images of files, folders (searched recursively) and patterns, each once, sorted by name.

    Names are relative to the folder itself if one is given, else to the nearest folder that holds all inputs. In
    folders, hidden files and files without an image suffix are passed over; a file named explicitly is always kept. A
    pattern (`*`, `?`, `[...]`, `**`) counts as its matches; where it leaves the suffix open, only images and videos
    match. Nothing below `leave_out` counts, so that results are never taken for inputs.

    Raises:
        UserError: an input does not exist, a pattern matches nothing, or there is no image at all.
    """
    if not inputs:
        raise UserError("No input was given; name at least one image or folder.")
    skipped = None if leave_out is None else _absolute(leave_out)
    found: set[Path] = set()
    bases = []
    for given in (match for path in inputs for match in _expand(path, skipped)):
        path = _absolute(given)
        if path.is_dir():
            bases.append(path)
            found.update(_images_below(path, skipped))
        elif path.is_file():
            bases.append(path.parent)
            found.add(path)
        else:
            raise UserError(f"{given} does not exist; check the path.")
    if not found:
        if skipped is not None and any(_absolute(path).is_relative_to(skipped) for path in inputs):
            raise UserError(
                f"The images lie in {leave_out}, which is replaced as a whole; name a new folder for --out."
            )
        names = ", ".join(str(path) for path in inputs)
        raise UserError(f"{names} holds no image ({', '.join(SUFFIXES)}); name a folder that does.")
    base = Path(os.path.commonpath(bases))
    files = [InputFile(path, path.relative_to(base).as_posix()) for path in found]
    return sorted(files, key=lambda file: file.name)


def read_stream(descriptor: int, leave_out: Path | None, stop: Event) -> Iterator[InputFile | Unreadable]:
    """Files named on a stream, one path a line, as the lines come; ends with the stream or when `stop` is set.

    A file's name is the line, tidied up; a folder stands for the images below it. Empty lines count for nothing, a
    path that does not exist or lies below `leave_out` is unreadable.
    """
    skipped = None if leave_out is None else _absolute(leave_out)
    for line in _lines(descriptor, stop):
        text = os.fsdecode(line.rstrip(b"\r\n"))
        if not text.strip():
            continue
        name = Path(os.path.normpath(text)).as_posix()
        path = _absolute(Path(text))
        if skipped is not None and path.is_relative_to(skipped):
            yield Unreadable(name, f"{name} lies in the folder of the results; name another folder for --out.")
        elif path.is_dir():
            below = sorted(found.relative_to(path).as_posix() for found in _images_below(path, skipped))
            yield from (InputFile(path / each, f"{name}/{each}") for each in below)
            if not below:
                yield Unreadable(name, f"{name} is a folder that holds no image ({', '.join(SUFFIXES)}).")
        else:
            yield InputFile(path, name)


def tasks_of(
    files: Iterable[InputFile | Unreadable], every: int, max_pixels: int, stop: Event
) -> Iterator[Task | Unreadable]:
    """What is to be decoded for these files: an image each, of a video each `every`-th frame.

    A video that cannot be read, or not to its end, gives what can be read and then an `Unreadable`.
    """
    for file in files:
        if isinstance(file, Unreadable):
            yield file
        elif file.path.suffix.lower() not in video.SUFFIXES:
            yield Task(file.name, partial(count_pixels, file.path), partial(_load, file, max_pixels))
        else:
            try:
                for frame in video.read_frames(file.path, every, max_pixels):
                    if stop.is_set():
                        return
                    yield Task(f"{file.name}#{frame.index:06d}", frame.count_pixels, frame.convert, is_frame=True)
            except UserError as error:
                yield Unreadable(file.name, _renamed(error, file))


def _load(file: InputFile, max_pixels: int) -> FloatImage:
    try:
        return read_image(file.path, max_pixels)
    except UserError as error:
        raise UserError(_renamed(error, file)) from error


def _renamed(error: UserError, file: InputFile) -> str:
    return str(error).replace(str(file.path), file.name)


def _lines(descriptor: int, stop: Event) -> Iterator[bytes]:
    """Read past Python's buffers: they would hold lines back, and a thread that waits in them cannot be ended."""
    rest = b""
    while not stop.is_set():
        ready, _, _ = select.select([descriptor], [], [], STOP_LOOK)
        if not ready:
            continue
        chunk = os.read(descriptor, 65536)
        if not chunk:
            yield rest  # a last line without its end
            return
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines


def _expand(given: Path, skipped: Path | None) -> list[Path]:
    """A path as it is, or the matches of a pattern; a file whose name looks like a pattern is a file."""
    text = str(given)
    if not glob.has_magic(text) or os.path.lexists(given):
        return [given]
    suffix = given.suffix.lower()
    is_open = not suffix or glob.has_magic(suffix)
    matches = [Path(match) for match in glob.glob(text, recursive=True)]  # noqa: PTH207 that takes no absolute one
    if is_open:
        matches = [path for path in matches if path.is_dir() or path.suffix.lower() in (*SUFFIXES, *video.SUFFIXES)]
    if skipped is not None:
        matches = [path for path in matches if not _absolute(path).is_relative_to(skipped)]
    if not matches:
        raise UserError(f"{given} matches no image; check the pattern.")
    return matches


def _images_below(folder: Path, skipped: Path | None) -> Iterable[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        inside = skipped is not None and path.is_relative_to(skipped)
        if path.suffix.lower() in SUFFIXES and not hidden and not inside and path.is_file():
            yield path


def _absolute(path: Path) -> Path:
    """Without resolving links: DVC links data files into place, and their names here are the ones that count."""
    return Path(os.path.normpath(path.absolute()))
