"""Where images come from: files, folders, patterns, video files, and paths that arrive on a stream line by line.

Each kind ends up as `Task`s: things that can be decoded into one image, in any thread, and have a name in the results.
"""

import codecs
import glob
import os
import select
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event

from flawsmith.data.images import FloatImage, Reading, count_pixels, read_image
from flawsmith.data.walk import NO_SUFFIX, SUFFIXES, count_sentence, find
from flawsmith.errors import UserError
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
class Inputs:
    """What files, folders and patterns give: images and videos, what could not be looked at, what was passed over."""

    files: tuple[InputFile, ...]
    unreadable: tuple[Unreadable, ...]
    passed_over: Mapping[str, int]

    @property
    def in_order(self) -> list[InputFile | Unreadable]:
        """All that gets a row, sorted by name."""
        return sorted((*self.files, *self.unreadable), key=_name)


@dataclass(frozen=True)
class Task:
    """One image to decode: `load` decodes it or raises a UserError, `pixels` tells its size beforehand (0: unknown)."""

    name: str
    pixels: Callable[[], int]
    load: Callable[[], FloatImage]
    is_frame: bool = False


def find_images(inputs: Sequence[Path], leave_out: Path | None = None) -> Inputs:
    """List the images of files, folders (searched as `walk.find` does) and patterns, each once, sorted by name.

    Names are relative to the folder itself if one is given, else to the nearest folder that holds all inputs. A file
    named explicitly is always kept. A pattern (`*`, `?`, `[...]`, `**`) counts as its matches; where it leaves the
    suffix open, only images and videos match. Nothing below `leave_out` counts, so that results are never taken for
    inputs.

    Raises:
        UserError: an input does not exist, a pattern matches nothing, or there is nothing at all to be looked at.
    """
    if not inputs:
        raise UserError("No input was given; name at least one image or folder.")
    skipped = None if leave_out is None else _absolute(leave_out)
    images: set[Path] = set()
    unreadable: dict[Path, str] = {}
    passed_over: Counter[str] = Counter()
    bases = []
    for given in (match for path in inputs for match in _expand(path, skipped, passed_over)):
        path = _absolute(given)
        if path.is_dir():
            bases.append(path)
            found = find(path, skipped)
            images.update(found.images)
            unreadable.update(found.unreadable)
            passed_over.update(found.passed_over)
        elif path.is_file():
            bases.append(path.parent)
            images.add(path)
        elif path.is_symlink():
            bases.append(path.parent)
            unreadable[path] = "is a link to nothing"
        else:
            raise UserError(f"{given} does not exist; check the path.")
    if not images and not unreadable:
        if skipped is not None and any(_absolute(path).is_relative_to(skipped) for path in inputs):
            raise UserError(
                f"The images lie in {leave_out}, which is replaced as a whole; name a new folder for --out."
            )
        names = ", ".join(str(path) for path in inputs)
        told = count_sentence(0, passed_over)
        raise UserError(f"{names} holds no image ({', '.join(SUFFIXES)}): {told}; name a folder that does.")
    base = Path(os.path.commonpath(bases))

    def name_of(path: Path) -> str:
        return path.relative_to(base).as_posix()

    return Inputs(
        tuple(sorted((InputFile(path, name_of(path)) for path in images), key=lambda file: file.name)),
        tuple(Unreadable(name_of(path), f"{name_of(path)} {why}") for path, why in sorted(unreadable.items())),
        passed_over,
    )


def read_stream(
    descriptor: int, leave_out: Path | None, stop: Event, passed_over: Counter[str] | None = None
) -> Iterator[InputFile | Unreadable]:
    """Files named on a stream, one path a line, as the lines come; ends with the stream or when `stop` is set.

    A file's name is the line, tidied up; a folder stands for the images below it, and what is passed over there is
    added to `passed_over`. Empty lines count for nothing, a path that does not exist or lies below `leave_out` is
    unreadable. A list may begin with a byte order mark and be in UTF-16.
    """
    skipped = None if leave_out is None else _absolute(leave_out)
    for line in _lines(descriptor, stop):
        text = os.fsdecode(line.rstrip(b"\r\n"))
        if not text.strip():
            continue
        if "\0" in text:
            yield Unreadable(
                "-", "The list on standard input holds NUL bytes; send one path a line (no `-print0`), as UTF-8."
            )
            return
        name = Path(os.path.normpath(text)).as_posix()
        path = _absolute(Path(text))
        if skipped is not None and path.is_relative_to(skipped):
            yield Unreadable(name, f"{name} lies in the folder of the results; name another folder for --out.")
        elif path.is_dir():
            found = find(path, skipped)
            if passed_over is not None:
                passed_over.update(found.passed_over)
            yield from (InputFile(each, f"{name}/{found.name_of(each)}") for each in found.images)
            for each, why in found.unreadable.items():
                inside = f"{name}/{found.name_of(each)}"
                yield Unreadable(inside, f"{inside} {why}")
            if not found.images and not found.unreadable:
                yield Unreadable(name, f"{name} is a folder that holds no image ({', '.join(SUFFIXES)}).")
        else:
            yield InputFile(path, name)


