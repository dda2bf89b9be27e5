"""Decodes images in threads while the model works, in order and within a bounded number of pixels.

A thread walks through the source (it may wait for a line, or decode a video), N threads decode, and whoever iterates
gets the images in the order of the source, whichever was ready first.
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType

from flawsmith.data.images import FloatImage
from flawsmith.errors import UserError
from flawsmith.inference.predictor import Prediction, Predictor
from flawsmith.inference.sources import Task, Unreadable

HELD_PIXELS = 16_000_000  # of decoded originals, in the batch and ahead of it (about 200 MB as floats)


@dataclass
class Decoded:
    """A task and its image `(3, H, W)`, or why there is none; `pixels` are counted as held until they are released."""

    name: str
    task: Task | None
    image: FloatImage | None = None
    reason: str = ""
    pixels: int = 0
    turn: int = 0
    done: bool = False
    fault: BaseException | None = None


class Readahead:
    """Use as a context manager; leaving it ends the threads.

    Decoded originals that are held, in all, stay within `limit` pixels, but for one image: one that is larger than
    what is left is decoded if nothing else was decoded ahead, and one that follows on an image over the limit waits.

    Args:
        tasks: walked through in a thread of its own; where it waits, it should look at `stop`.
        workers: threads that decode.
        ahead: images decoded before they are asked for, at most.
        stop: set when the threads shall end.
    """

    def __init__(
        self,
        tasks: Iterable[Task | Unreadable],
        workers: int,
        ahead: int,
        stop: threading.Event,
        limit: int | None = None,
    ) -> None:
        self._tasks, self._ahead, self._stop = tasks, ahead, stop
        self.limit = HELD_PIXELS if limit is None else limit
        self._workers = workers
        self._changed = threading.Condition()
        self._coming: deque[Decoded] = deque()  # in order, until taken
        self._waiting: deque[Decoded] = deque()  # for a thread to decode them
        self._turn = 0  # whose turn it is to ask for room: in order, or later ones would take it from the next
        self._held = 0  # pixels
        self._unclaimed = 0  # decoded or being decoded, and not yet taken
        self._ended = False
        self._fault: BaseException | None = None
        names = [("source", self._feed), *[(f"decode-{number}", self._work) for number in range(workers)]]
        self._threads = [threading.Thread(target=run, name=name, daemon=True) for name, run in names]

    def __enter__(self) -> "Readahead":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def take(self) -> Decoded | None:
        """The next one, when it is ready; None at the end. What the source or a decoder raises, is raised here."""
        with self._changed:
            self._changed.wait_for(lambda: self._coming[0].done if self._coming else self._ended)
            if not self._coming:
                if self._fault is not None:
                    raise self._fault
                return None
            item = self._coming.popleft()
            if item.task is not None:
                self._unclaimed -= 1
            self._changed.notify_all()
        if item.fault is not None:
            raise item.fault
        return item

    def is_starved(self) -> bool:
        """Whether nothing is on its way, because the source itself has nothing yet."""
        with self._changed:
            return not self._coming and not self._ended

    def release(self, items: Iterable[Decoded]) -> None:
        """Say that these images are no longer held."""
        with self._changed:
            self._held -= sum(item.pixels for item in items)
            self._changed.notify_all()

    def _feed(self) -> None:
        turns = 0
        source = iter(self._tasks)
        try:
            for task in source:
                with self._changed:  # undecoded frames of a video are held too: few of them
                    self._changed.wait_for(
                        lambda: (
                            self._stop.is_set()
                            or (len(self._coming) < self._ahead and len(self._waiting) < self._workers)
                        )
                    )
                    if self._stop.is_set():
                        break
                    if isinstance(task, Unreadable):
                        self._coming.append(Decoded(task.file, None, reason=task.reason, done=True))
                    else:
                        item = Decoded(task.name, task, turn=turns)
                        turns += 1
                        self._coming.append(item)
                        self._waiting.append(item)
                    self._changed.notify_all()
        except BaseException as error:
            self._fault = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
            close = getattr(source, "close", None)  # a generator may hold a file open
            if close is not None:
                close()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended or self._stop.is_set())
                if self._stop.is_set() or not self._waiting:
                    return
                item = self._waiting.popleft()
                self._changed.notify_all()
            self._decode(item)

    def _decode(self, item: Decoded) -> None:
        assert item.task is not None  # noqa: S101 only tasks wait
        try:
            pixels = item.task.pixels()
        except Exception:  # `load` will tell what is wrong
            pixels = 0
        if not self._wait_for_room(item.turn, pixels):
            return
        image = None
        try:
            image = item.task.load()
        except UserError as error:
            item.reason = str(error)
        except BaseException as error:
            item.fault = error
        with self._changed:
            item.image = image
            item.pixels = 0 if image is None else image.shape[1] * image.shape[2]
            self._held += item.pixels - pixels
            item.done = True
            self._changed.notify_all()

    def _wait_for_room(self, turn: int, pixels: int) -> bool:
        """Wait until `pixels` more may be held, and count them; False if the threads shall end."""

        def has_room() -> bool:
            fits = self._held + pixels <= self.limit or (not self._unclaimed and self._held <= self.limit)
            return self._stop.is_set() or (self._turn == turn and fits)

        with self._changed:
            self._changed.wait_for(has_room)
            if self._stop.is_set():
                return False
            self._turn += 1
            self._unclaimed += 1
            self._held += pixels
            self._changed.notify_all()
            return True


def judge(
    ahead: Readahead, predictor: Predictor, batch: int, *, is_live: bool = False
) -> Iterator[tuple[Decoded, Prediction | None]]:
    """Score what comes in batches; yields it in order, with None where there is no image.

    A batch ends with `batch` items or when its originals reach half of what may be held, and with `is_live` also when
    the source has nothing more for now. Apart from that it does not depend on what is ready when.
    """
    pending: list[Decoded] = []

    def flush() -> Iterator[tuple[Decoded, Prediction | None]]:
        answers = iter(predictor.predict([item.image for item in pending if item.image is not None]))
        for item in pending:
            yield item, None if item.image is None else next(answers)
        ahead.release(pending)
        pending.clear()

    while True:
        if is_live and pending and ahead.is_starved():
            yield from flush()
        item = ahead.take()
        if item is None:
            break
        pending.append(item)
        if len(pending) >= batch or sum(item.pixels for item in pending) * 2 >= ahead.limit:
            yield from flush()
    if pending:
        yield from flush()
