"""A hot folder: images are scored as they arrive, once each (`flawsmith predict --watch`).

out/results.jsonl    see `journal`: a line an image, synced to the disk after its pictures are written
out/overlays, masks  as `writers` says; a/part.jpg → a/part.jpg.png
out/spool/           with --mqtt: results that the broker has not acknowledged
out/model.json       the model and thresholds; a watch with another model is refused
"""

import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from types import FrameType

from flawsmith.data.images import FloatImage, count_pixels, read_image
from flawsmith.data.walk import UNREADABLE, entries, image_kind
from flawsmith.errors import UserError, name_file
from flawsmith.files import digest_file
from flawsmith.inference.journal import Journal, Signature, open_journal
from flawsmith.inference.mqtt import SPOOL, Sink, open_mqtt
from flawsmith.inference.options import LINES, PredictOptions, PredictReport
from flawsmith.inference.predictor import Predictor
from flawsmith.inference.prefetch import Answer, predict_stream
from flawsmith.inference.serialise import identify
from flawsmith.inference.sources import Task
from flawsmith.inference.writers import Pictures, Write, make_row, open_lines, picture_name

REST = 9  # a look is followed by a rest of so many times its length: a huge folder costs a tenth of one core at most
GRACE = 2.0  # seconds a file must stay as it is before it is called unreadable: a copy may have stalled

log = logging.getLogger(__name__)


class _KnownContentError(UserError):
    """The file was touched, but it has its line."""


class _NotWholeError(UserError):
    """The file changed or vanished while it was read: a later look decides."""


