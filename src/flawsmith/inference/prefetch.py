"""Decodes the next images in threads while the model works, in order and within a bounded number of pixels."""

import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import ceil

from flawsmith.data.images import FloatImage
from flawsmith.errors import UserError
from flawsmith.inference.predictor import Prediction, Predictor
from flawsmith.inference.sources import Task, Unreadable

HELD_PIXELS = 16_000_000  # of originals that are decoded or being scored (about 200 MB as floats)


@dataclass(frozen=True)
class Answer:
    """A task's image `(3, H, W)` and the prediction on it, or the error that says why there is none."""

    name: str
    image: FloatImage | None = None
    prediction: Prediction | None = None
    error: UserError | None = None


def predict_stream(
    tasks: Iterable[Task | Unreadable | None],
    predictor: Predictor,
    batch: int,
    workers: int,
    stop: threading.Event | None = None,
) -> Generator[Answer]:
    """Score images; yields an answer for each task, in the order of the tasks.

    A batch ends with `batch` tasks, or when its originals reach half of HELD_PIXELS; so it does not depend on which
    thread is ready first. Originals in memory stay below HELD_PIXELS and one image. Close the iterator to end early.

    Args:
        tasks: walked through in a thread of its own. None says that nothing more comes for now: what has come is then
            scored at once.
        workers: threads that decode.
        stop: set when the iterator ends; where `tasks` waits, it should look at it.

    Raises:
        Exception: whatever `tasks` or a decoder raises, but for a decoder's UserError.
    """
    stop = stop or threading.Event()
    walk = iter(tasks)
    changed, held = threading.Condition(), 0

    def collect() -> tuple[list[Future[Answer]], int]:
        """Start to decode the next batch; returns it with its pixels. It is empty at the end."""
        nonlocal held
        with changed:
            changed.wait_for(lambda: held * 2 <= HELD_PIXELS or stop.is_set())
        futures: list[Future[Answer]] = []
        pixels = 0
        for task in walk if not stop.is_set() else ():
            if task is not None:
                pixels += _count_pixels(task)
                futures.append(decoders.submit(_decode, task))
            is_full = len(futures) >= batch or pixels * 2 >= HELD_PIXELS
            if stop.is_set() or is_full or (task is None and futures):
                break
        with changed:
            held += pixels
        return futures, pixels

    source, decoders = ThreadPoolExecutor(1, "source"), ThreadPoolExecutor(workers, "decode")
    ahead = ceil(workers / batch)  # batches: as many as keep all workers busy
    coming = deque(source.submit(collect) for _ in range(ahead))
    try:
        while True:
            futures, pixels = coming.popleft().result()
            if not futures:
                return
            coming.append(source.submit(collect))
            items = [future.result() for future in futures]
            answers = iter(predictor.predict([item.image for item in items if item.image is not None]))
            for item in items:
                yield item if item.image is None else replace(item, prediction=next(answers))
            del futures, items, item  # their images must be gone before others may take their room
            with changed:
                held -= pixels
                changed.notify_all()
    finally:
        with changed:
            stop.set()
            changed.notify_all()
        source.shutdown(cancel_futures=True)
        decoders.shutdown(cancel_futures=True)
        if isinstance(walk, Generator):
            walk.close()  # it may hold a file open


def _count_pixels(task: Task | Unreadable) -> int:
    try:
        return task.pixels() if isinstance(task, Task) else 0
    except Exception:  # `load` will tell what is wrong
        return 0


def _decode(task: Task | Unreadable) -> Answer:
    if isinstance(task, Unreadable):
        return Answer(task.name, error=UserError(task.reason))
    try:
        return Answer(task.name, task.load())
    except UserError as error:
        return Answer(task.name, error=error)
