"""Where images come from: files, folders, patterns, video files, and paths that arrive on a stream line by line.

Each kind ends up as `Task`s: things that can be decoded into one image, in any thread, and have a name in the results.
"""

import codecs
import glob
import os
import select
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event

from flawsmith.data.images import FloatImage, Reading, count_pixels, read_image
from flawsmith.data.walk import NO_SUFFIX, SUFFIXES, count_sentence, find
from flawsmith.errors import UserError
from flawsmith.inference import video

STREAM = Path("-")  # as an input: paths come on standard input
STOP_LOOK = 0.1  # seconds between looks whether a wait for lines should end
LINGER = 0.01  # seconds that a line waits for others to be scored together with it


@dataclass(frozen=True)
class InputFile:
    """A file to score: where it lies, and its name in the results (relative, with forward slashes)."""

    path: Path
    name: str


@dataclass(frozen=True)
class Unreadable:
    """A file that could not be scored, its name in the results, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Inputs:
    """What files, folders and patterns give.

    Attributes:
        files: images and videos, sorted by name.
        unreadable: what could not be looked at.
        passed_over: how many files of each other kind there are.
    """

    files: tuple[InputFile, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()
    passed_over: Mapping[str, int] = field(default_factory=dict)

    @property
    def in_order(self) -> list[InputFile | Unreadable]:
        """All that gets a row, sorted by name."""
        return sorted((*self.files, *self.unreadable), key=lambda item: item.name)


@dataclass(frozen=True)
class Task:
    """One image to decode: `load` decodes it or raises a UserError, `pixels` tells its size beforehand (0: unknown)."""

    name: str
    pixels: Callable[[], int]
    load: Callable[[], FloatImage]


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
        bases.append(path if path.is_dir() else path.parent)
        if path.is_dir():
            found = find(path, skipped)
            images.update(found.images)
            unreadable.update(found.unreadable)
            passed_over.update(found.passed_over)
        elif path.is_file():
            images.add(path)
        elif path.is_symlink():
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
    names_of = {path: path.relative_to(base).as_posix() for path in (*images, *unreadable)}
    return Inputs(
        tuple(sorted((InputFile(path, names_of[path]) for path in images), key=lambda file: file.name)),
        tuple(Unreadable(names_of[path], f"{names_of[path]} {why}") for path, why in sorted(unreadable.items())),
        passed_over,
    )


def read_stream(
    descriptor: int, leave_out: Path | None, stop: Event, passed_over: Counter[str]
) -> Iterator[InputFile | Unreadable | None]:
    """Yield the files named on a stream, one path a line, as the lines come; None when none comes for now.

    Ends with the stream, or when `stop` is set. A file's name is the line, tidied up. A folder stands for the images
    below it; what is passed over there is added to `passed_over`. Empty lines count for nothing. A path that does not
    exist or lies below `leave_out` is unreadable. A list may begin with a byte order mark and be in UTF-16.
    """
    skipped = None if leave_out is None else _absolute(leave_out)
    for line in _lines(descriptor, stop):
        if line is None:
            yield None
            continue
        text = line.rstrip("\r\n")
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
    files: Iterable[InputFile | Unreadable | None], every: int, reading: Reading, stop: Event
) -> Iterator[Task | Unreadable | None]:
    """Yield what is to be decoded for these files: an image each, of a video each `every`-th frame.

    A video that cannot be read, or not to its end, gives what can be read and then an `Unreadable`.
    """
    for file in files:
        if not isinstance(file, InputFile):
            yield file
        elif not video.is_video(file.path):
            yield Task(file.name, partial(count_pixels, file.path), partial(_load, file, reading))
        else:
            try:
                for frame in video.read_frames(file.path, every, reading):
                    if stop.is_set():
                        return
                    yield Task(f"{file.name}#{frame.index:06d}", frame.count_pixels, frame.convert)
            except UserError as error:
                yield Unreadable(file.name, _renamed(error, file))


def _load(file: InputFile, reading: Reading) -> FloatImage:
    try:
        return read_image(file.path, reading)
    except UserError as error:
        raise UserError(_renamed(error, file)) from error


def _renamed(error: UserError, file: InputFile) -> str:
    return str(error).replace(str(file.path), file.name)


def _lines(descriptor: int, stop: Event) -> Iterator[str | None]:
    """Yield lines as they come, and None when none comes for now.

    Reads past Python's buffers: they would hold lines back, and a thread that waits in them cannot be ended.
    """
    decoder: codecs.IncrementalDecoder | None = None
    start, text, wait = b"", "", STOP_LOOK
    while not stop.is_set():
        if not select.select([descriptor], [], [], wait)[0]:
            wait = STOP_LOOK
            yield None
            continue
        wait = LINGER
        chunk = os.read(descriptor, 65536)
        if decoder is None:
            start += chunk
            if chunk and len(start) < 2:
                continue  # the end of a mark may still be to come
            is_wide = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            # surrogateescape: a file name that is no valid UTF-8 stays what it is
            coding, errors = ("utf-16", "replace") if is_wide else ("utf-8-sig", "surrogateescape")
            decoder = codecs.getincrementaldecoder(coding)(errors)
            text = decoder.decode(start, final=not chunk)
        else:
            text += decoder.decode(chunk, final=not chunk)
        *lines, text = text.split("\n")
        yield from lines
        if not chunk:
            yield text  # a last line without its end
            return


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


def _absolute(path: Path) -> Path:
    """Without resolving links: DVC links data files into place, and their names here are the ones that count."""
    return Path(os.path.normpath(path.absolute()))
