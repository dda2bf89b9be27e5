"""The memories: what was kept is near, nearest means nearest, what is excluded does not count, and what normal parts
differ in is allowed."""

from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flawsmith.detector import memory as module
from flawsmith.detector.memory import MEMORIES, MemoryBank, rows_of, softly_normalised
from flawsmith.detector.teacher import Teacher

CHANNELS = 6


def patches(images: int, side: int, seed: int = 0) -> Tensor:
    return torch.randn(images, CHANNELS, side, side, generator=torch.Generator().manual_seed(seed))


def filled(normals: Tensor, size: int) -> tuple[MemoryBank, Tensor]:
    bank, rows = MemoryBank(size, CHANNELS), rows_of(normals)
    kept = bank.fill(rows, torch.Generator().manual_seed(3))
    return bank, kept // (len(rows) // len(normals))


def squared_distances(asked: Tensor, bank: MemoryBank) -> Tensor:
    return torch.cdist(rows_of(asked).double(), bank.patches.double()).square()


def test_a_whole_memory_knows_every_normal_patch() -> None:
    normals = patches(5, 4)
    bank, source_ids = filled(normals, 5 * 16)
    torch.testing.assert_close(bank(normals), torch.zeros(5, 1, 4, 4), atol=1e-3, rtol=0)
    assert torch.bincount(source_ids).tolist() == [16] * 5


@pytest.mark.parametrize("chunk", [1, 7, 50, 8192])
def test_the_distance_is_the_least_power_distance(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    bank, source_ids = filled(patches(5, 4), 50)
    bank.allowance.copy_(torch.rand(50, generator=torch.Generator().manual_seed(4)) * 3)
    asked = patches(3, 4, seed=1)
    power = squared_distances(asked, bank) - bank.allowance
    torch.testing.assert_close(bank(asked).flatten().double(), power.amin(dim=1), atol=1e-4, rtol=1e-4)
    own = source_ids == torch.tensor([2, 0, -1])[:, None]  # each image leaves out others
    expected = power.masked_fill(own.repeat_interleave(16, dim=0), torch.inf).amin(dim=1)
    torch.testing.assert_close(bank(asked, own).flatten().double(), expected, atol=1e-4, rtol=1e-4)


def test_the_fill_keeps_what_lies_far_from_the_rest() -> None:
    normals = 0.01 * patches(40, 4)
    normals[7, :, 2, 1] += 9  # one patch like no other
    bank, source_ids = filled(normals, 10)
    assert 7 in source_ids
    assert float(bank(normals).max()) < 1


def test_what_normal_parts_differ_in_is_allowed() -> None:
    """Patches of two kinds: smooth ones that all agree, and an edge that lies elsewhere on every part."""
    generator = torch.Generator().manual_seed(5)
    normals = 0.05 * torch.randn(60, CHANNELS, 4, 4, generator=generator)
    normals[:, 0, :, :2] += 20  # the edge
    normals[:, :, :, :2] += torch.randn(60, CHANNELS, 4, 2, generator=generator)
    bank, source_ids = filled(normals, 300)
    plain = bank(normals[:20])
    bank.allow(bank.tally(normals, source_ids == torch.arange(60)[:, None]))
    unseen = 0.05 * torch.randn(20, CHANNELS, 4, 4, generator=generator)
    unseen[:, 0, :, :2] += 20
    unseen[:, :, :, :2] += torch.randn(20, CHANNELS, 4, 2, generator=generator)
    edge, smooth = (bank(unseen)[..., part] for part in (slice(0, 2), slice(2, 4)))
    bank.allowance.zero_()
    before = bank(unseen)
    assert float(before[..., :2].mean()) > 20 * float(before[..., 2:].mean())  # an edge seemed a defect
    assert float(edge.mean()) < 0.3 * float(before[..., :2].mean())
    off = unseen.clone()
    off[:, 1, :, 2:] += 0.7  # a smooth patch that is somewhat off
    bank.allow(bank.tally(normals, source_ids == torch.arange(60)[:, None]))
    assert float(bank(off)[..., 2:].mean()) > float(edge.mean())
    assert float(smooth.mean()) < 0.1
    assert plain.shape == (20, 1, 4, 4)


def test_nobody_allows_its_own_patch() -> None:
    normals = patches(4, 4)
    bank, source_ids = filled(normals, 64)
    bank.allow(bank.tally(normals, torch.zeros(4, 64, dtype=torch.bool)))
    itself = bank.allowance.clone()
    bank.allow(bank.tally(normals, source_ids == torch.arange(4)[:, None]))
    assert float(itself.max()) < 1e-3
    assert float(bank.allowance.min()) > 0.1


@given(gain=st.floats(0.05, 20), seed=st.integers(0, 5))
def test_patches_do_not_see_the_contrast_of_the_image(gain: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    level = torch.randn(2, CHANNELS, 8, 8, generator=generator)
    torch.testing.assert_close(softly_normalised(level * gain), softly_normalised(level), atol=1e-5, rtol=1e-4)


def test_what_is_weak_counts_little_and_nothing_counts_more_than_one() -> None:
    level = patches(2, 8)
    level[:, :, :4] *= 0.01
    length = softly_normalised(level).norm(dim=1)
    assert float(length[:, :4].max()) < 0.05
    assert 0.4 < float(length[:, 4:].mean()) < 1
    assert float(softly_normalised(patches(1, 4) * 1e6).norm(dim=1).max()) < 1
    assert not softly_normalised(torch.zeros(1, CHANNELS, 4, 4)).any()


def test_a_memory_reads_the_levels_that_its_name_says() -> None:
    teacher = Mock(Teacher, channels=(3, 4, 5), strides=(4, 8, 16))
    features = tuple(torch.rand(2, c, 64 // s, 96 // s) for c, s in zip(teacher.channels, teacher.strides, strict=True))
    for kind in MEMORIES.values():
        _, channels, height, width = kind.patches(features).shape
        assert (channels, height * width) == (kind.channels(teacher), kind.count(teacher, (64, 96)))
    fine, coarse = MEMORIES["memory_fine"].patches, MEMORIES["memory_coarse"].patches
    assert fine(features).shape == (2, 4 * 3 + 4 + 5, 8, 12)
    assert coarse(features).shape == (2, 5, 4, 6)
    for level, (seen_by_fine, seen_by_coarse) in enumerate(((True, False), (True, False), (True, True))):
        changed = tuple(part + torch.rand_like(part) * (index == level) for index, part in enumerate(features))
        assert torch.equal(fine(changed), fine(features)) is not seen_by_fine
        assert torch.equal(coarse(changed), coarse(features)) is not seen_by_coarse
