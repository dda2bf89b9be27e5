"""How long a call takes on this machine at this moment."""

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

WARM_UP = 3  # untimed rounds: the first calls allocate


def measure_latency(calls: Sequence[Callable[[], object]], rounds: int) -> NDArray[np.float64]:
    """Wall time of every call in milliseconds, `(calls, rounds)`, in turns so that a busy machine slows all alike."""
    times = np.zeros((len(calls), WARM_UP + rounds))
    for column in range(WARM_UP + rounds):
        for row, call in enumerate(calls):
            start = time.perf_counter()
            call()
            times[row, column] = 1000 * (time.perf_counter() - start)
    return times[:, WARM_UP:]
