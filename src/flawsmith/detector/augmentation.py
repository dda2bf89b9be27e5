"""D4 augmentation: which quarter turns and mirror images of normal parts are normal too.

A screw lies on the belt at any angle; turned images then fill the gaps between the few angles that were photographed. A
plate in a fixture never lies upside down; turned images then take room in a memory bank of fixed size. Held-out normals
tell the two apart without labels: if they are nearer to a memory bank that holds turned images too, turning is normal.
Mirror images are never assumed, since a part that lies upside down may be the defect; the settings can ask for them.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawsmith.data.triplets import TripletArrays
from flawsmith.detector.memory import MemoryBank, memory_size

AUTO, NONE = "auto", "none"
# Name → elements of the dihedral group D4. Element e mirrors left to right if e >= 4, then turns by e % 4 quarters.
# These are D4's subgroups, apart from those that mirror along a diagonal.
AUGMENTATIONS: Mapping[str, tuple[int, ...]] = MappingProxyType(
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
CANDIDATES = (NONE, "rot180", "rot90")  # of `auto`; the last one contains the others
SAMPLE = 96  # normal images that are enough to tell
HELD_OUT = 4  # one image in so many is held out
FEWEST = 8  # with fewer images nothing can be told
GAIN = 0.05  # held-out normals must come nearer by this share: less is what mere chance gives
NOTHING = 1e-3  # a cosine distance that patches of half floats cannot tell from 0
TIE = 0.02  # candidates this near to the best one are as good

Pixel = TypeVar("Pixel", bound=np.generic)
AsPatches = Callable[[NDArray[np.uint8]], Tensor]
"""Images (B, 3, S, S) → `as_patches` (B, C, h, w) of the coarsest level."""


def transformed(images: NDArray[Pixel], element: int) -> NDArray[Pixel]:
    """Images (..., H, W), for quarter turns square ones, mirrored and turned counter-clockwise by an element of D4."""
    mirrored = images[..., ::-1] if element >= 4 else images
    return np.ascontiguousarray(np.rot90(mirrored, element % 4, axes=(-2, -1)))


def transformed_triplets(triplets: TripletArrays, elements: NDArray[np.int64]) -> TripletArrays:
    """Each triplet under its own element of D4, `elements` (N,)."""
    if not elements.any():
        return triplets

    def each(images: NDArray[Any]) -> NDArray[Any]:
        return np.stack([transformed(image, element) for image, element in zip(images, elements, strict=True)])

    return replace(triplets, normal=each(triplets.normal), defect=each(triplets.defect), mask=each(triplets.mask))


def fits(name: str, shape: tuple[int, ...]) -> bool:
    """Whether images (..., H, W) keep their shape under an augmentation: quarter turns swap the sides."""
    return shape[-1] == shape[-2] or not any(element % 2 for element in AUGMENTATIONS[name])


def augmentation_distances(
    patches_of: AsPatches, normals: NDArray[np.uint8], limit: int, dimensions: int, share: float = 1.0
) -> dict[str, float]:
    """How far held-out normals are from memory banks that are filled under each of the CANDIDATES.

    Args:
        patches_of: images (B, 3, S, S) → what the memory bank compares.
        normals: (N, 3, S, S), some or all of the fit normals.
        limit: patches that the real memory bank keeps (`distill.memory`).
        dimensions: as of `MemoryBank`.
        share: N over all fit normals. The memory banks here keep that share of `limit`, so that turned images compete
            for room as they will in the real one.

    Returns:
        name → mean cosine distance over all patches of the held-out normals, of those candidates that fit the images;
        empty with fewer than FEWEST normals.
    """
    if len(normals) < FEWEST:
        return {}
    is_held = np.arange(len(normals)) % HELD_OUT == 0
    held, kept = patches_of(normals[is_held]), normals[~is_held]
    candidates = [name for name in CANDIDATES if fits(name, normals.shape)]
    seen = {element: patches_of(transformed(kept, element)) for element in AUGMENTATIONS[candidates[-1]]}
    height, width = held.shape[-2:]
    budget = max(1, round(limit * share * len(kept) / len(normals)))
    distances = {}
    for name in candidates:
        images = torch.stack([seen[element] for element in AUGMENTATIONS[name]], dim=1).flatten(0, 1)
        size = memory_size(budget, len(images), height, width)
        memory = MemoryBank(size, images.shape[1], dimensions).to(images.device)
        memory.fill([images], len(images))
        with torch.inference_mode():
            distances[name] = float(torch.cat([memory(part) for part in held.split(8)]).clamp_min(0).mean())
    return distances


def images_asked(normals: int) -> int:
    """How many images `augmentation_distances` shows the teacher, of so many normals."""
    held = -(-normals // HELD_OUT)
    return held + (normals - held) * len(AUGMENTATIONS[CANDIDATES[-1]]) if normals >= FEWEST else 0


def choose_augmentation(distances: Mapping[str, float]) -> str:
    """The candidate that brings held-out normals nearest, if by GAIN or more; else `none`, also without distances.

    Of several that are as good (TIE), the one with the most elements: more normals will come than were looked at.
    """
    if not distances or distances[NONE] < NOTHING or min(distances.values()) > (1 - GAIN) * distances[NONE]:
        return NONE
    as_good = [name for name in distances if distances[name] <= (1 + TIE) * min(distances.values())]
    return max(as_good, key=lambda name: len(AUGMENTATIONS[name]))