def tasks_of(
    files: Iterable[InputFile | Unreadable], every: int, reading: Reading, stop: Event
) -> Iterator[Task | Unreadable]:
    """What is to be decoded for these files: an image each, of a video each `every`-th frame.

    A video that cannot be read, or not to its end, gives what can be read and then an `Unreadable`.
    """
    for file in files:
        if isinstance(file, Unreadable):
            yield file
        elif file.path.suffix.lower() not in video.SUFFIXES:
            yield Task(file.name, partial(count_pixels, file.path), partial(_load, file, reading))
        else:
            try:
                for frame in video.read_frames(file.path, every, reading):
                    if stop.is_set():
                        return
                    yield Task(f"{file.name}#{frame.index:06d}", frame.count_pixels, frame.convert, is_frame=True)
            except UserError as error:
                yield Unreadable(file.name, _renamed(error, file))


def _load(file: InputFile, reading: Reading) -> FloatImage:
    try:
        return read_image(file.path, reading)
    except UserError as error:
        raise UserError(_renamed(error, file)) from error


def _renamed(error: UserError, file: InputFile) -> str:
    return str(error).replace(str(file.path), file.name)


def _lines(descriptor: int, stop: Event) -> Iterator[bytes]:
    """Read past Python's buffers: they would hold lines back, and a thread that waits in them cannot be ended."""
    rest = b""
    decode: Callable[[bytes], bytes] | None = None
    while not stop.is_set():
        ready, _, _ = select.select([descriptor], [], [], STOP_LOOK)
        if not ready:
            continue
        chunk = os.read(descriptor, 65536)
        if not chunk:
            yield rest  # a last line without its end
            return
        rest += chunk
        if decode is None:
            if rest in (codecs.BOM_UTF8[:1], codecs.BOM_UTF8[:2], codecs.BOM_UTF16_LE[:1], codecs.BOM_UTF16_BE[:1]):
                continue  # a mark of which the end is still to come
            decode = _decoder(rest)
            rest = decode(rest)
        else:
            rest = rest[: -len(chunk)] + decode(chunk)
        *lines, rest = rest.split(b"\n")
        yield from lines


def _decoder(start: bytes) -> Callable[[bytes], bytes]:
    """What brings the bytes of a list to lines of the file system's own, by the mark at its start."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        from_utf16 = codecs.getincrementaldecoder("utf-16")("replace")
        return lambda chunk: os.fsencode(from_utf16.decode(chunk))
    marks = [codecs.BOM_UTF8] if start.startswith(codecs.BOM_UTF8) else []
    return lambda chunk: chunk[len(marks.pop()) :] if marks else chunk


def _expand(given: Path, skipped: Path | None, passed_over: Counter[str]) -> list[Path]:
    """A path as it is, or the matches of a pattern; a file whose name looks like a pattern is a file."""
    text = str(given)
    if not glob.has_magic(text) or os.path.lexists(given):
        return [given]
    suffix = given.suffix.lower()
    is_open = not suffix or glob.has_magic(suffix)
    matches = [Path(match) for match in glob.glob(text, recursive=True)]  # noqa: PTH207 that takes no absolute one
    if skipped is not None:
        matches = [path for path in matches if not _absolute(path).is_relative_to(skipped)]
    if is_open:
        known = [path for path in matches if path.is_dir() or path.suffix.lower() in (*SUFFIXES, *video.SUFFIXES)]
        passed_over.update(path.suffix.lower() or NO_SUFFIX for path in matches if path not in set(known))
        matches = known
    if not matches:
        raise UserError(f"{given} matches no image; check the pattern.")
    return matches


def _name(item: InputFile | Unreadable) -> str:
    return item.name if isinstance(item, InputFile) else item.file


def _absolute(path: Path) -> Path:
    """Without resolving links: DVC links data files into place, and their names here are the ones that count."""
    return Path(os.path.normpath(path.absolute()))
