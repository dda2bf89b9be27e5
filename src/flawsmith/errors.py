"""What can go wrong, sorted by whose fault it is: the exit status of the command follows from the class.

A message is one clear sentence that names the file or key and the remedy; the CLI prints it without a traceback.
"""

import errno
import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INTERRUPTED = 130  # the exit status of what Ctrl-C ended: 128 + SIGINT, as shells do

log = logging.getLogger(__name__)
_telling, _told = threading.Lock(), set[str]()


class FlawsmithError(Exception):
    """Something failed that is not the user's fault (exit status 1)."""

    exit_code = 1


class UserError(FlawsmithError):
    """The user's input cannot be used as it is (exit status 2)."""

    exit_code = 2


class QualityGateError(FlawsmithError):
    """A quality gate did its work: the pipeline must stop here (exit status 1), and its report says why."""


DISK_FULL = os.strerror(errno.ENOSPC)

_LOCKS = "the file system cannot lock files", "name a place on another one"
_RIGHTS = "the rights to do so are missing", "change them, or name another place"
_FULL = "the disk is full", "free space there, or name a place on another disk"
# refusals whose reason the user can remove: why, and the remedy
_REFUSALS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EROFS: ("the file system is read-only", "name another place"),
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.ENOENT: ("it, or the folder it belongs in, does not exist", "create it, or correct the name"),
    errno.EEXIST: ("something of that name is in the way", "remove it, or name another place"),
    errno.EISDIR: ("it is a folder", "name a file"),
    errno.ENOTDIR: ("it, or a part of its path, is no folder", "name another place"),
    errno.ENAMETOOLONG: ("its name is too long", "give it a shorter one"),
    errno.ELOOP: ("its links lead round in a circle", "mend them"),
    errno.EFBIG: ("it grows too large for the file system", "name a place on another one"),
    errno.EBUSY: ("something else uses it", "end that, or name another place"),
    errno.ENOLCK: _LOCKS,
    errno.EOPNOTSUPP: _LOCKS,
    errno.ENOSYS: _LOCKS,
}
_OF_ALL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# how libraries with writers of their own report a full disk
_TOLD_FULL = re.compile(
    rf"{re.escape(DISK_FULL)}|os error {errno.ENOSPC}\b|^\d+ requested and \d+ written|disk is full", re.MULTILINE
)


def refusal(error: BaseException) -> UserError | None:
    """Turn the system's refusal to read or write a file or folder into one sentence; None for any other error."""
    number = _number(error)
    if number not in _REFUSALS:
        return None
    found = error if isinstance(error, OSError) else None
    file = (found.filename2 or found.filename if found else None) or "The output"
    reason, remedy = _REFUSALS[number]
    verb = "written" if number in _OF_ALL or number == errno.EFBIG else "used"
    return UserError(f"{os.fsdecode(file)} cannot be {verb}: {reason} ({os.strerror(number)}); {remedy}.")


def is_of_all(error: OSError) -> bool:
    """Whether writing any other file there would fail too: a full disk, a read-only file system."""
    return _number(error) in _OF_ALL


def tell_once(key: str, sentence: str) -> None:
    """Log a warning unless this process has logged one of the same key."""
    with _telling:
        if key in _told:
            return
        _told.add(key)
    log.warning("%s", sentence)


@contextmanager
def name_file(path: Path, temporary: Path) -> Iterator[None]:
    """Let an error in writing name `path`, also where it names nothing, or the `temporary` path that stands for it.

    A full disk that a library reports in its own words becomes an OSError.
    """
    try:
        yield
    except FlawsmithError:
        raise
    except Exception as error:
        number = _number(error)
        if number not in _REFUSALS:
            raise
        named = str(getattr(error, "filename", None) or temporary)
        told = str(path) + named.removeprefix(str(temporary)) if named.startswith(str(temporary)) else named
        if not isinstance(error, OSError) or error.errno is None:
            raise OSError(number, os.strerror(number), told) from error
        error.filename, error.filename2 = told, None
        raise


def _number(error: BaseException) -> int | None:
    """The errno of an error about a file, or of a full disk that a library reports in its own words; else None."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        if _TOLD_FULL.search(str(error)):
            return errno.ENOSPC
        before = error.__cause__ or error.__context__  # torch.save ends a file that it could not write, and fails again
        return number if before is not None and (number := _number(before)) in _OF_ALL else None
    # network errors are OSErrors too, but are about no file
    return number if not isinstance(error, ConnectionError | TimeoutError) else None
