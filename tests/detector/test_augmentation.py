"""Which turns and mirror images the normals show."""

from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from flawsmith.detector.augmentation import (
    AUGMENTATIONS,
    AUTO,
    FEWEST,
    NONE,
    augmentation_distances,
    choose_augmentation,
    transformed,
)
from flawsmith.detector.config import DistillSettings

SIDE = 32


def arrow(generator: np.random.Generator, element: int) -> NDArray[np.uint8]:
    """A picture without any symmetry of its own, at a place that varies a little, shown by an element of D4."""
    image = np.full((3, SIDE, SIDE), 60, np.uint8)
    image[:, 6:26, 14:18] = 200
    image[:, 6:10, 18:25] = 240
    image[:, 20:26, 9:14] = 150
    moved = np.roll(image, generator.integers(-3, 4, 2), axis=(1, 2))
    return transformed(moved, element)


def patches(images: NDArray[np.uint8]) -> Tensor:
    """Pixels of 8 x 8 cells as features."""
    rows = torch.from_numpy(images[:, 0].astype(np.float32) / 255)[:, None]
    return F.normalize(F.pixel_unshuffle(rows, 8), dim=1)


def pictures(elements: tuple[int, ...], count: int = 48) -> NDArray[np.uint8]:
    generator = np.random.default_rng(5)
    return np.stack([arrow(generator, int(generator.choice(elements))) for _ in range(count)])


def test_the_elements_are_the_eight_of_d4() -> None:
    image = np.random.default_rng(0).integers(0, 255, (3, 5, 5))
    shown = {transformed(image, element).tobytes() for element in range(8)}
    assert len(shown) == 8
    assert transformed(image, 0).tobytes() == image.tobytes()
    assert np.array_equal(transformed(image, 4), image[..., ::-1])
    assert np.array_equal(transformed(image, 6), image[..., ::-1, :])
    assert np.array_equal(transformed(image, 2), image[..., ::-1, ::-1])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_symmetry_is_a_group(name: str) -> None:
    image = np.arange(9).reshape(3, 3)
    shown = {transformed(image, element).tobytes() for element in AUGMENTATIONS[name]}
    elements = AUGMENTATIONS[name]
    twice = {transformed(transformed(image, one), other).tobytes() for one in elements for other in elements}
    assert twice == shown


def test_the_settings_offer_just_these() -> None:
    assert set(get_args(get_type_hints(DistillSettings)["symmetry"])) == {AUTO, *AUGMENTATIONS}


@pytest.mark.parametrize("name", ["rot180", "rot90"])
def test_a_part_that_lies_in_several_ways_is_found_out(name: str) -> None:
    few = pictures(AUGMENTATIONS[name], 12)  # not each way of lying is among those that are kept
    distances = augmentation_distances(patches, few, 10_000, 0)
    assert set(AUGMENTATIONS[name]) <= set(AUGMENTATIONS[choose_augmentation(distances)])


def test_a_part_that_always_lies_alike_has_no_symmetry() -> None:
    normals = pictures(AUGMENTATIONS[NONE])
    for limit in (100, len(normals) * 16):  # turned pictures take the room of others
        assert choose_augmentation(augmentation_distances(patches, normals, limit, 0)) == NONE


def test_too_few_normals_tell_nothing() -> None:
    assert augmentation_distances(patches, pictures((0, 1), FEWEST - 1), 100, 0) == {}
    assert choose_augmentation({}) == NONE


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, NONE),
        ({"rot180": 0.96}, NONE),  # less than chance gives
        ({"rot180": 0.94}, "rot180"),
        ({"rot180": 0.800, "rot90": 0.815}, "rot90"),  # as good, and shows more
        ({"rot180": 0.800, "rot90": 0.820}, "rot180"),
    ],
)
def test_the_choice(changes: dict[str, Any], expected: str) -> None:
    assert choose_augmentation(dict.fromkeys(AUGMENTATIONS, 1.0) | changes) == expected


def test_memories_are_as_small_as_the_real_one_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    memory = "flawsmith.detector.augmentation.memory_size"

    def noted(limit: int, images: int, height: int, width: int) -> int:
        asked.append(limit)
        return min(limit, images * height * width)

    monkeypatch.setattr(memory, noted)
    augmentation_distances(patches, pictures((0,), 16), 1000, 0, share=0.5)
    assert set(asked) == {375}  # 1000, of which half for these normals, of which three quarters are kept
