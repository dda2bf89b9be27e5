"""Which files of a folder count as images: one rule for training, testing, predicting, watching and monitoring.

Folders are searched with all folders in them, linked ones too, each once. Hidden files and other suffixes are skipped
and counted. What cannot be read (a link to nothing, a folder that may not be listed) is reported, never dropped.
"""

import os
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from flawsmith.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".tif", ".tiff")  # in any case
IMAGE_LIKE = (".webp", ".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".pgm", ".ppm", ".pbm", ".pnm", ".tga",
              ".exr", ".hdr", ".dng", ".raw", ".cr2", ".nef", ".arw", ".psd", ".svg", ".ico")  # fmt: skip
FILE, HIDDEN, UNREADABLE = "file", "hidden", "unreadable"
LINKED_TWICE, LINKED_BACK, NO_FILE, NO_SUFFIX = "linked twice", "linked back", "no file", "without suffix"
# Kept by file managers and servers beside a person's files, some of them with images inside: hidden in all but name.
HOUSEKEEPING = {"thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle", "__macosx", "$recycle.bin",
                "system volume information", "lost+found"}  # fmt: skip
SHOWN = 8  # kinds passed over, or unreadable files, that a sentence names


class Entry(NamedTuple):
    """A file, or a folder that is not entered: its path relative to the first folder, and why it is passed over."""

    name: str
    path: str
    kind: str  # FILE, HIDDEN, UNREADABLE, LINKED_TWICE, LINKED_BACK, NO_FILE
    why: str = ""  # of an unreadable one, as the end of a sentence that begins with its name


@dataclass(frozen=True)
class Found:
    """The files below a folder.

    Attributes:
        images: sorted, folder by folder.
        passed_over: how many of each kind: hidden, a suffix, ...
        unreadable: what could not be looked at → why, as the end of a sentence that begins with its name.
        linked: the linked folders that were entered.
    """

    folder: Path
    images: tuple[Path, ...]
    passed_over: Mapping[str, int]
    unreadable: Mapping[Path, str]
    linked: tuple[Path, ...] = ()

    def name_of(self, path: Path) -> str:
        """Path relative to the folder, with forward slashes."""
        return path.relative_to(self.folder).as_posix()

    def check(self) -> None:
        """Refuse a folder that could not be read as a whole.

        Raises:
            UserError: it names what could not be read.
        """
        if self.unreadable:
            told = [f"{self.name_of(path)} {why}" for path, why in self.unreadable.items()]
            raise UserError(f"{self.folder} cannot be read as a whole: {listed(told)}; mend or remove what is named.")

    def __str__(self) -> str:
        return count_sentence(len(self.images), self.passed_over, len(self.unreadable))


def find(folder: Path, leave_out: Path | None = None) -> Found:
    """Find the images below a folder, without those below `leave_out`; a missing folder holds nothing."""
    images: list[Path] = []
    passed_over: Counter[str] = Counter()
    unreadable: list[tuple[Path, str]] = []
    linked: list[str] = []
    try:
        for entry in entries(folder, leave_out, linked) if folder.is_dir() else ():
            kind = image_kind(entry)
            if kind == UNREADABLE:
                unreadable.append((folder / entry.name, entry.why))
            elif kind:
                passed_over[kind] += 1
            else:
                images.append(folder / entry.name)
    except OSError as error:
        unreadable.append((folder, _unlisted(error)))
    return Found(
        folder,
        tuple(sorted(images)),
        passed_over,
        dict(sorted(unreadable)),
        tuple(sorted(folder / name for name in linked)),
    )


