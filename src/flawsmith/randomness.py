"""Seeds by name: every stochastic step draws from a generator of its own, so that no draw depends on what ran before.

A stream is named by a seed and a path of names and numbers, e.g. `numpy_generator(seed, "perlin", triplet_index)`;
a resumed or reordered run therefore draws the same numbers as one that never stopped.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def stream_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream called `names` under `seed`."""
    text = "\0".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator for one named stream."""
    return np.random.default_rng(stream_seed(seed, *names))


def torch_generator(seed: int, *names: str | int) -> "torch.Generator":
    """A CPU torch generator for one named stream: CPU noise is the same whatever device uses it."""
    import torch

    return torch.Generator("cpu").manual_seed(stream_seed(seed, *names))
