"""How far long work is: a bar where somebody watches, lines with the time where a log is all that stays.

    with stage("distill", "bottle", (4, 6)):
        for step in bar(range(600), "student", unit="step"):
            ...

On a terminal a bar is tqdm's. Elsewhere (cron, CI, a worker's log) a thread writes a line every EVERY seconds, so that
one long step is no silence:

    2026-11-30 13:05:10 stage 4 of 6, distill bottle: student 240 of 600 steps (40 %), about 95 s left, loss=0.0123

Nothing of this is part of a result.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from typing import Any, Generic, Protocol, TypeVar, cast

EVERY = 20.0  # seconds between two lines

Item = TypeVar("Item")
ItemOut = TypeVar("ItemOut", covariant=True)


class Bar(Protocol[ItemOut]):
    """What of tqdm is used here."""

    def __iter__(self) -> Iterator[ItemOut]: ...

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: object) -> Any: ...

    def update(self, n: int = 1) -> Any:
        """Count `n` more."""

    def set_postfix(self, *, refresh: bool = True, **values: str) -> Any:
        """Show values behind the count."""


def bar(
    items: Iterable[Item] | None = None,
    what: str = "",
    total: int | None = None,
    unit: str = "",
    done: int = 0,
    is_shown: bool = True,
    leave: bool = True,
) -> Bar[Item]:
    """Show how many of `items` are through, or what `update` counts; `done` of `total` were before.

    Args:
        what: the work, in a word or two.
        total: how many there are in all, where `items` cannot tell.
        unit: what is counted, in the singular; "B" for bytes.
        is_shown: False for all but one of several processes.
        leave: whether a terminal keeps the bar when it is full.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if not sys.stderr.isatty():
        return _Lines(items, what, total, unit, done, is_shown)
    from tqdm.auto import tqdm

    is_bytes = unit == "B"
    shown: Any = tqdm(
        items, what, total, leave, initial=done, unit=unit or "it", unit_scale=is_bytes, disable=not is_shown
    )
    return cast("Bar[Item]", shown)


@contextmanager
def stage(name: str, category: str, place: tuple[int, int], is_shown: bool = True) -> Iterator[None]:
    """Name the `place`-th of so many stages in every line while it runs, and say how long it took once it is done."""
    if not is_shown:
        yield
        return
    about = f"stage {place[0]} of {place[1]}, {name} {category}"
    began = time.monotonic()
    with ExitStack() as lines:
        if not sys.stderr.isatty():
            lines.enter_context(_speaking(lambda: f"{about}: at work for {_time(time.monotonic() - began)}", about))
        yield
    _say(f"{about}: done in {time.monotonic() - began:.0f} s")


class _Lines(Generic[Item]):
    """A bar that is heard of in lines."""

    def __init__(
        self, items: Iterable[Item] | None, what: str, total: int | None, unit: str, done: int, is_shown: bool
    ) -> None:
        self._items, self._what, self._total, self._unit, self._is_shown = items, what, total, unit, is_shown
        self._first = self._done = done
        self._postfix = ""
        self._began = time.monotonic()
        self._open = ExitStack()

    def __enter__(self) -> "_Lines[Item]":
        if self._is_shown:
            self._open.enter_context(_speaking(self._describe))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def __iter__(self) -> Iterator[Item]:
        with self:
            for item in () if self._items is None else self._items:
                yield item
                self._done += 1

    def update(self, n: int = 1) -> None:
        self._done += n

    def set_postfix(self, *, refresh: bool = True, **values: str) -> None:
        self._postfix = "".join(f", {name}={value}" for name, value in values.items())

    def _describe(self) -> str:
        """How far it is, and how long the rest takes at the pace so far."""
        plural = "" if self._unit in ("", "B") else "es" if self._unit.endswith("ch") else "s"  # patches
        unit = f" {self._unit}{plural}" if self._unit else ""
        if not self._total:
            return f"{self._what} {self._done}{unit} so far{self._postfix}"
        new, seconds = self._done - self._first, time.monotonic() - self._began
        left = f", about {_time(seconds / new * (self._total - self._done))} left" if new else ""
        share = f"{100 * self._done / self._total:.0f} %"
        return f"{self._what} {self._done} of {self._total}{unit} ({share}){left}{self._postfix}"


Speaker = tuple[Callable[[], str], str]
"""What gives a line, and what the lines of the speakers within it begin with."""

_speakers: list[Speaker] = []  # outermost first


@contextmanager
def _speaking(describe: Callable[[], str], about: str = "") -> Iterator[None]:
    """Let the innermost of all that are open say a line every EVERY seconds while the block runs."""
    speaker, over = (describe, about), threading.Event()
    _speakers.append(speaker)
    threading.Thread(target=_speak, args=(speaker, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        _speakers.remove(speaker)


def _speak(speaker: Speaker, over: threading.Event) -> None:
    while not over.wait(EVERY):
        open_ = list(_speakers)
        if open_ and open_[0] is speaker:  # it keeps the beat for all: those within it may be too short for their own
            *outer, (describe, _) = open_
            _say(": ".join([*(about for _, about in outer if about), describe()]))


def _say(line: str) -> None:
    with suppress(ValueError, OSError):  # nobody listens any more, which is no reason to stop
        print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}", file=sys.stderr, flush=True)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