def image_kind(entry: Entry) -> str:
    """Empty for an image, else the kind under which the entry is passed over (or UNREADABLE)."""
    if entry.kind != FILE:
        return entry.kind
    suffix = Path(entry.name).suffix.lower()
    return "" if suffix in SUFFIXES else suffix or NO_SUFFIX


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is skipped: hidden, or kept by a file manager or server."""
    return name.startswith(".") or name.lower() in HOUSEKEEPING


def entries(
    folder: str | Path, leave_out: str | Path | None = None, linked: list[str] | None = None
) -> Iterator[Entry]:
    """Yield all files below a folder, and the folders that are not entered, in no certain order.

    Linked folders are entered after all others, in the order of their names. A folder that is reached twice, also
    through links, is entered once; a link to a folder that holds the first one is not entered at all.

    Args:
        leave_out: a folder that is skipped.
        linked: a list that gets the names of the linked folders that were entered.

    Raises:
        OSError: the first folder cannot be listed.
    """
    root = os.fspath(folder)
    above = {_identity(parent) for parent in Path(os.path.realpath(root)).parents}
    skipped = None if leave_out is None else os.path.realpath(leave_out)
    entered: set[tuple[int, int]] = set()
    plain, links = deque([("", root)]), deque[tuple[str, str]]()
    while plain or links:
        is_link = not plain
        name, path = (links if is_link else plain).popleft()
        try:
            if skipped is not None and _is_below(os.path.realpath(path), skipped):
                continue
            identity = _identity(path)
            if identity in entered or identity in above:
                yield Entry(name, path, LINKED_TWICE if identity in entered else LINKED_BACK)
                continue
            with os.scandir(path) as listing:
                found = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            if not name:
                raise
            if not isinstance(error, FileNotFoundError):  # taken away meanwhile
                yield Entry(name, path, UNREADABLE, _unlisted(error))
            continue
        entered.add(identity)
        if is_link and linked is not None:
            linked.append(name)
        for entry in found:
            inside = f"{name}/{entry.name}" if name else entry.name
            kind, why = _kind_of(entry)
            if kind == "folder":
                (links if entry.is_symlink() else plain).append((inside, entry.path))
            elif kind:
                yield Entry(inside, entry.path, kind, why)
        links = deque(sorted(links))


def count_sentence(used: int, passed_over: Mapping[str, int], unreadable: int = 0) -> str:
    """`12 images used, 3 passed over (2 hidden, 1 .gif), 1 unreadable`."""
    told = [f"{used} {'image' if used == 1 else 'images'} used"]
    if total := sum(passed_over.values()):
        # what may be meant as an image is named before all else that is many
        kinds = sorted(
            passed_over.items(), key=lambda item: (item[0] != HIDDEN, item[0] not in IMAGE_LIKE, -item[1], item[0])
        )
        told.append(f"{total} passed over ({listed([f'{count} {printable(kind)}' for kind, count in kinds])})")
    if unreadable:
        told.append(f"{unreadable} unreadable")
    return ", ".join(told)


def listed(texts: Collection[str]) -> str:
    """Join texts, or the first SHOWN of many, on one line."""
    first = [printable(text) for text in texts][:SHOWN]
    return ", ".join([*first, f"{len(texts) - SHOWN} more"] if len(texts) > SHOWN else first)


def printable(name: str) -> str:
    """Make a file name printable: bytes that are no valid UTF-8 become replacement marks."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _unlisted(error: OSError) -> str:
    return f"cannot be listed ({error.strerror or error})"


def _kind_of(entry: "os.DirEntry[str]") -> tuple[str, str]:
    """The kind of an entry ("folder": to be entered), and why it is unreadable."""
    if is_hidden(entry.name):
        return HIDDEN, ""
    try:
        if entry.is_dir():
            return "folder", ""
        if entry.is_file():
            return FILE, ""
        if entry.is_symlink() and not Path(entry.path).exists():
            return UNREADABLE, "is a link to nothing"
        return NO_FILE, ""  # a pipe, a socket, a device
    except OSError as error:
        return UNREADABLE, f"cannot be looked at ({error.strerror or error})"


def _identity(path: str | Path) -> tuple[int, int]:
    found = os.stat(path)  # noqa: PTH116 the walk's own paths are texts, for speed
    return found.st_dev, found.st_ino


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
