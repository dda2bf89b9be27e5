"""Things in order: taken a batch at a time, or some of them evenly."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items in order; the last may be shorter. (`itertools.batched` comes with Python 3.12.)"""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def evenly(count: int, wanted: int, start: float | None = None) -> list[int]:
    """Ascending indices of `wanted` of `count` items, evenly spaced; of all items where no more are there.

    Args:
        start: None takes the first item, the last and those between. A share in [0, 1) cuts the sequence into
            `wanted` equal parts and takes the item at that share of each part: .5 is the middle.
    """
    wanted = min(count, wanted)
    if start is not None:
        return sorted({int((part + start) * count / wanted) % count for part in range(wanted)})
    gap = (count - 1) / (wanted - 1) if wanted > 1 else 0.0
    return [round(part * gap) for part in range(wanted)]
