"""A hot folder: images are scored as they arrive, once each (`flawsmith predict --watch`).

out/results.jsonl    a line an image, appended and synced to the disk when its pictures are written
out/overlays, masks  as `writers` says; a/part.jpg → a/part.jpg.png
out/model.json       the model and thresholds; a watch with another model is refused

results.jsonl is the only record of what is done. A file is known by name and content (SHA-256), so a restart repeats
nothing and loses nothing; a line torn by a crash is taken back at the next start, and its image scored again. What has
been taken out of the folder is forgotten after a while, so that memory follows the folder and not the years; should it
come back after that, it is a new arrival.
"""

import json
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Any, TextIO

from filelock import FileLock, Timeout

from flawsmith.data.images import MAX_PIXELS, FloatImage, count_pixels, read_image
from flawsmith.data.walk import UNREADABLE, entries, image_kind
from flawsmith.errors import UserError, name_file
from flawsmith.files import digest_file, is_ours, read_json, write_json
from flawsmith.inference.folder import WORKERS, unreadable_row
from flawsmith.inference.predictor import Prediction, Predictor
from flawsmith.inference.readahead import Decoded, Readahead, judge
from flawsmith.inference.serialise import describe
from flawsmith.inference.sources import Task
from flawsmith.inference.writers import (
    LINES,
    MASKS,
    OVERLAYS,
    LineRows,
    Pictures,
    describe_model,
    json_line,
    picture_name,
)

POLL = 0.5  # seconds between two looks
REST = 9  # a look is followed by a rest of so many times its length: a huge folder costs a tenth of one core at most
FORGET = 3600.0  # seconds a file must be gone to be forgotten: a share may be away for some time and come back
GRACE = 2.0  # seconds a file must stay as it is before it is called unreadable: a copy may have stalled
MODEL, LOCK = "model.json", ".lock"

log = logging.getLogger(__name__)

Signature = tuple[int, ...]  # size, mtime and ctime in ns, inode: as long as it is the same, so is the content


@dataclass(frozen=True)
class WatchReport:
    """What was scored in this call."""

    out: Path
    good: int
    defective: int
    unreadable: int
    passed_over: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.good + self.defective + self.unreadable

    def exit_code(self, fail_on_defect: bool = False) -> int:
        """0, or 3 if `fail_on_defect` is asked for and a part was defective; unreadable files stand in their lines."""
        return 3 if fail_on_defect and self.defective else 0


@dataclass(frozen=True)
class Known:
    """A file that has its line."""

    signature: Signature
    digest: str


@dataclass
class Arrival:
    """A file that looks complete, and what was found when it was read: how it ends is in `state`."""

    name: str
    path: Path
    signature: Signature
    digest: str = ""
    state: str = "unreadable"  # or read, same (known content), gone, changing