@dataclass
class _Arrival:
    """A file that looks complete; signature and digest are those of the bytes that were read."""

    name: str
    path: Path
    signature: Signature
    digest: str = ""


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
    predictor: Predictor, folder: Path, out: Path, options: PredictOptions, stop: Event | None = None
) -> PredictReport:
    """Score the images of `folder` (and of folders in it) until `stop` is set or the options' time is over.

    An image is read when its size and mtime were the same at two looks, `options.poll` seconds apart; one renamed into
    place is known by its inode. What counts as an image says `walk`; `out` is passed over.

    Raises:
        UserError: `folder` is none, `out` holds something else or results of another model, or another watch uses it;
            or as `open_mqtt`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder, so it cannot be watched; create it first.")
    with ExitStack() as stack:
        stack.enter_context(name_file(out / LINES, out / LINES))
        follow = None if options.jsonl is None else stack.enter_context(open_lines(options.jsonl))
        journal = stack.enter_context(open_journal(folder, out, predictor))
        sink = None if options.mqtt is None else stack.enter_context(open_mqtt(options.mqtt, out / SPOOL))
        watch = _Watch(predictor, folder, out, options, journal, follow, sink)
        log.info("Watching %s; results go to %s.", folder, out / LINES)
        watch.run(stop or Event())
    counts = watch.counts
    unreadable = counts["unreadable"] + len(watch.blocked)
    return PredictReport(out, counts["good"], counts["defective"], unreadable, watch.passed_over)


class _Watch:
    """One watch: looks at the folder again and again, reads what is complete, and writes its lines.

    Attributes:
        counts: images of each verdict.
        passed_over: files of each kind that were passed over at the last look.
        blocked: links to nothing and folders that cannot be listed, of which the log has told.
    """

    def __init__(
        self, predictor: Predictor, folder: Path, out: Path, options: PredictOptions, journal: Journal,
        follow: Write | None, sink: Sink | None,
    ) -> None:  # fmt: skip
        self._predictor, self._folder, self._out, self._options = predictor, folder, out.resolve(), options
        self._journal, self._follow, self._sink = journal, follow, sink
        self._pictures = Pictures(out, predictor, options)
        self._reading = predictor.reading(options.max_pixels, "--max-megapixels")
        self._seen: dict[tuple[int, int], tuple[int, int]] = {}  # device and inode: size and mtime at the last look
        self._doubtful: dict[str, tuple[Signature, float]] = {}  # could not be read at that time; maybe a stalled copy
        self._unlisted: dict[str, str] = {}  # what could not be looked at the last time, and why
        self.blocked: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.passed_over: Counter[str] = Counter()

    def run(self, stop: Event) -> None:
        """Watch until `stop` is set or the options' time is over."""
        began = active = time.monotonic()
        seconds, idle = self._options.seconds, self._options.idle

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
            rest = max(self._options.poll, REST * (time.monotonic() - looked))
            arrivals = {arrival.name: arrival for arrival in ready}
            tasks = [Task(each.name, partial(count_pixels, each.path), partial(self._load, each)) for each in ready]
            options = self._options
            with closing(predict_stream(tasks, self._predictor, options.batch, options.workers)) as answers:
                for answer in answers if tasks else ():
                    self._settle(arrivals[answer.name], answer)
                    if is_over():
                        break
            now = time.monotonic()
            if ready or is_arriving:
                active = now
            elif idle is not None and now - active >= idle:
                break
            stop.wait(rest if seconds is None else max(0.0, min(rest, began + seconds - now)))

    def _look(self) -> tuple[list[_Arrival], bool]:
        """List the files that are complete and have no line yet, the oldest first; and tell whether others are coming.

        Raises:
            OSError: the folder cannot be listed.
        """
        seen: dict[tuple[int, int], tuple[int, int]] = {}
        present: set[str] = set()
        unlisted: dict[str, str] = {}
        passed_over: Counter[str] = Counter()
        ready: list[_Arrival] = []
        is_arriving = False
        now = time.monotonic()
        for entry in entries(self._folder, self._out):
            name, kind = entry.name, image_kind(entry)
            if kind == UNREADABLE:
                unlisted[name] = f"{name} {entry.why}"
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
                ready.append(_Arrival(name, Path(entry.path), signature))
            else:
                is_arriving = True
        self._seen, self.passed_over = seen, passed_over
        self._tell_unlisted(unlisted)
        self._journal.forget(present, now)
        if not is_arriving and not ready:
            self._doubtful.clear()
        return sorted(ready, key=lambda arrival: (arrival.signature[1], arrival.name)), is_arriving

    def _tell_unlisted(self, unlisted: dict[str, str]) -> None:
        """Log what could not be looked at two times running: then it is no copy on its way."""
        for name in unlisted.keys() & self._unlisted.keys() - self.blocked:
            log.warning("%s; the rest is watched.", unlisted[name])
            self.blocked.add(name)
        self.blocked &= unlisted.keys()
        self._unlisted = unlisted

    def _load(self, arrival: _Arrival) -> FloatImage:
        """Read a file that may still change or vanish; note the digest and signature of what was read.

        Raises:
            _KnownContentError, _NotWholeError: as they say.
            UserError: the file cannot be read.
        """
        name, path = arrival.name, arrival.path
        try:
            arrival.signature = _signature(path.stat())
            arrival.digest = digest_file(path)
        except FileNotFoundError as error:
            raise _NotWholeError(f"{name} was taken away.") from error
        except OSError as error:
            raise UserError(f"{name} cannot be read ({error.strerror or error}).") from error
        known = self._journal.known.get(name)
        if known is not None and known.digest == arrival.digest:
            raise _KnownContentError(f"{name} has its line.")
        image, problem = None, UserError("")
        try:
            image = read_image(path, self._reading)
        except UserError as error:
            problem = UserError(str(error).replace(str(path), name))
        try:
            is_whole = _signature(path.stat()) == arrival.signature
        except OSError:
            is_whole = image is not None  # it was read whole before it was taken away
        if not is_whole:
            raise _NotWholeError(f"{name} changed while it was read.")
        if image is None:
            raise problem
        return image

    def _settle(self, arrival: _Arrival, answer: Answer) -> None:
        """Write down what came of an arrival, or leave it to a later look."""
        if isinstance(answer.error, _KnownContentError):
            self._journal.touch(arrival.name, arrival.signature)
        if isinstance(answer.error, _KnownContentError | _NotWholeError):
            return
        doubt = self._doubtful.get(arrival.name)
        if answer.error is not None and (doubt is None or doubt[0] != arrival.signature):
            self._doubtful[arrival.name] = (arrival.signature, time.monotonic())
            return
        self._doubtful.pop(arrival.name, None)
        row = make_row(answer, self._predictor) | self._pictures.add(picture_name(answer.name), answer)
        row |= {"sha256": arrival.digest, "stat": list(arrival.signature)}
        if self._sink is not None:  # before its line: a kill in between sends a result twice, never not at all
            self._sink.add({**row, "model": identify(self._predictor)})
        self._journal.add(row)
        self.counts[row["verdict"]] += 1
        if self._follow is not None:
            self._follow(row)


def _signature(found: os.stat_result) -> Signature:
    return (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
