"""Which quarter turns of a normal part are normal too, asked of the normals themselves.

A screw lies on the belt at any angle, and a hundred pictures of it leave most angles unseen: turned pictures fill the
gaps. A plate in a fixture never lies upside down, and pictures that show it so would make a memory of fixed size
remember less of what does occur. No label is needed to tell the two apart: if held-out normals are nearer to the memory
when turned pictures fill it too, then the turned ones are like what is to come. Mirror images are never assumed: a part
that lies upside down may be the defect. Who knows better sets them.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawsmith.detector.memory import NormalMemory, memory_size

AUTO, NONE = "auto", "none"
# Element e of the dihedral group D4: mirrored left to right if e >= 4, then turned by e % 4 quarters. These are its
# subgroups, but for those that mirror along a diagonal.
SYMMETRIES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        NONE: (0,),
        "hflip": (0, 4),
        "vflip": (0, 6),
        "rot180": (0, 2),
        "flips": (0, 2, 4, 6),
        "rot90": (0, 1, 2, 3),
        "all": tuple(range(8)),
    }
)
ASKED = (NONE, "rot180", "rot90")
LOOKED_AT = 96  # normals that are enough to tell
HELD_OUT = 4  # every so many of them is held out
FEWEST = 8  # with fewer nothing can be told
GAIN = 0.05  # held-out normals must come nearer by this share: less is what mere chance gives
NOTHING = 1e-3  # a cosine distance that keys of half floats cannot tell from 0
TIE = 0.02  # symmetries this near to the best one are as good

Pixel = TypeVar("Pixel", bound=np.generic)
Places = Callable[[NDArray[np.uint8]], Tensor]
"""Images (B, 3, S, S) → `as_places` (B, C, h, w) of the coarsest level."""


def turned(images: NDArray[Pixel], element: int) -> NDArray[Pixel]:
    """Square images (..., S, S), mirrored and turned counter-clockwise by an element of D4."""
    mirrored = images[..., ::-1] if element >= 4 else images
    return np.ascontiguousarray(np.rot90(mirrored, element % 4, axes=(-2, -1)))


def evenly(count: int, limit: int = LOOKED_AT) -> NDArray[np.int64]:
    """At most `limit` of `count` indices, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64))


def symmetry_distances(
    places: Places, normals: NDArray[np.uint8], limit: int, dimensions: int, share: float = 1.0
) -> dict[str, float]:
    """How far held-out normals lie from memories filled under each symmetry that is ASKED for.

    Args:
        places: what the memory compares, of a batch.
        normals: (N, 3, S, S), some or all of the fit normals.
        limit: places that the real memory keeps (`distill.memory`).
        dimensions: as of `NormalMemory`.
        share: N over all fit normals: memories here keep that share of `limit`, so that turned pictures take up room
            here as they will there.

    Returns:
        name → mean cosine distance over all places of the held-out normals; empty with fewer than FEWEST normals.
    """
    if len(normals) < FEWEST:
        return {}
    is_held = np.arange(len(normals)) % HELD_OUT == 0
    held, kept = places(normals[is_held]), normals[~is_held]
    seen = {element: places(turned(kept, element)) for element in SYMMETRIES[ASKED[-1]]}
    height, width = held.shape[-2:]
    budget = max(1, round(limit * share * len(kept) / len(normals)))
    distances = {}
    for name in ASKED:
        images = torch.stack([seen[element] for element in SYMMETRIES[name]], dim=1).flatten(0, 1)
        size = memory_size(budget, len(images), height, width)
        memory = NormalMemory(size, images.shape[1], dimensions).to(images.device)
        memory.fill([images], len(images))
        with torch.inference_mode():
            distances[name] = float(torch.cat([memory(part) for part in held.split(8)]).clamp_min(0).mean())
    return distances


def images_asked(normals: int) -> int:
    """How many images `symmetry_distances` asks about, to find the symmetry of so many normals."""
    held = -(-normals // HELD_OUT)
    return held + (normals - held) * len(SYMMETRIES[ASKED[-1]]) if normals >= FEWEST else 0


def choose_symmetry(distances: Mapping[str, float]) -> str:
    """The symmetry that brings held-out normals nearest, if by GAIN or more, else `none`; of several as good the one
    that shows most, since more normals will come than were looked at. `none` without distances."""
    if not distances or distances[NONE] < NOTHING or min(distances.values()) > (1 - GAIN) * distances[NONE]:
        return NONE
    as_good = [name for name in distances if distances[name] <= (1 + TIE) * min(distances.values())]
    return max(as_good, key=lambda name: len(SYMMETRIES[name]))