@contextmanager
def ended_by_signals() -> Iterator[Event]:
    """An event that SIGTERM and Ctrl-C set: the work in hand is finished first. A second Ctrl-C interrupts at once."""
    stop = Event()

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def watch_folder(
    predictor: Predictor,
    folder: Path,
    out: Path,
    *,
    overlays: bool = True,
    masks: bool = False,
    lines: TextIO | None = None,
    batch: int = 8,
    workers: int = WORKERS,
    max_pixels: int = MAX_PIXELS,
    poll: float = POLL,
    seconds: float | None = None,
    idle: float | None = None,
    stop: Event | None = None,
) -> WatchReport:
    """Score the images of `folder` (and of folders in it) until `stop` is set, for `seconds`, or until `idle`.

    An image is read when its size and mtime were the same at two looks `poll` seconds apart; one renamed into place is
    known by its inode. What counts as an image says `walk`; `out` is passed over.

    Args:
        seconds: ends after so long; None goes on for ever.
        idle: ends when nothing has arrived for so long.

    Raises:
        UserError: `folder` is none, `out` holds something else or results of another model, or another watch uses it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder, so it cannot be watched; create it first.")
    stop = stop or Event()
    with ExitStack() as stack:
        stack.enter_context(name_file(out / LINES, out / LINES))
        journal = stack.enter_context(_open_journal(folder, out, predictor))
        watch = _Watch(
            predictor=predictor,
            folder=folder,
            out=out,
            journal=journal,
            pictures=Pictures(out, predictor, overlays=overlays, masks=masks),
            follower=None if lines is None else stack.enter_context(LineRows(lines, is_followed=True)),
            batch=batch,
            workers=workers,
            max_pixels=max_pixels,
        )
        log.info("Watching %s; results go to %s.", folder, out / LINES)
        watch.run(stop, poll, seconds, idle)
    counts = watch.counts
    unreadable = counts["unreadable"] + watch.blocked
    return WatchReport(out, counts["good"], counts["defective"], unreadable, watch.passed_over)


class Journal:
    """results.jsonl, opened for appending, and what it knows."""

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

    def add(self, row: dict[str, Any], arrival: Arrival) -> dict[str, Any]:
        """Append a row and what tells its file again; it is on the disk when this returns. Returns the whole row."""
        whole = {**row, "sha256": arrival.digest, "stat": list(arrival.signature)}
        self._stream.write(f"{json_line(whole)}\n".encode())
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.known[arrival.name] = Known(arrival.signature, arrival.digest)
        return whole

    def is_known(self, name: str, signature: Signature) -> bool:
        known = self.known.get(name)
        return known is not None and known.signature == signature

    def forget(self, present: Collection[str], now: float) -> None:
        """Drop the known files that for FORGET seconds have not been among those `present` in the folder."""
        self._gone = {name: self._gone.get(name, now) for name in self.known.keys() - present}
        for name in [name for name, since in self._gone.items() if now - since >= FORGET]:
            del self.known[name], self._gone[name]

    def touch(self, arrival: Arrival) -> None:
        """The same content under a new signature: remembered in memory alone, found out again after a restart."""
        self.known[arrival.name] = replace(self.known[arrival.name], signature=arrival.signature)

    def close(self) -> None:
        self._stream.close()


class _Watch:
    def __init__(
        self,
        *,
        predictor: Predictor,
        folder: Path,
        out: Path,
        journal: Journal,
        pictures: Pictures,
        follower: LineRows | None,
        batch: int,
        workers: int,
        max_pixels: int,
    ) -> None:
        self._predictor, self._folder, self._journal = predictor, folder, journal
        self._out = out.resolve()
        self._pictures, self._follower = pictures, follower
        self._batch, self._workers, self._reading = batch, workers, predictor.reading(max_pixels, "--max-megapixels")
        self._seen: dict[tuple[int, int], tuple[int, int]] = {}  # device and inode: size and mtime at the last look
        self._doubtful: dict[str, tuple[Signature, float]] = {}  # could not be read at that time; maybe a stalled copy
        self._blocked: dict[str, str] = {}  # what could not be looked at the last time, and why
        self._told: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.passed_over: Counter[str] = Counter()  # at the last look

    @property
    def blocked(self) -> int:
        """How many links to nothing and folders that cannot be listed there are."""
        return len(self._told)

    def run(self, stop: Event, poll: float, seconds: float | None, idle: float | None) -> None:
        began = active = time.monotonic()

        def is_over() -> bool:
            return stop.is_set() or (seconds is not None and time.monotonic() - began >= seconds)

        is_lost = False
        while not is_over():
            looked = time.monotonic()
            try:
                ready, is_arriving = self._look()
                is_lost = False
            except OSError as error:  # a share that comes back is no reason to end
                ready, is_arriving = [], False
                if not is_lost:
                    log.warning("%s cannot be listed (%s); trying on.", self._folder, error.strerror or error)
                is_lost = True
            rest = max(poll, REST * (time.monotonic() - looked))
            with closing(self._read(ready)) as answers:
                for arrival, item, prediction in answers:
                    self._settle(arrival, item, prediction)
                    if is_over():
                        break
            now = time.monotonic()
            if ready or is_arriving:
                active = now
            elif idle is not None and now - active >= idle:
                break
            stop.wait(rest if seconds is None else max(0.0, min(rest, began + seconds - now)))

    def _look(self) -> tuple[list[Arrival], bool]:
        """Files that are complete and have no line yet, in the order of arrival; and whether others are on the way."""
        seen: dict[tuple[int, int], tuple[int, int]] = {}
        present: set[str] = set()
        blocked: dict[str, str] = {}
        passed_over: Counter[str] = Counter()
        ready: list[Arrival] = []
        is_arriving = False
        now = time.monotonic()
        for entry in entries(self._folder, self._out):
            name, kind = entry.name, image_kind(entry)
            if kind == UNREADABLE:
                blocked[name] = f"{name} {entry.why}"
                continue
            try:
                found = Path(entry.path).stat()
            except OSError:  # gone again
                continue
            place, state = (found.st_dev, found.st_ino), (found.st_size, found.st_mtime_ns)
            seen[place] = state  # of a hidden file too: it may be renamed into place
            if kind:
                passed_over[kind] += 1
                continue
            present.add(name)
            signature = _signature(found)
            if self._journal.is_known(name, signature):
                continue
            doubt = self._doubtful.get(name)
            is_early = doubt is not None and doubt[0] == signature and now - doubt[1] < GRACE
            if self._seen.get(place) == state and not is_early:
                ready.append(Arrival(name, Path(entry.path), signature))
            else:
                is_arriving = True
        self._seen, self.passed_over = seen, passed_over
        for name in blocked.keys() & self._blocked.keys() - self._told:  # at two looks: it is no copy on its way
            log.warning("%s; the rest is watched.", blocked[name])
            self._told.add(name)
        self._told &= blocked.keys()
        self._blocked = blocked
        self._journal.forget(present, now)
        if not is_arriving and not ready:
            self._doubtful.clear()
        return sorted(ready, key=lambda arrival: (arrival.signature[1], arrival.name)), is_arriving

    def _read(self, ready: list[Arrival]) -> Generator[tuple[Arrival, Decoded, Prediction | None]]:
        if not ready:
            return
        tasks = [Task(arrival.name, partial(count_pixels, arrival.path), partial(self._load, arrival))
                 for arrival in ready]  # fmt: skip
        arrivals = {arrival.name: arrival for arrival in ready}
        with Readahead(tasks, self._workers, self._batch + self._workers, Event()) as ahead:
            for item, prediction in judge(ahead, self._predictor, self._batch):
                yield arrivals[item.name], item, prediction

    def _load(self, arrival: Arrival) -> FloatImage:
        """Read a file that may still change or vanish: the digest is that of the pixels, or nothing is returned."""
        try:
            arrival.signature = _signature(arrival.path.stat())
            arrival.digest = digest_file(arrival.path)
        except FileNotFoundError as error:
            arrival.state = "gone"
            raise UserError(f"{arrival.name} was taken away.") from error
        except OSError as error:
            raise UserError(f"{arrival.name} cannot be read ({error.strerror or error}).") from error
        known = self._journal.known.get(arrival.name)
        if known is not None and known.digest == arrival.digest:
            arrival.state = "same"
            raise UserError(f"{arrival.name} has its line.")
        problem = image = None
        try:
            image = read_image(arrival.path, self._reading)
            arrival.state = "read"
        except UserError as error:
            problem = UserError(str(error).replace(str(arrival.path), arrival.name))
        try:
            if _signature(arrival.path.stat()) != arrival.signature:
                arrival.state = "changing"
        except OSError:
            arrival.state = "gone" if image is None else "read"  # what was read whole has been there
        if problem is not None:
            raise problem
        if image is None or arrival.state != "read":
            raise UserError(f"{arrival.name} changed while it was read.")
        return image

    def _settle(self, arrival: Arrival, item: Decoded, prediction: Prediction | None) -> None:
        """Write down what came of an arrival, or leave it to a later look."""
        if arrival.state == "same":
            self._journal.touch(arrival)
            return
        if arrival.state in ("gone", "changing"):
            return
        if item.image is None or prediction is None:
            doubt = self._doubtful.get(arrival.name)
            if doubt is None or doubt[0] != arrival.signature:
                self._doubtful[arrival.name] = (arrival.signature, time.monotonic())
                return
            row: dict[str, Any] = dict(unreadable_row(item))
        else:
            row = {"file": item.name, **describe(prediction, self._predictor, *item.image.shape[1:])}
            row |= self._pictures.add(picture_name(item.name), item.image, prediction)
        self._doubtful.pop(arrival.name, None)
        row = self._journal.add(row, arrival)
        self.counts[row["verdict"]] += 1
        if self._follower is not None:
            self._follower.add(row)


@contextmanager
def _open_journal(folder: Path, out: Path, predictor: Predictor) -> Iterator[Journal]:
    """The journal in `out`, which is made if need be, and belongs to this process alone meanwhile."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder for the results.")
    if folder.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out} holds the watched folder; name another folder for --out.")
    ours = {LINES, OVERLAYS, MASKS, MODEL, LOCK}
    found = {path.name for path in out.iterdir() if not _is_leftover(path)} if out.is_dir() else set()
    if found - ours or (LINES in found and MODEL not in found):
        example = sorted(found - ours or found)[0]
        raise UserError(f"{out} holds files that are no results of a watch (such as {example}); name a new folder "
                        "for --out.")  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"Another watch writes into {out}; end it first, or name a new folder for --out.") from error
    try:
        for part in (out, out / OVERLAYS, out / MASKS):  # of a run that was killed
            for path in part.glob(".*.tmp") if part == out else part.rglob(".*.tmp"):
                if _is_leftover(path):
                    path.unlink()
        model = json.loads(json.dumps(describe_model(predictor)))
        if (out / MODEL).exists() and read_json(out / MODEL) | {"provider": predictor.provider} != model:
            raise UserError(f"{out} holds results of another model or threshold; name a new folder for --out.")
        write_json(out / MODEL, model)
        journal = Journal(out / LINES)
        _sync_folder(out)
        try:
            yield journal
        finally:
            journal.close()
    finally:
        lock.release()


def _is_leftover(path: Path) -> bool:
    """A file that `atomic_file` had not put in place when its process was killed."""
    return is_ours(path.name) and path.is_file()


def _sync_folder(folder: Path) -> None:
    """So that a file new in it survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _signature(found: os.stat_result) -> Signature:
    return (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
